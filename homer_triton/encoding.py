"""`encode`: from a long input to a short KV cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from .config import HomerConfig, plan
from .context import EncodedContext, EncodeStats
from .model.llama import Llama
from .pool import SlotPool
from .scheduler import Scheduler
from .stopwatch import Stopwatch
from .tokens import TokensLike, split_input
from .tree import Node


@torch.no_grad()
def encode(
    model: Llama,
    context: TokensLike,
    prefix: TokensLike | None = None,
    suffix: TokensLike | None = None,
    config: HomerConfig | None = None,
    progress: bool | Callable[[Node], None] = False,
    scheduler: Callable[..., Scheduler] = Scheduler,
) -> EncodedContext:
    """Merge a long input into a cache of at most `config.target_len` rows (HOMER, Song et al., ICLR
    2024).

    context, prefix, suffix: text or token ids (a list or a 1-D tensor). The prefix, left out, is
    the tokenizer's beginning-of-sequence token; the suffix, left out, is the context's own end.
    progress: show a bar over the tree's nodes, or call a function with each finished one.
    scheduler: another walk of the tree, for experiments on the method.

    Raises `ValueError` for inputs and settings that do not fit the model or each other, for a
    calibration made for something else, and for a model whose weights yield NaN.
    """
    config = config or HomerConfig()
    ids = split_input(model, context, prefix, suffix, config.chunk_len(model.config))
    before, middle, after = (part.to(model.device) for part in ids)
    tree = plan(model.config, len(middle), len(before), len(after), config)
    bias = None
    if config.calibration is not None:
        config.calibration.check(model, tree, config.score)
        bias = config.calibration.bias.to(model.device, torch.float32)

    pool = SlotPool(model.new_cache(tree.peak_slots), reserved=len(before))
    walk = scheduler(model, tree, pool, bias, config.score)
    watch = Stopwatch(model.device)
    seconds = [0.0] * len(tree.levels)
    finished: list[int] = []
    with tqdm(
        total=sum(len(level.nodes) for level in tree.levels),
        desc="encode",
        unit="chunk",
        disable=progress is not True,
    ) as bar:

        def on_node(node: Node) -> None:
            watch.mark()
            finished.append(node.height)
            bar.update()
            if callable(progress):
                progress(node)

        merged = walk.run(before, middle, after, on_node)
    logits = model.logits(merged.hidden)
    keys, values = model.ops.gather_cache(pool.cache, merged.slots)
    watch.mark()
    laps = watch.laps()
    for height, lap in zip(finished, laps, strict=False):
        seconds[height] += lap
    encoded = EncodedContext(
        keys=keys,
        values=values,
        positions=merged.positions,
        source_indices=merged.source_indices,
        token_ids=torch.cat(ids),
        pruned_at=merged.pruned_at,
        next_position=tree.next_position,
        logits=logits,
        plan=tree,
        stats=EncodeStats(
            tokens=tree.input_len,
            kept_tokens=tree.rows,
            seconds=sum(laps),
            seconds_by_height=tuple(seconds),
            flops=tree.flops(model.config),
            peak_slots=pool.high_water,
        ),
        model=model.fingerprint,
    )
    del pool, walk
    if config.suffix == "recomputed":
        encoded = recompute_suffix(model, encoded, after)
    if not encoded.logits.isfinite().all():
        raise ValueError(
            "The logits are not finite: the weights hold NaN or overflow in this dtype; try "
            "another dtype."
        )
    return encoded


def recompute_suffix(model: Llama, encoded: EncodedContext, suffix: Tensor) -> EncodedContext:
    """Run the suffix once more over the finished cache, in place of its averaged rows.

    suffix: [S] token ids on the model's device, the ones that `encoded` was made with.
    """
    watch = Stopwatch(model.device)
    cache = encoded.open_cache(model, room=0)
    kept = len(encoded) - len(suffix)
    start = encoded.next_position - len(suffix)
    logits = model.forward(suffix, cache, filled=kept, position=start)
    keys, values = (half.transpose(1, 2).contiguous() for half in cache.unbind(1))
    watch.mark()
    seconds = encoded.stats.seconds + sum(watch.laps())
    flops = encoded.stats.flops + encoded.plan.recompute_flops(model.config)
    stats = replace(encoded.stats, seconds=seconds, flops=flops)
    return replace(encoded, keys=keys, values=values, logits=logits, stats=stats)
