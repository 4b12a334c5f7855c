"""Cases of `bench/kernels.py`: the ops that move memory, and the end of a level."""

from typing import Any

import torch
from measure import require_as_exact
from op_cases import DEVICE, DTYPE, Case, Sizes, nbytes, random, same, sdpa, some_rows, whole
from torch import Tensor
from torch.nn.attention import SDPBackend

from homer_triton import kernels
from homer_triton.kernels import reference


def new_cache(m: Sizes) -> Tensor:
    return random(m.layers, 2, m.slots, m.key_heads, m.dim)


def labels(m: Sizes) -> list[Tensor]:
    """The labels of two siblings, with slots anywhere in the cache."""
    slots = torch.randperm(m.slots, device=DEVICE)[: 2 * m.rows].view(2, 1, 1, m.rows)
    return [torch.cat([slots[i]] * 3, dim=1) for i in range(2)]


def suffix_slots(m: Sizes, sides: list[Tensor]) -> list[Tensor]:
    """The slots of both siblings' suffixes in the cache."""
    return [side[:, 2, -m.suffix :] for side in sides]


def slot_bytes(m: Sizes, cache: Tensor) -> int:
    """The bytes of a token in all layers of the cache."""
    return nbytes(cache) // m.slots


def merging_case(m: Sizes) -> Case:
    """Two pruned children become one."""
    tail = torch.arange(m.rows - m.suffix, m.rows, device=DEVICE)[None]
    kept = [
        torch.cat([some_rows(1, m.rows - m.suffix, m.kept - m.suffix), tail], 1) for _ in range(2)
    ]
    states = [random(1, m.kept, m.hidden) for _ in range(2)]
    children = (*states, *labels(m), *kept, m.suffix)
    return Case(
        "prune_and_concatenate",
        m.model,
        {
            "triton": lambda: kernels.prune_and_concatenate(*children),
            "torch": lambda: reference.prune_and_concatenate(*children),
        },
        lambda: same(
            kernels.prune_and_concatenate(*children), reference.prune_and_concatenate(*children)
        ),
        2 * nbytes(*states) - m.suffix * m.hidden * states[0].element_size(),
        counts_launches=True,
    )


def averaging_case(m: Sizes) -> Case:
    """The suffixes of two siblings in the cache become one."""
    cache = new_cache(m)
    suffixes = suffix_slots(m, labels(m))

    def check() -> None:
        mine, theirs = cache.clone(), cache.clone()
        kernels.average_affix_(mine, *suffixes)
        reference.average_affix_(theirs, *suffixes)
        same(mine, theirs)

    return Case(
        "average_affix_",
        m.model,
        {
            "triton": lambda: kernels.average_affix_(cache, *suffixes),
            "torch": lambda: reference.average_affix_(cache, *suffixes),
        },
        check,
        3 * m.suffix * slot_bytes(m, cache),
    )


def gathering_case(m: Sizes) -> Case:
    """A chunk's rows are gathered from the cache."""
    cache, slots = new_cache(m), some_rows(1, m.slots, m.rows)[0]
    shape = (2, 2, m.layers, m.key_heads, m.rows, m.dim)
    finished = torch.empty(shape, dtype=DTYPE, device=DEVICE)

    def check() -> None:
        kernels.gather_cache_(cache, slots, *finished[0])
        reference.gather_cache_(cache, slots, *finished[1])
        same(*finished)

    return Case(
        "gather_cache_",
        m.model,
        {
            "triton": lambda: kernels.gather_cache_(cache, slots, *finished[0]),
            "torch": lambda: reference.gather_cache_(cache, slots, *finished[1]),
        },
        check,
        2 * m.rows * slot_bytes(m, cache),
    )


def norm_case(m: Sizes) -> Case:
    x, weight = random(m.chunks, m.rows, m.hidden), random(m.hidden)
    return Case(
        "rms_norm",
        m.model,
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


def add_norm_case(m: Sizes) -> Case:
    x, residual = (random(m.chunks, m.rows, m.hidden) for _ in range(2))
    weight = random(m.hidden)
    return Case(
        "add_rms_norm",
        m.model,
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


def activation_case(m: Sizes) -> Case:
    gate_up = random(m.chunks // 2, m.rows, 2 * m.feed_forward)
    return Case(
        "silu_mul",
        m.model,
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


def rotary_case(m: Sizes) -> Case:
    """Chunks are rotated and stored side by side, as views of their fused projection."""
    heads = [m.heads, m.key_heads, m.key_heads]
    q, k, v = random(m.chunks, m.rows, sum(heads), m.dim).split(heads, 2)
    positions = torch.arange(m.rows, device=DEVICE).repeat(m.chunks, 1)
    angles = torch.rand(m.rows, m.dim // 2, device=DEVICE)
    cos, sin = angles.cos(), angles.sin()
    store = random(2, m.chunks * m.rows, m.key_heads, m.dim)
    slots = torch.randperm(m.chunks * m.rows, device=DEVICE).view(m.chunks, m.rows)

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
        m.model,
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


def closing_case(m: Sizes) -> Case:
    """The end of a level for two siblings: score, select, attend, prune, concatenate."""
    cache, sides = new_cache(m), labels(m)
    suffixes = suffix_slots(m, sides)
    q, k = whole(2, m.rows, m.heads, m.dim), whole(2, m.rows, m.key_heads, m.dim)
    v = random(2, m.rows, m.key_heads, m.dim)
    positions = torch.arange(m.rows, device=DEVICE).expand(2, -1)
    bias = torch.randint(-9, 10, (m.rows,), device=DEVICE).float()
    budget = (m.kept - m.suffix, 0, m.rows - m.suffix)
    # The queries of the kept rows: the model projects them only after the selection, which neither
    # system is timed for.
    chosen, _ = reference.score_and_select(q[:, -1], k, positions, bias, *budget)
    q_kept = q.take_along_dim(chosen[..., None, None], 1)

    def children(mixed: Tensor, kept: Tensor) -> tuple[Any, ...]:
        return (mixed[:1], mixed[1:], *sides, kept[:1], kept[1:], m.suffix)

    def merge(ops: object, mixed: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        ops.average_affix_(cache, *suffixes)  # type: ignore[attr-defined]
        return ops.prune_and_concatenate(*children(mixed, kept))  # type: ignore[attr-defined]

    def ours() -> tuple[Tensor, Tensor]:
        kept, _ = kernels.score_and_select(q[:, -1], k, positions, bias, *budget)
        mixed = kernels.causal_attention(q_kept, k, v, query_rows=kept)
        return merge(kernels, mixed.flatten(2), kept)

    def theirs() -> tuple[Tensor, Tensor]:
        kept, _ = reference.score_and_select(q[:, -1], k, positions, bias, *budget)
        mixed = sdpa(q, k, v, SDPBackend.FLASH_ATTENTION).transpose(1, 2).flatten(2)
        return merge(reference, mixed.take_along_dim(kept[..., None], 1), kept)

    def check() -> None:
        (mine, my_labels), (flash, their_labels) = ours(), theirs()
        same(my_labels, their_labels)
        exact = reference.causal_attention(q.float(), k.float(), v.float()).flatten(2)
        states = exact.take_along_dim(chosen[..., None], 1)
        merged, _ = reference.prune_and_concatenate(*children(states, chosen))
        require_as_exact(mine, flash, merged)

    return Case(
        "closing step",
        m.model,
        {"triton": ours, "flash": theirs},
        check,
        nbytes(q_kept, k, v) + nbytes(k),
        counts_launches=True,
    )
