"""The ops of hierarchical context merging as Triton kernels, on plain tensors and without a model.

`reference` holds the same ops in PyTorch, under the same names: their definitions, and the path for
other devices.
"""

from .activation import silu_mul
from .attention import causal_attention
from .cache import gather_cache
from .merging import prune_and_concatenate
from .norms import add_rms_norm, rms_norm
from .rotary import apply_rotary_, rotary_and_store_
from .scores import SCORES
from .scoring import score_rows
from .selection import score_and_select

__all__ = [
    "SCORES",
    "add_rms_norm",
    "apply_rotary_",
    "causal_attention",
    "gather_cache",
    "prune_and_concatenate",
    "rms_norm",
    "rotary_and_store_",
    "score_and_select",
    "score_rows",
    "silu_mul",
]
