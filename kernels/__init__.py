"""The ops of hierarchical context merging as Triton kernels, on plain tensors and without a model.

`kernels.reference` has the same ops in PyTorch, under the same names: it defines them, and runs on
any device. It also explains the sizes in the docstrings (B, T, HQ, ...). An op is imported on first
use, so that `reference` needs no Triton.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .activation import gated_linear, silu_mul
    from .attention import causal_attention
    from .cache import gather_cache_
    from .merging import average_affix_, prune_and_concatenate
    from .norms import add_rms_norm, rms_norm
    from .products import add_linear_, linear
    from .rotary import apply_rotary_, rotary_and_store_
    from .selection import score_and_select
    from .stored import score_units
    from .voting import score_rows, vote_and_select

__all__ = [
    "add_linear_",
    "add_rms_norm",
    "apply_rotary_",
    "average_affix_",
    "causal_attention",
    "gated_linear",
    "gather_cache_",
    "linear",
    "prune_and_concatenate",
    "rms_norm",
    "rotary_and_store_",
    "score_and_select",
    "score_rows",
    "score_units",
    "silu_mul",
    "vote_and_select",
]

_HOME = {
    "add_linear_": "products",
    "add_rms_norm": "norms",
    "apply_rotary_": "rotary",
    "average_affix_": "merging",
    "causal_attention": "attention",
    "gated_linear": "activation",
    "gather_cache_": "cache",
    "linear": "products",
    "prune_and_concatenate": "merging",
    "rms_norm": "norms",
    "rotary_and_store_": "rotary",
    "score_and_select": "selection",
    "score_rows": "voting",
    "score_units": "stored",
    "silu_mul": "activation",
    "vote_and_select": "voting",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
