"""The sizes that kernels are launched with, by op and family of chips, in tiles.json beside this.

`make tune` measures and writes them, so that nothing is tuned at a user's first call. The compile
gate holds every entry to no spills.
"""

import json
from pathlib import Path
from typing import Any

import torch

from .devices import architecture

FILE = Path(__file__).with_name("tiles.json")
TABLE: dict[str, dict[str, dict[str, Any]]] = json.loads(FILE.read_text(encoding="utf-8"))
# Its sizes, the smallest, run on every chip that has none of its own.
ANY = "sm_80"


def tiles_of(op: str, device: torch.device) -> dict[str, Any]:
    """An op's sizes on a device."""
    families, arch = TABLE[op], architecture(device)
    return families[next((name for name in families if arch.startswith(name)), ANY)]
