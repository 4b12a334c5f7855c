"""The ablation: what each part of the method brings, one change at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

from torch import Tensor

from ..calibration import Calibration, calibrate
from ..config import HomerConfig
from ..encoding import encode
from ..engine.scheduler import Scheduler
from ..engine.tree import Recompute
from ..model.llama import Llama
from ..selection import PAPER, VOTES
from ..text.tokens import tokenize
from .methods import Reader, Reading
from .passkey import FILLER
from .schedulers import LayerwiseScheduler, RandomScheduler
from .spread import read_spread


@dataclass(frozen=True)
class Variant:
    """HOMER with one thing changed.

    group, change: the heading and the entry in the table; config: its settings; scheduler: how it
    prunes; spread: whether what survived is read again at its own distances.
    """

    group: str
    change: str
    config: HomerConfig
    scheduler: Callable[..., Scheduler] = Scheduler
    spread: bool = False

    @property
    def name(self) -> str:
        return f"{self.group}: {self.change}"

    def read(
        self, model: Llama, prefix: Tensor, context: Tensor, suffix: Tensor, new_tokens: int
    ) -> Reading:
        """A text as this variant reads it."""
        encoded = encode(model, context, prefix, suffix, self.config, scheduler=self.scheduler)
        return Reading(model, read_spread(model, encoded, new_tokens) if self.spread else encoded)


def make_variants(
    model: Llama, config: HomerConfig, calibration: Calibration, seed: int
) -> tuple[Variant, ...]:
    """The variants to compare, each one change away from `config`.

    calibration: of the score in `config`, for the calibrated variant; seed: of what is random.
    """
    layers, limit = model.config.num_hidden_layers, model.config.context_limit
    chunk_len = config.chunk_len(model.config)
    at_random = partial(RandomScheduler, seed=seed)
    chosen = config.selected_by
    paper = replace(config, selection=PAPER)
    cached = replace(config, recompute="suffix", layers_tree=None)
    selections = {
        "votes": VOTES,
        "last row asks": replace(chosen, rows=1),
        "log_softmax": replace(chosen, logit="log_softmax"),
        "logit": replace(chosen, logit="logit"),
        "all heads": replace(chosen, heads="sum", layers="levels"),
        "all heads, all layers": replace(chosen, heads="sum"),
        "largest over heads": replace(chosen, heads="max", layers="levels"),
        "last layers": replace(chosen, layers="levels"),
        "the node's layers": replace(chosen, layers="all"),
        **{
            f"window {size}": replace(chosen, window=size)
            for size in (1, 7, 15, 63)
            if size <= chunk_len // 2
        },
    }
    return (
        Variant("selection", "paper, calibrated", replace(paper, calibration=calibration)),
        Variant("selection", "paper, uncalibrated", paper),
        *(
            Variant("selection", name, replace(config, selection=selection))
            for name, selection in selections.items()
        ),
        Variant("selection", "random", config, at_random),
        *(
            Variant("recompute", name, replace(config, recompute=name, layers_tree=None))
            for name in get_args(Recompute)
        ),
        Variant("positions", "closed up", replace(config, recompute="all")),
        Variant("positions", "own distances", replace(config, recompute="all"), spread=True),
        Variant("refinement", "propagative", cached),
        Variant("refinement", "scores of each layer", cached, LayerwiseScheduler),
        Variant("refinement", "random", cached, partial(LayerwiseScheduler, seed=seed)),
        *(
            Variant("layers_tree", f"{tree}", replace(config, layers_tree=tree))
            for tree in sorted({3 * layers // 5, 4 * layers // 5, layers})
        ),
        *(
            Variant("W", f"{warmup}", replace(config, layers_warmup=warmup))
            for warmup in sorted({0, layers // 8, layers // 4, 3 * layers // 8})
        ),
        *(
            Variant("M", f"{length}", replace(config, max_chunk_len=length, target_len=chunk_len))
            for length in sorted({chunk_len // 2, chunk_len, min(2 * chunk_len, limit)})
        ),
        *(
            Variant("T", f"{length}", replace(config, target_len=length))
            for length in sorted({chunk_len // 4, chunk_len // 2, chunk_len})
        ),
    )


def choose_parts(variants: tuple[Variant, ...], parts: tuple[str, ...]) -> tuple[Variant, ...]:
    """The variants of some parts, in their order. Raises `ValueError` for one that is not known,
    and for none.
    """
    known = list(dict.fromkeys(variant.group for variant in variants))
    if not parts:
        raise ValueError(f"No part is named; choose from {', '.join(known)}.")
    for part in parts:
        if part not in known:
            raise ValueError(f"The part {part!r} is not known; choose from {', '.join(known)}.")
    return tuple(variant for variant in variants if variant.group in parts)


def as_readers(model: Llama, variants: tuple[Variant, ...]) -> Mapping[str, Reader]:
    """The variants by name, as the tasks take methods."""
    return {variant.name: partial(variant.read, model) for variant in variants}


def calibrate_on_filler(model: Llama, segment_len: int) -> Calibration:
    """A calibration from the passkey task's own filler, without a key: what there is offline.

    segment_len: tokens of a segment, a chunk's length.
    """
    sentences = " ".join(FILLER)
    cycle = len(tokenize(model, sentences, "filler"))
    text = " ".join([sentences] * (2 * segment_len // max(cycle, 1) + 2))
    return calibrate(model, [text], segment_len)
