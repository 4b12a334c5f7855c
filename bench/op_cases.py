"""Cases of `bench/kernels.py`: attention and selection."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from measure import ON_GPU, between, require_as_exact
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from homer_triton import kernels
from homer_triton.kernels import reference
from homer_triton.kernels.reference import spread

# Triton's interpreter multiplies bfloat16 wrongly.
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float16)
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
REACH = (15, 15)
# Inputs take turns: together this many times the cache, but at most this many.
TIMES_THE_CACHE, MOST_COPIES = 4, 40


@dataclass(frozen=True)
class Sizes:
    """A model's widths, and the sizes of its cases.

    rows, kept: rows of a chunk, and how many are kept; suffix, asking: rows of the suffix, and how
    many vote; slots, layers: of a cache, as at a low level; siblings, chunks: chunks side by side,
    where rows are selected and elsewhere; stored: tokens of a text that was read.
    """

    model: str
    hidden: int
    heads: int
    key_heads: int
    dim: int
    feed_forward: int
    rows: int = 2048
    kept: int = 1024
    suffix: int = 100
    slots: int = 8192
    asking: int = 32
    layers: int = 8
    siblings: int = 32
    chunks: int = 8
    stored: int = 2**20


MODELS = (
    Sizes("Llama-2-7B", 4096, 32, 32, 128, 11008),
    Sizes("Llama-3-8B", 4096, 32, 8, 128, 14336),
)
# Small enough for Triton's interpreter to run in seconds.
TINY = (Sizes("tiny", 32, 2, 1, 16, 32, 16, 8, 2, 64, 2, 2, 2, 2, 300),)


@dataclass(frozen=True)
class Case:
    """An operation at a shape: a call for each system, and a check that ours is right."""

    op: str
    name: str
    systems: dict[str, Callable[[], object]]
    check: Callable[[], None]
    bytes: int
    flops: int = 0
    limit: str = "copy"
    counts_launches: bool = field(default=False, kw_only=True)


def random(*shape: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, dtype=DTYPE, device=DEVICE)


def whole(*shape: int) -> Tensor:
    """Small whole numbers, whose products and sums are exact."""
    return torch.randint(-3, 4, shape, device=DEVICE).to(DTYPE)


def some_rows(batch: int, rows: int, count: int) -> Tensor:
    """`count` ascending rows for each chunk of the batch."""
    return torch.rand(batch, rows, device=DEVICE).argsort(1)[:, :count].sort(1).values


def nbytes(*tensors: Tensor) -> int:
    """The bytes of all tensors together."""
    return sum(x.numel() * x.element_size() for x in tensors)


def same(actual: object, expected: object) -> None:
    """Check that tensors, or tuples of them, are equal."""
    pairs = (
        zip(actual, expected, strict=True) if isinstance(actual, tuple) else [(actual, expected)]
    )
    if not all(torch.equal(a, b) for a, b in pairs):
        raise ArithmeticError("the results differ")


def copies(draw: Callable[[], Case]) -> list[Case]:
    """A case over enough inputs that none is still in the cache when its turn comes again."""
    first = draw()
    cache = torch.cuda.get_device_properties(0).L2_cache_size if ON_GPU else 0
    count = math.ceil(TIMES_THE_CACHE * cache / first.bytes)
    return [first, *(draw() for _ in range(between(2, count, MOST_COPIES) - 1))]


def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Tensor:
    """PyTorch's causal attention with one backend, [B, H, T, D]."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def check_attention(*inputs: Tensor, rows: Tensor | None = None) -> None:
    """Check our attention of q, k and v against float32."""
    require_as_exact(
        kernels.causal_attention(*inputs, query_rows=rows),
        reference.causal_attention(*inputs, query_rows=rows),
        reference.causal_attention(*(x.float() for x in inputs), query_rows=rows),
    )


def all_rows_case(m: Sizes) -> Case:
    """Attention with all rows as queries."""
    q, k, v = (random(1, m.rows, n, m.dim) for n in (m.heads, m.key_heads, m.key_heads))
    return Case(
        "causal_attention",
        f"{m.model}, all rows",
        {"triton": lambda: kernels.causal_attention(q, k, v)}
        | {name: partial(sdpa, q, k, v, backend) for name, backend in BACKENDS.items()},
        partial(check_attention, q, k, v),
        nbytes(q, k, v, q),
        2 * m.rows * (m.rows + 1) * m.heads * m.dim,
        "matrix",
    )


def kept_rows_case(m: Sizes) -> Case:
    """Attention with half of the rows as queries."""
    q, k, v = (
        random(1, rows, n, m.dim)
        for rows, n in ((m.kept, m.heads), (m.rows, m.key_heads), (m.rows, m.key_heads))
    )
    at = some_rows(1, m.rows, m.kept)

    return Case(
        "causal_attention",
        f"{m.model}, half the rows",
        {
            "triton": lambda: kernels.causal_attention(q, k, v, query_rows=at),
            "torch": lambda: reference.causal_attention(q, k, v, query_rows=at),
        },
        partial(check_attention, q, k, v, rows=at),
        nbytes(q, k, v, q),
        4 * int((at + 1).sum()) * m.heads * m.dim,
        "matrix",
    )


def decoding_case(m: Sizes, batch: int) -> Case:
    """Attention of one query for each sequence, over a full cache."""
    q, k, v = (
        random(batch, rows, n, m.dim)
        for rows, n in ((1, m.heads), (2 * m.rows, m.key_heads), (2 * m.rows, m.key_heads))
    )
    at = torch.full((batch, 1), 2 * m.rows - 1, device=DEVICE)

    def plain() -> Tensor:
        turned = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(*turned, enable_gqa=True)

    return Case(
        "causal_attention",
        f"{m.model}, one row, batch {batch}",
        {"triton": lambda: kernels.causal_attention(q, k, v, query_rows=at), "torch": plain},
        partial(check_attention, q, k, v, rows=at),
        nbytes(k, v),
        4 * batch * 2 * m.rows * m.heads * m.dim,
    )


def selection_case(m: Sizes, batch: int) -> Case:
    """The paper's selection, of whole numbers: it must keep the same rows, ties included."""
    q, k = whole(batch, m.heads, m.dim), whole(batch, m.rows, m.key_heads, m.dim)
    positions = torch.arange(m.rows, device=DEVICE).expand(batch, -1)
    bias = torch.randint(-9, 10, (m.rows,), device=DEVICE).float()
    arguments = (q, k, positions, bias, m.kept - m.suffix, 0, m.rows - m.suffix)
    return Case(
        "score_and_select",
        f"{m.model}, batch {batch}",
        {
            "triton": partial(kernels.score_and_select, *arguments),
            "torch": partial(reference.score_and_select, *arguments),
        },
        lambda: same(kernels.score_and_select(*arguments), reference.score_and_select(*arguments)),
        nbytes(k),
        counts_launches=batch == 1,
    )


def voting_case(m: Sizes, batch: int) -> Case:
    """The selection by votes."""
    q, k = whole(batch, m.asking, m.heads, m.dim), whole(batch, m.rows, m.key_heads, m.dim)
    arguments = (q, k, k[0, :1], None, m.kept - m.suffix, 0, m.rows - m.suffix)
    return Case(
        "vote_and_select",
        f"{m.model}, batch {batch}",
        {
            "triton": partial(kernels.vote_and_select, *arguments, reach=REACH),
            "torch": partial(reference.vote_and_select, *arguments, reach=REACH),
        },
        partial(check_votes, *arguments),
        2 * nbytes(k),
        4 * batch * m.asking * m.rows * m.heads * m.dim,
        counts_launches=batch == 1,
    )


def stored_case(m: Sizes) -> Case:
    """The scores of a stored text of `m.stored` tokens: twelve heads over nine key heads, int8."""
    tokens, heads, key_heads = m.stored, 12, 9
    which = [head * key_heads // heads for head in range(heads)]
    q = torch.randn(m.asking, heads, m.dim, device=DEVICE).to(DTYPE)
    keys = torch.randint(-127, 128, (tokens, key_heads, m.dim), dtype=torch.int8, device=DEVICE)
    scales = torch.rand(tokens, key_heads, device=DEVICE).half() / 127
    weights = torch.full((heads,), 1 / heads, device=DEVICE)
    before = torch.zeros(m.asking, heads, device=DEVICE)
    starts = torch.arange(0, tokens, 20, device=DEVICE)
    arguments = (q, keys, scales, which, weights, before, starts)
    return Case(
        "score_units",
        f"{m.model}, {tokens:,} tokens",
        {
            "triton": partial(kernels.score_units, *arguments),
            "torch": partial(reference.score_units, *arguments),
        },
        lambda: torch.testing.assert_close(
            kernels.score_units(*arguments),
            reference.score_units(*arguments),
            atol=1e-6,
            rtol=1e-3,
        ),
        2 * nbytes(keys, scales),
        4 * m.asking * tokens * heads * m.dim,
    )


def check_votes(*arguments: Any) -> None:
    """Check that both give the rows the same votes and keep the rows with the most.

    Of rows whose votes are equal but for rounding, either may stay.
    """
    keep, last = arguments[4], arguments[6]
    call = {"logit": "logit", "reach": REACH}
    kept, _, votes = kernels.vote_and_select(*arguments, **call)
    expected, _, exact = reference.vote_and_select(*arguments, **call)
    rounding = 1e-5 * exact.abs().max().item()
    best = spread(exact[:, :last], REACH)
    lowest, lowest_expected = (best.gather(1, rows[:, :keep]).amin(1) for rows in (kept, expected))
    if (votes - exact).abs().max() > rounding or (lowest - lowest_expected).abs().max() > rounding:
        raise ArithmeticError("the votes or the kept rows differ")
