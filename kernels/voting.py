"""The rows that several asking rows attend to: scores, and the selection by them.

    score[i] = join over heads h of (w_h · mean over asking rows of f(q · k_i / sqrt(D)))

q: [B, A, HQ, D]; k: [B, T, HKV, D] -> [B, T]. Where f needs a softmax's total, one launch reads the
keys, `prefix ‖ chunk`, and leaves each block's part of it; the next reads them once more, joins the
parts, and scores. No [A, HQ, T] array is ever in memory. The last program of a chunk goes on to
select as in `kernels.selection`, by the best score of each row's neighbours.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_budget, check_scores, check_votes
from .devices import launching_on
from .scores import LOGITS
from .scoring import ROW_TILE, arrival_counters, arrive, check_rows
from .selection import counts_type, new_rows, rank_rows, write_rows

# Rows of a program, and parts of a total that are joined at a time.
BLOCK_ROWS = 32
BLOCK_PARTS = 16
# Below every logit, and a number: the difference of two infinities is none.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _load_queries(q_ptr, head, asking, dim, stride_q_row, stride_q_head, offs_a, offs_d):
    """The asking rows' queries of one head, [A, D]."""
    ptrs = q_ptr + head * stride_q_head + offs_a[:, None] * stride_q_row + offs_d[None, :]
    return tl.load(ptrs, mask=(offs_a < asking)[:, None] & (offs_d < dim)[None, :], other=0.0)


@triton.jit
def _load_keys(k_ptr, head, row, rows, dim, stride_k_row, stride_k_head, offs_d):
    """Some rows' keys of one head, transposed: [D, N]."""
    ptrs = k_ptr + head * stride_k_head + row.to(tl.int64)[None, :] * stride_k_row
    mask = (row < rows)[None, :] & (offs_d < dim)[:, None]
    return tl.load(ptrs + offs_d[:, None], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["prefix", "rows", "asking"])
def _totals_kernel(
    q_ptr,
    k_ptr,
    prefix_k_ptr,
    peaks_ptr,
    sums_ptr,
    scale,
    prefix,
    rows,
    asking,
    dim,
    stride_q_batch,
    stride_q_row,
    stride_q_head,
    stride_k_batch,
    stride_k_row,
    stride_k_head,
    stride_prefix_row,
    stride_prefix_head,
    GROUP: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write a block's largest logit and its exponentials' sum to parts [B, HQ, blocks, A]."""
    block, key_head = tl.program_id(0), tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    offs_a, offs_d = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_D)
    prefix_blocks = tl.cdiv(prefix, BLOCK_N)
    if block < prefix_blocks:
        row, end = block * BLOCK_N + tl.arange(0, BLOCK_N), prefix
        k = _load_keys(
            prefix_k_ptr, key_head, row, end, dim, stride_prefix_row, stride_prefix_head, offs_d
        )
    else:
        row, end = (block - prefix_blocks) * BLOCK_N + tl.arange(0, BLOCK_N), rows
        k_ptr += batch * stride_k_batch
        k = _load_keys(k_ptr, key_head, row, end, dim, stride_k_row, stride_k_head, offs_d)
    q_ptr += batch * stride_q_batch
    for member in tl.range(0, GROUP):
        head = key_head * GROUP + member
        q = _load_queries(q_ptr, head, asking, dim, stride_q_row, stride_q_head, offs_a, offs_d)
        logits = tl.dot(q, k, input_precision="ieee") * scale
        logits = tl.where((row < end)[None, :], logits, LOWEST)
        peak = tl.max(logits, axis=1)
        total = tl.sum(tl.exp(logits - peak[:, None]), axis=1)
        part = (batch * tl.num_programs(1) * GROUP + head) * tl.num_programs(0) + block
        tl.store(peaks_ptr + part * BLOCK_A + offs_a, peak)
        tl.store(sums_ptr + part * BLOCK_A + offs_a, total)


@triton.jit
def _log_totals(peaks_ptr, sums_ptr, blocks, offs_a, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr):
    """The logarithm [A] of a head's totals, from the blocks' parts [blocks, A]."""
    offs_b = tl.arange(0, BLOCK_B)
    peak = tl.full([BLOCK_B, BLOCK_A], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_B, BLOCK_A], tl.float32)
    for first in tl.range(0, blocks, BLOCK_B):
        block = first + offs_b
        places = block[:, None] * BLOCK_A + offs_a[None, :]
        mask = (block < blocks)[:, None]
        own = tl.load(peaks_ptr + places, mask=mask, other=LOWEST)
        part = tl.load(sums_ptr + places, mask=mask, other=0.0)
        larger = tl.maximum(peak, own)
        total = total * tl.exp(peak - larger) + part * tl.exp(own - larger)
        peak = larger
    largest = tl.max(peak, axis=0)
    return largest + tl.log(tl.sum(total * tl.exp(peak - largest[None, :]), axis=0))


@triton.jit(
    do_not_specialize=[
        *("rows", "blocks", "asking", "keep", "first_row", "last_row", "before", "behind")
    ]
)
def _votes_kernel(
    q_ptr,
    k_ptr,
    peaks_ptr,
    sums_ptr,
    weights_ptr,
    votes_ptr,
    scores_ptr,
    ranks_ptr,
    counter_ptr,
    kept_ptr,
    dropped_ptr,
    scale,
    rows,
    blocks,
    asking,
    dim,
    key_heads,
    keep,
    first_row,
    last_row,
    before,
    behind,
    stride_q_batch,
    stride_q_row,
    stride_q_head,
    stride_k_batch,
    stride_k_row,
    stride_k_head,
    stride_votes_batch,
    LOGIT: tl.constexpr,
    SUMS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """Write a block's scores to scores [T]; with ranks, the last program selects by them."""
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_a, offs_d = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_D)
    q_ptr += batch * stride_q_batch
    k_ptr += batch * stride_k_batch
    scores_ptr += batch * rows
    joined = tl.full([BLOCK_N], 0.0 if SUMS else float("-inf"), tl.float32)
    for key_head in tl.range(0, key_heads):
        k = _load_keys(k_ptr, key_head, row, rows, dim, stride_k_row, stride_k_head, offs_d)
        for member in tl.range(0, GROUP):
            head = key_head * GROUP + member
            q = _load_queries(q_ptr, head, asking, dim, stride_q_row, stride_q_head, offs_a, offs_d)
            values = tl.dot(q, k, input_precision="ieee") * scale
            if peaks_ptr is not None:
                parts = (batch * key_heads * GROUP + head) * blocks * BLOCK_A
                totals = _log_totals(
                    peaks_ptr + parts, sums_ptr + parts, blocks, offs_a, BLOCK_A, BLOCK_B
                )
                values = LOGIT(values, totals[:, None])
            else:
                values = LOGIT(values, 0.0)
            values = tl.where((offs_a < asking)[:, None], values, 0.0)
            mean = tl.sum(values, axis=0) / asking
            if weights_ptr is not None:
                mean *= tl.load(weights_ptr + head)
            if SUMS:
                joined += mean
            else:
                joined = tl.maximum(joined, mean, propagate_nan=tl.PropagateNan.ALL)
    if votes_ptr is not None:
        joined += tl.load(votes_ptr + batch * stride_votes_batch + row, mask=row < rows, other=0.0)
    tl.store(scores_ptr + row, joined, mask=row < rows)
    if ranks_ptr is not None:  # noqa: SIM102 - decided when it is compiled
        if arrive(counter_ptr + batch):
            ranks_ptr += batch * rows
            rank_rows(
                scores_ptr,
                ranks_ptr,
                None,
                None,
                rows,
                0,
                first_row,
                last_row,
                before,
                behind,
                BLOCK_T,
            )
            drop = last_row - first_row - keep
            kept_ptr += batch * (rows - drop)
            dropped_ptr += batch * drop
            write_rows(
                ranks_ptr, kept_ptr, dropped_ptr, rows, keep, first_row, last_row, COUNTS, BLOCK_T
            )


def score_rows(
    q: Tensor,
    k: Tensor,
    prefix_k: Tensor | None = None,
    logit: str = "logit",
    heads: str = "max",
    weights: Tensor | None = None,
) -> Tensor:
    """How much the asking rows attend to each row of their chunks.

    The module's score; f is "logit" (the logit itself), "log_softmax" or "softmax" over `prefix ‖
    chunk`, which asking rows see whole; heads joins by "max" or "sum". One asking row, "logit" and
    "max" are the paper's score (HOMER, section 3.2).

    q: [B, A, HQ, D], rotated queries of the chunk's last A rows (a query head reads its own group's
    key head); k: [B, T, HKV, D], rotated; prefix_k: [P, HKV, D], shared by the batch, or None;
    weights: w [HQ] float32, or None for 1. Returns [B, T] float32. Raises `ValueError` for
    arguments that do not fit together.
    """
    check_scores(q, k, prefix_k, logit, heads, weights)
    scores = torch.empty(k.shape[:2], dtype=torch.float32, device=k.device)
    _launch(q, k, prefix_k, logit, heads, weights, scores)
    return scores


def vote_and_select(
    q: Tensor,
    k: Tensor,
    prefix_k: Tensor | None,
    votes: Tensor | None,
    keep: int,
    first_row: int,
    last_row: int,
    logit: str = "softmax",
    heads: str = "sum",
    reach: tuple[int, int] = (0, 0),
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the `keep` rows of [first_row, last_row) whose neighbourhoods the asking rows attend to
    most, and every row outside that range.

    The significance of row i is the largest `score_rows(q, k, prefix_k, logit, heads, weights)[j] +
    votes[j]` of the rows j of that range whose neighbour i is, where NaN counts as the lowest; of
    equal ones the later row is kept.

    q: [B, A, HQ, D], rotated queries of the chunk's last A rows; k: [B, T, HKV, D], rotated, T at
    most `scoring.MAX_ROWS`; prefix_k: [P, HKV, D] or None; votes: [B, T] float32 that were given
    before, or None; reach: rows before and behind a row that are its neighbours; weights: of q's
    heads [HQ] float32, or None. Returns `(kept [B, T - dropped], dropped [B, dropped], scores [B,
    T])`: the first two ascending, the last with the votes, without neighbours. Raises `ValueError`
    for arguments that do not fit together.
    """
    check_scores(q, k, prefix_k, logit, heads, weights)
    check_budget(q, k, keep, first_row, last_row)
    check_votes(k, votes, reach)
    check_rows(k.shape[1])
    kept, dropped = new_rows(k, last_row - first_row - keep)
    scores, ranks = (
        torch.empty(k.shape[:2], dtype=torch.float32, device=k.device) for _ in range(2)
    )
    ends = (keep, first_row, last_row, *reach)
    _launch(q, k, prefix_k, logit, heads, weights, scores, votes, ranks, kept, dropped, ends)
    return kept, dropped, scores


def _launch(
    q: Tensor,
    k: Tensor,
    prefix_k: Tensor | None,
    logit: str,
    heads: str,
    weights: Tensor | None,
    scores: Tensor,
    votes: Tensor | None = None,
    ranks: Tensor | None = None,
    kept: Tensor | None = None,
    dropped: Tensor | None = None,
    ends: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0),
) -> None:
    """Fill scores [B, T]; with ranks [B, T], kept and dropped too. ends: keep, first_row, last_row
    and reach.
    """
    batch, asking, query_heads, dim = q.shape
    rows, key_heads = k.shape[1:3]
    prefix = 0 if prefix_k is None else len(prefix_k)
    if prefix_k is None or not prefix:
        prefix_k = k[0, :0]
    sizes: dict[str, Any] = {
        "GROUP": query_heads // key_heads,
        "BLOCK_A": max(16, triton.next_power_of_2(asking)),
        "BLOCK_N": BLOCK_ROWS,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
    }
    blocks = triton.cdiv(prefix, BLOCK_ROWS) + triton.cdiv(rows, BLOCK_ROWS)
    scale = dim**-0.5
    peaks = sums = None
    with launching_on(k):
        if LOGITS[logit].uses_total:
            parts = (batch, query_heads, blocks, sizes["BLOCK_A"])
            peaks, sums = (
                torch.empty(parts, dtype=torch.float32, device=k.device) for _ in range(2)
            )
            _totals_kernel[(blocks, key_heads, batch)](
                q,
                k,
                prefix_k,
                peaks,
                sums,
                scale,
                prefix,
                rows,
                asking,
                dim,
                *q.stride()[:3],
                *k.stride()[:3],
                *prefix_k.stride()[:2],
                **sizes,
            )
        _votes_kernel[(triton.cdiv(rows, BLOCK_ROWS), batch)](
            q,
            k,
            peaks,
            sums,
            weights,
            votes,
            scores,
            ranks,
            None if ranks is None else arrival_counters(batch, k.device),
            kept,
            dropped,
            scale,
            rows,
            blocks,
            asking,
            dim,
            key_heads,
            *ends,
            *q.stride()[:3],
            *k.stride()[:3],
            0 if votes is None else votes.stride(0),
            LOGIT=LOGITS[logit].function,
            SUMS=heads == "sum",
            BLOCK_B=BLOCK_PARTS,
            BLOCK_T=min(triton.next_power_of_2(rows), ROW_TILE),
            COUNTS=counts_type(rows),
            **sizes,
        )
