"""What `bench/kernels.py` measures at a model's shapes: memory's ops, and the end of a level."""

from collections.abc import Iterator

import torch
from cases import (
    DTYPE,
    KEPT,
    MODELS,
    ROWS,
    SLOTS,
    SUFFIX,
    Case,
    nbytes,
    random,
    same,
    sdpa,
    some_rows,
)
from measure import require_as_exact
from torch import Tensor
from torch.nn.attention import SDPBackend

from homer_triton import kernels
from homer_triton.kernels import reference

# Layers of the cache in the merging benchmarks: a low level's worth.
LAYERS = 8


def siblings(model: str) -> tuple[tuple[Tensor, ...], Tensor]:
    """Two pruned children (hidden, labels and kept rows of each) and the cache that they share."""
    hidden, _, key_heads, dim, _ = MODELS[model]
    slots = torch.randperm(SLOTS, device="cuda")[: 2 * ROWS].view(2, 1, 1, ROWS)
    labels = [torch.cat([slots[i]] * 3, dim=1) for i in range(2)]
    tail = torch.arange(ROWS - SUFFIX, ROWS, device="cuda")[None]
    kept = [torch.cat([some_rows(1, ROWS - SUFFIX, KEPT - SUFFIX), tail], 1) for _ in range(2)]
    states = [random(1, KEPT, hidden) for _ in range(2)]
    return (*states, *labels, *kept), random(LAYERS, 2, SLOTS, key_heads, dim)


def movement_cases(model: str) -> Iterator[Case]:
    """What is bound by memory: merging, gathering, and the fused elementwise ops."""
    hidden, _, key_heads, dim, feed_forward = MODELS[model]
    children, cache = siblings(model)
    slots = some_rows(1, SLOTS, ROWS)[0]
    slot_bytes = LAYERS * 2 * key_heads * dim * cache.element_size()

    yield Case(
        "prune_and_concatenate",
        model,
        {
            "triton": lambda: kernels.prune_and_concatenate(*children, SUFFIX),
            "torch": lambda: reference.prune_and_concatenate(*children, SUFFIX),
        },
        lambda: same(
            kernels.prune_and_concatenate(*children, SUFFIX),
            reference.prune_and_concatenate(*children, SUFFIX),
        ),
        2 * nbytes(*children[:2]) - SUFFIX * hidden * cache.element_size(),
        counts_launches=True,
    )
    suffixes = [labels[:, 2, -SUFFIX:] for labels in children[2:4]]

    def check_average() -> None:
        mine, theirs = cache.clone(), cache.clone()
        kernels.average_affix_(mine, *suffixes)
        reference.average_affix_(theirs, *suffixes)
        same(mine, theirs)

    yield Case(
        "average_affix_",
        model,
        {
            "triton": lambda: kernels.average_affix_(cache, *suffixes),
            "torch": lambda: reference.average_affix_(cache, *suffixes),
        },
        check_average,
        3 * SUFFIX * slot_bytes,
    )
    kept = torch.empty(2, 2, LAYERS, key_heads, ROWS, dim, dtype=DTYPE, device="cuda")

    def check_gather() -> None:
        kernels.gather_cache_(cache, slots, *kept[0])
        reference.gather_cache_(cache, slots, *kept[1])
        same(*kept)

    yield Case(
        "gather_cache_",
        model,
        {
            "triton": lambda: kernels.gather_cache_(cache, slots, *kept[0]),
            "torch": lambda: reference.gather_cache_(cache, slots, *kept[1]),
        },
        check_gather,
        2 * ROWS * slot_bytes,
    )

    x, residual, weight = random(8, ROWS, hidden), random(8, ROWS, hidden), random(hidden)
    gate_up = random(4, ROWS, 2 * feed_forward)
    yield Case(
        "rms_norm",
        model,
        {
            "triton": lambda: kernels.rms_norm(x, weight, 1e-5),
            "torch": lambda: reference.rms_norm(x, weight, 1e-5),
        },
        lambda: require_as_exact(
            kernels.rms_norm(x, weight, 1e-5),
            reference.rms_norm(x, weight, 1e-5),
            reference.rms_norm(x.float(), weight.float(), 1e-5),
        ),
        2 * nbytes(x),
    )
    yield Case(
        "add_rms_norm",
        model,
        {
            "triton": lambda: kernels.add_rms_norm(x, residual, weight, 1e-5),
            "torch": lambda: reference.add_rms_norm(x, residual, weight, 1e-5),
        },
        lambda: require_as_exact(
            kernels.add_rms_norm(x, residual, weight, 1e-5)[1],
            reference.add_rms_norm(x, residual, weight, 1e-5)[1],
            reference.rms_norm((x + residual).float(), weight.float(), 1e-5),
        ),
        4 * nbytes(x),
    )
    yield Case(
        "silu_mul",
        model,
        {
            "triton": lambda: kernels.silu_mul(gate_up),
            "torch": lambda: reference.silu_mul(gate_up),
        },
        lambda: require_as_exact(
            kernels.silu_mul(gate_up),
            reference.silu_mul(gate_up),
            reference.silu_mul(gate_up.float()),
        ),
        nbytes(gate_up) * 3 // 2,
    )
    yield rotary_case(model)


def rotary_case(model: str) -> Case:
    """Eight chunks rotated and stored, as views of their fused projection."""
    _, heads, key_heads, dim, _ = MODELS[model]
    q, k, v = random(8, ROWS, heads + 2 * key_heads, dim).split([heads, key_heads, key_heads], 2)
    positions = torch.arange(ROWS, device="cuda").repeat(8, 1)
    angles = torch.rand(ROWS, dim // 2, device="cuda")
    cos, sin = angles.cos(), angles.sin()
    store = random(2, 8 * ROWS, key_heads, dim)
    slots = torch.randperm(8 * ROWS, device="cuda").view(8, ROWS)

    def check() -> None:
        turned = [(q.clone(), k.clone(), v, store.clone()) for _ in range(2)]
        for ops, (a, b, c, to) in zip((kernels, reference), turned, strict=True):
            ops.rotary_and_store_(a, b, c, positions, cos, sin, *to, slots)
        wide = [x.float() for x in (q, k)]
        for i, x in enumerate(wide):
            reference.apply_rotary_(x, positions, cos, sin)
            require_as_exact(turned[0][i], turned[1][i], x)
        same(turned[0][3][0][slots], turned[0][1])
        same(turned[0][3][1][slots], v.contiguous())

    return Case(
        "rotary_and_store_",
        model,
        {
            "triton": lambda: kernels.rotary_and_store_(
                q, k, v, positions, cos, sin, *store, slots
            ),
            "torch": lambda: reference.rotary_and_store_(
                q, k, v, positions, cos, sin, *store, slots
            ),
        },
        check,
        2 * nbytes(q, k, v) + nbytes(k),
    )


def closing_case(model: str) -> Case:
    """The end of a level for two siblings: score, select, attend, prune, concatenate."""
    _, heads, key_heads, dim, _ = MODELS[model]
    (_, _, left_labels, right_labels, _, _), cache = siblings(model)
    suffixes = [labels[:, 2, -SUFFIX:] for labels in (left_labels, right_labels)]
    q = torch.randint(-3, 4, (2, ROWS, heads, dim), device="cuda").to(DTYPE)
    k = torch.randint(-3, 4, (2, ROWS, key_heads, dim), device="cuda").to(DTYPE)
    v = random(2, ROWS, key_heads, dim)
    positions = torch.arange(ROWS, device="cuda").expand(2, -1)
    bias = torch.randint(-9, 10, (ROWS,), device="cuda").float()
    budget = (KEPT - SUFFIX, 0, ROWS - SUFFIX)
    # The queries of the kept rows: the model projects them only then, in both systems' favour.
    chosen, _ = reference.score_and_select(q[:, -1], k, positions, bias, *budget)
    q_kept = q.take_along_dim(chosen[..., None, None], 1)

    def merge(ops: object, mixed: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        sides = (mixed[:1], mixed[1:], left_labels, right_labels, kept[:1], kept[1:])
        ops.average_affix_(cache, *suffixes)  # type: ignore[attr-defined]
        return ops.prune_and_concatenate(*sides, SUFFIX)  # type: ignore[attr-defined]

    def ours() -> tuple[Tensor, Tensor]:
        kept, _ = kernels.score_and_select(q[:, -1], k, positions, bias, *budget)
        mixed = kernels.causal_attention(q_kept, k, v, query_rows=kept)
        return merge(kernels, mixed.flatten(2), kept)

    def theirs() -> tuple[Tensor, Tensor]:
        kept, _ = reference.score_and_select(q[:, -1], k, positions, bias, *budget)
        mixed = sdpa(q, k, v, SDPBackend.FLASH_ATTENTION).transpose(1, 2).flatten(2)
        return merge(reference, mixed.take_along_dim(kept[..., None], 1), kept)

    def check() -> None:
        (mine, my_labels), (flash, labels) = ours(), theirs()
        same(my_labels, labels)
        exact = reference.causal_attention(q.float(), k.float(), v.float()).flatten(2)
        states = exact.take_along_dim(chosen[..., None], 1)
        sides = (states[:1], states[1:], left_labels, right_labels, chosen[:1], chosen[1:])
        merged, _ = reference.prune_and_concatenate(*sides, SUFFIX)
        require_as_exact(mine, flash, merged)

    return Case(
        "closing step",
        model,
        {"triton": ours, "flash": theirs},
        check,
        nbytes(q_kept, k, v) + nbytes(k),
        counts_launches=True,
    )
