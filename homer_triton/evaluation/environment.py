"""Where a result comes from: the command, the code, the machine and the versions behind it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..kernels.products import has_instructions

_PACKAGES = ("homer_triton", "torch", "transformers", "triton")


def describe_environment(device: torch.device | str) -> dict[str, Any]:
    """What to remember of a run on a device beside its settings, as plain values."""
    return {
        "command": sys.argv,
        "commit": _git_commit(),
        "device": _device_name(torch.device(device)),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }


def _device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's, its threads for this process and its instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    capability = torch.backends.cpu.get_cpu_capability()
    if has_instructions(torch.bfloat16):
        capability += " with bfloat16"
    return f"{model}, {torch.get_num_threads()} threads, {capability}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit that this code is checked out at, with a plus sign if it was changed since; the
    results that a run writes are no change. HOMER_COMMIT says it of a copy made without git.
    """
    if said := os.environ.get("HOMER_COMMIT"):
        return said
    here = ["git", "-C", str(Path(__file__).resolve().parent)]
    all_but_results = ["--", ":/", ":(top,exclude)bench/results"]
    try:
        commit = subprocess.run([*here, "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run(
            [*here, "diff", "--quiet", "HEAD", *all_but_results], capture_output=True
        )
    except OSError:
        return None
    return commit.stdout.strip() + "+" * changed.returncode if commit.returncode == 0 else None
