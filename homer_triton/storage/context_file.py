"""The file of an encoded context, and everything that must be so in one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import MOST
from ..engine.tree import Plan
from .tensor_file import FLOATS, TensorFile, require_finite, save_tensors

_KIND = "homer_triton.encoded"
_NAMES = ("keys", "values", "positions", "source_indices", "token_ids", "pruned_at", "logits")
_DESCRIBED = {"plan", "stats", "next_position", "model", "appended"}


def write_context(path: str | Path, context: object, described: Mapping[str, Any]) -> None:
    """Write an encoded context's tensors and what describes them."""
    save_tensors(path, _KIND, described, {name: getattr(context, name) for name in _NAMES})


def read_context(path: Path) -> tuple[dict[str, Tensor], Plan, dict[str, Any]]:
    """The tensors, on the CPU, the plan, and the rest of the description.

    Raises `ValueError` for a file whose parts do not fit each other; for one that is too small for
    what it claims, before anything of that size is made.
    """
    file = TensorFile.open(path, _KIND, _NAMES)
    described = {"appended": 0, **file.described}
    if described.keys() != _DESCRIBED:
        raise ValueError(f"its description must have {', '.join(sorted(_DESCRIBED))}")
    numbers = described.pop("plan")
    Plan.check_dict(numbers)
    appended = described["appended"]
    if type(appended) is not int or not 0 <= appended <= MOST:
        raise ValueError(f"appended is {appended!r}")
    lengths = (numbers[name] for name in ("prefix_len", "context_len", "suffix_len"))
    tokens = sum(lengths) + appended
    # A tree has nodes by its tokens and levels by its layers: the file must have as many.
    file.require("token_ids", ["I64"], (tokens,))
    file.require("pruned_at", ["I8"], (tokens,))
    file.require("keys", FLOATS, (numbers["num_layers"], None, None, None))
    plan = Plan.from_dict(numbers)
    layers, heads, _, dim = file.shapes["keys"]
    rows = plan.rows + appended
    file.require("keys", FLOATS, (layers, heads, rows, dim))
    file.require("values", [file.dtypes["keys"]], file.shapes["keys"])
    file.require("positions", ["I64"], (rows,))
    file.require("source_indices", ["I64"], (rows,))
    file.require("logits", ["F32"], (None,))
    next_position = described["next_position"]
    if type(next_position) is not int or not 1 <= next_position <= tokens:
        raise ValueError(f"next_position is {next_position!r}")
    if not isinstance(described["model"], str):
        raise ValueError(f"model is {described.get('model')!r} instead of a fingerprint")
    tensors = file.read()
    _check_values(tensors, plan, next_position)
    return tensors, plan, described


def _check_values(tensors: Mapping[str, Tensor], plan: Plan, next_position: int) -> None:
    """Raise `ValueError` for numbers out of range."""
    for name in ("keys", "values"):
        require_finite(name, tensors[name])
    require_finite("logits", tensors["logits"][None])
    ranges = {
        "positions": next_position,
        "token_ids": len(tensors["logits"]),
        "source_indices": len(tensors["token_ids"]),
    }
    for name, end in ranges.items():
        low, high = (int(bound) for bound in tensors[name].aminmax())
        if low < 0 or high >= end:
            wrong = low if low < 0 else high
            raise ValueError(f"{name} holds {wrong}, which is not from 0 to {end - 1}")
    low, high = (int(bound) for bound in tensors["pruned_at"].aminmax())
    if low < -1 or high > plan.height:
        raise ValueError(f"pruned_at holds {low} to {high}; the tree's height is {plan.height}")
    kept = (tensors["pruned_at"] < 0).nonzero()[:, 0]
    if not torch.equal(kept, tensors["source_indices"]):
        raise ValueError("source_indices are not the tokens that pruned_at says were kept")
