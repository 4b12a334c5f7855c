"""What `bench/kernels.py` measures at a model's shapes: attention and selection."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from measure import require_as_exact
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from homer_triton import kernels
from homer_triton.kernels import reference
from homer_triton.kernels.reference import spread

ROWS, KEPT, SUFFIX, SLOTS, ASKING = 2048, 1024, 100, 8192, 32
DTYPE = torch.bfloat16
# name: hidden size, query heads, key heads, head dim, feed-forward size
MODELS = {
    "Llama-2-7B": (4096, 32, 32, 128, 11008),
    "Llama-3-8B": (4096, 32, 8, 128, 14336),
}
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Case:
    """An operation at a shape: a call for each system, and the check that ours is right."""

    op: str
    name: str
    systems: dict[str, Callable[[], object]]
    check: Callable[[], None]
    bytes: int
    flops: int = 0
    limit: str = "copy"
    counts_launches: bool = field(default=False, kw_only=True)


def random(*shape: int) -> Tensor:
    """Normal numbers on the GPU."""
    return torch.randn(shape, dtype=DTYPE, device="cuda")


def some_rows(batch: int, rows: int, count: int) -> Tensor:
    """`count` ascending rows for each of the batch."""
    return torch.rand(batch, rows, device="cuda").argsort(1)[:, :count].sort(1).values


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


def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Tensor:
    """PyTorch's causal attention by one backend, [B, H, T, D]."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def attention_cases(model: str) -> Iterator[Case]:
    """All rows as queries, and half of them."""
    _, heads, key_heads, dim, _ = MODELS[model]
    q = random(1, ROWS, heads, dim)
    k, v = random(1, ROWS, key_heads, dim), random(1, ROWS, key_heads, dim)
    at = some_rows(1, ROWS, KEPT)
    q_kept = q.take_along_dim(at[..., None, None], 1)
    wide_q, wide_k, wide_v = (x.float() for x in (q, k, v))

    def check_full() -> None:
        require_as_exact(
            kernels.causal_attention(q, k, v),
            reference.causal_attention(q, k, v),
            reference.causal_attention(wide_q, wide_k, wide_v),
        )

    def check_kept() -> None:
        require_as_exact(
            kernels.causal_attention(q_kept, k, v, query_rows=at),
            reference.causal_attention(q_kept, k, v, query_rows=at),
            reference.causal_attention(q_kept.float(), wide_k, wide_v, query_rows=at),
        )

    pairs = ROWS * (ROWS + 1) // 2
    yield Case(
        "causal_attention",
        f"{model}, all rows",
        {"triton": lambda: kernels.causal_attention(q, k, v)}
        | {name: partial(sdpa, q, k, v, backend) for name, backend in BACKENDS.items()},
        check_full,
        nbytes(q, k, v, q),
        4 * pairs * heads * dim,
        "matrix",
    )
    yield Case(
        "causal_attention",
        f"{model}, half the rows",
        {
            "triton": lambda: kernels.causal_attention(q_kept, k, v, query_rows=at),
            "torch": lambda: reference.causal_attention(q_kept, k, v, query_rows=at),
        },
        check_kept,
        nbytes(q_kept, k, v, q_kept),
        4 * int((at + 1).sum()) * heads * dim,
        "matrix",
    )


def check_selection(*arguments: Any) -> None:
    """Both must keep the same rows."""
    same(kernels.score_and_select(*arguments), reference.score_and_select(*arguments))


def selection_cases(model: str) -> Iterator[Case]:
    """One chunk, and 32 siblings."""
    _, heads, key_heads, dim, _ = MODELS[model]
    for batch in (1, 32):
        # Whole numbers: scores are exact, so the same rows must be kept, ties included.
        q = torch.randint(-3, 4, (batch, heads, dim), device="cuda").to(DTYPE)
        k = torch.randint(-3, 4, (batch, ROWS, key_heads, dim), device="cuda").to(DTYPE)
        positions = torch.arange(ROWS, device="cuda").expand(batch, -1)
        bias = torch.randint(-9, 10, (ROWS,), device="cuda").float()
        arguments = (q, k, positions, bias, KEPT - SUFFIX, 0, ROWS - SUFFIX)
        yield Case(
            "score_and_select",
            f"{model}, batch {batch}",
            {
                "triton": partial(kernels.score_and_select, *arguments),
                "torch": partial(reference.score_and_select, *arguments),
            },
            partial(check_selection, *arguments),
            nbytes(k),
            counts_launches=batch == 1,
        )
        asking = torch.randint(-3, 4, (batch, ASKING, heads, dim), device="cuda").to(DTYPE)
        voting = (asking, k, k[0, :1], None, KEPT - SUFFIX, 0, ROWS - SUFFIX)
        yield Case(
            "vote_and_select",
            f"{model}, batch {batch}",
            {
                "triton": partial(kernels.vote_and_select, *voting, reach=(15, 15)),
                "torch": partial(reference.vote_and_select, *voting, reach=(15, 15)),
            },
            partial(check_votes, *voting),
            2 * nbytes(k),
            4 * batch * ASKING * ROWS * heads * dim,
            counts_launches=batch == 1,
        )


def check_votes(*arguments: Any) -> None:
    """Both must give the rows the same votes, and keep what has the most of them: of votes that
    are equal but for rounding, either may stay.
    """
    reach, keep, last = (15, 15), arguments[4], arguments[6]
    call = {"logit": "logit", "reach": reach}
    kept, _, votes = kernels.vote_and_select(*arguments, **call)
    expected, _, exact = reference.vote_and_select(*arguments, **call)
    rounding = 1e-5 * exact.abs().max().item()
    best = spread(exact[:, :last], reach)
    lowest, lowest_expected = (best.gather(1, rows[:, :keep]).amin(1) for rows in (kept, expected))
    if (votes - exact).abs().max() > rounding or (lowest - lowest_expected).abs().max() > rounding:
        raise ArithmeticError("the votes or the kept rows differ")
