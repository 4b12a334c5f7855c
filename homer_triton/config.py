"""The settings of an encoding, and the plan that they make for an input of a given length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from .calibration import Calibration
from .kernels.reference import SCORES
from .model.config import ModelConfig
from .tree import Plan, build_plan, tree_height

SuffixMode = Literal["merged", "recomputed"]


@dataclass(frozen=True)
class HomerConfig:
    """How to encode; settings left out come from the model.

    max_chunk_len: tokens that run through a layer at once, half the context limit by default.
    target_len: the most tokens in the finished cache, `max_chunk_len` by default. layers_warmup:
    layers that leaves run before the first merge beyond their even share, 3/8 of the layers by
    default and fewer where the tree needs more levels. calibration: the bias that makes near and
    far tokens comparable, from `calibrate`. suffix: "merged" answers from the averaged suffix as
    the paper does; "recomputed" runs the suffix once more over the finished cache, so that the
    question reads all surviving context directly. score: what makes a row significant, "max_logit"
    (the paper's) or "log_softmax" (blind to a head's constant offset). leaf_batch: leaves that run
    at once, a power of two; more fill a chip better and take memory.

    Raises `ValueError` for values out of range.
    """

    max_chunk_len: int | None = None
    target_len: int | None = None
    layers_warmup: int | None = None
    calibration: Calibration | None = None
    suffix: SuffixMode = "merged"
    score: str = "max_logit"
    leaf_batch: int = 1

    def __post_init__(self) -> None:
        for name, least in (
            ("max_chunk_len", 1),
            ("target_len", 1),
            ("layers_warmup", 0),
            ("leaf_batch", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
        for name, allowed in (("suffix", get_args(SuffixMode)), ("score", tuple(SCORES))):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"{name}={value!r} is not known; choose one of {', '.join(allowed)}."
                )

    def chunk_len(self, model: ModelConfig) -> int:
        """`max_chunk_len`, or its default for a model."""
        return self.max_chunk_len or model.max_position_embeddings // 2


def plan(
    model: ModelConfig,
    context_len: int,
    prefix_len: int = 0,
    suffix_len: int = 1,
    config: HomerConfig | None = None,
) -> Plan:
    """The merge tree for an input of these lengths, in tokens, before anything is run.

    Raises `ValueError` where the lengths or settings do not fit together; the message says what to
    change.
    """
    config = config or HomerConfig()
    chunk_len = config.chunk_len(model)
    layers = model.num_hidden_layers
    warmup = config.layers_warmup
    if warmup is None:
        room = max(chunk_len - prefix_len - suffix_len, 1)
        levels = tree_height(max(context_len, 1), room) + 1
        warmup = max(min(3 * layers // 8, layers - levels), 0)
    return build_plan(
        prefix_len=prefix_len,
        context_len=context_len,
        suffix_len=suffix_len,
        num_layers=layers,
        max_chunk_len=chunk_len,
        target_len=config.target_len or chunk_len,
        layers_warmup=warmup,
        leaf_batch=config.leaf_batch,
    )
