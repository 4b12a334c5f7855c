"""Documents of equal lengths, from token ids to finished caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from ..config import HomerConfig, plan
from ..context import EncodedContext, EncodeStats
from ..model.llama import Llama
from ..model.weights import named_weights
from .graphs import HAS_GRAPHS, Graphs, Replays
from .heap import trim_heap
from .pool import SlotPool, make_pools
from .recompute import read_again_
from .scheduler import Merged, Scheduler
from .stopwatch import Stopwatch
from .tree import Node, Plan


def fit_plan(
    model: Llama,
    parts: tuple[Tensor, Tensor, Tensor],
    config: HomerConfig,
    documents: int,
    ranks: int = 1,
) -> tuple[Plan, int]:
    """The plan for documents of these parts' lengths, and how many of them fit the memory. ranks:
    how many processes share each one's leaves.
    """
    prefix, context, suffix = map(len, parts)
    size, on_gpu = model.dtype.itemsize, model.device.type != "cpu"
    while True:
        try:
            tree = plan(
                model.config, context, prefix, suffix, config, size, documents, on_gpu, ranks
            )
            return tree, documents
        except ValueError:
            if documents == 1:
                raise
            documents //= 2


def encode_alike(
    model: Llama,
    tree: Plan,
    inputs: list[tuple[Tensor, Tensor, Tensor]],
    config: HomerConfig,
    progress: bool | Callable[[Node], None],
    scheduler: Callable[..., Scheduler],
    graphs: Graphs | None = None,
) -> list[EncodedContext] | None:
    """Encode documents of the plan's lengths side by side. inputs: each one's prefix, context and
    suffix, token ids on the CPU. None where the scheduler leaves the result to another rank.
    """
    documents = len(inputs)
    replays = Replays(model.device) if config.cuda_graphs or graphs is not None else None
    if replays is not None and model.device.type not in HAS_GRAPHS:
        raise ValueError(f"CUDA graphs need a model on a CUDA device; this is on {model.device}.")
    before = inputs[0][0].to(model.device)
    middle, after = (torch.stack([x[i] for x in inputs]).to(model.device) for i in (1, 2))
    bias = None
    if config.calibration is not None:
        config.calibration.check(model, tree)
        bias = config.calibration.bias.to(model.device, torch.float32)
    fingerprint = model.fingerprint
    walk = key = None
    if graphs is not None:
        at = tuple(x.data_ptr() for x in named_weights(model.weights, model.config).values())
        kind = scheduler, tree, documents, config.selected_by, config.calibration
        key = *kind, fingerprint, at
        walk = graphs.take(key)
    if walk is None:
        pools = [] if tree.recompute == "all" else make_pools(model, tree, documents)
        walk = scheduler(model, tree, pools, bias, config.selected_by, documents, replays)
    else:
        walk.clear()
        pools = walk.pools
    watch = Stopwatch(model.device)
    seconds = [0.0] * len(tree.levels)
    finished: list[int] = []
    with tqdm(
        total=sum(map(len, walk.steps())),
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

        def on_root_again(node: Node) -> None:
            watch.mark()
            finished.append(tree.height)

        merged = walk.run(before, middle, after, on_node)
    if merged is None:
        return None
    narrowing = tree.narrowing()
    if narrowing is not None:
        again = scheduler(model, narrowing, [], bias, config.selected_by, documents)
        merged = _narrow(again, merged, tree, inputs, on_root_again)
    logits = list(model.logits(merged.hidden)) if tree.recompute == "none" else []
    peak_slots = pools[0].high_water if pools else tree.peak_slots
    token_ids = [torch.cat(parts).to(model.device) for parts in inputs]
    positions = merged.positions
    if model.device.type == "cpu":
        trim_heap()  # the activations' memory, before the caches take theirs
    caches = _gather(model, tree, pools, merged.slots)
    if graphs is not None:
        graphs.keep(key, walk)
    del pools, walk
    if tree.recompute == "suffix":
        start = tree.next_position - tree.suffix_len
        logits = [
            read_again_(model, own, keys, values, start)
            for own, (keys, values) in zip(after, caches, strict=True)
        ]
    elif tree.recompute == "all":
        positions = torch.arange(tree.rows, device=model.device).expand_as(positions)
        logits = [
            read_again_(model, ids[own], keys, values, 0)
            for ids, own, (keys, values) in zip(
                token_ids, merged.source_indices, caches, strict=True
            )
        ]
    watch.mark()
    laps = watch.laps()
    for height, lap in zip(finished, laps, strict=False):
        seconds[height] += lap
    stats = EncodeStats(
        tokens=tree.input_len,
        kept_tokens=tree.rows,
        seconds=sum(laps),
        seconds_by_height=tuple(seconds),
        flops=tree.flops(model.config),
        peak_slots=peak_slots,
        documents=documents,
    )
    encoded = [
        EncodedContext(
            keys=keys,
            values=values,
            positions=positions[i],
            source_indices=merged.source_indices[i],
            token_ids=token_ids[i],
            pruned_at=merged.pruned_at[i],
            next_position=tree.next_position,
            logits=logits[i],
            plan=tree,
            stats=stats,
            model=fingerprint,
        )
        for i, (keys, values) in enumerate(caches)
    ]
    if not all(x.logits.isfinite().all() for x in encoded):
        raise ValueError(
            "The logits are not finite: the weights hold NaN or overflow in this dtype; try "
            "another dtype."
        )
    return encoded


def _narrow(
    walk: Scheduler,
    merged: Merged,
    tree: Plan,
    inputs: list[tuple[Tensor, Tensor, Tensor]],
    on_node: Callable[[Node], None],
) -> Merged:
    """What a walk over the survivors of a tree's root leaves of them, as if it were left of the
    whole inputs.
    """
    sources = merged.source_indices
    tokens = torch.stack([torch.cat(parts) for parts in inputs]).to(sources.device)
    prefix, middle, suffix = tokens.gather(1, sources).split(
        [tree.prefix_len, tree.survivors - tree.prefix_len - tree.suffix_len, tree.suffix_len], 1
    )
    fewer = walk.run(prefix[0], middle, suffix, on_node)
    assert fewer is not None
    pruned_at = merged.pruned_at.scatter(
        1, sources, torch.where(fewer.pruned_at < 0, -1, tree.height).to(merged.pruned_at.dtype)
    )
    return replace(
        fewer, source_indices=sources.gather(1, fewer.source_indices), pruned_at=pruned_at
    )


def _gather(
    model: Llama, tree: Plan, pools: list[SlotPool], slots: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """The finished keys and values [L, HKV, T', D] of each document, from their slots [D, levels,
    T']; without pools, room for them.
    """
    c = model.config
    shape = (c.num_hidden_layers, c.num_key_value_heads, tree.rows, c.head_dim)
    caches = []
    for own_slots in slots:
        keys, values = (
            torch.empty(shape, dtype=model.dtype, device=model.device) for _ in range(2)
        )
        for level, pool, places in zip(tree.levels, pools, own_slots, strict=bool(pools)):
            layers = slice(level.first_layer, level.last_layer)
            model.ops.gather_cache_(pool.cache, places, keys[layers], values[layers])
        caches.append((keys, values))
    return caches
