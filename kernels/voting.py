"""The rows that several asking rows attend to: scores, and the selection by them.

    score[i] = join over heads h of (w_h · mean over asking rows of f(q · k_i / sqrt(D)))

q: [B, A, HQ, D]; k: [B, T, HKV, D] -> [B, T]. Where f needs a softmax's total, one launch reads the
keys, `prefix ‖ chunk`, and its last programs join what each block makes of them; the next reads
them once more and scores, a few heads in a program. No [A, HQ, T] array is ever in memory. The last
program of a chunk joins its heads, and goes on to select as in `kernels.selection`, by the best
score of each row's neighbours.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_budget, check_scores, check_votes
from .devices import launching_on, warp_size
from .scores import LOGITS
from .scoring import ROW_TILE, arrival_counters, arrive, check_rows
from .selection import counts_type, new_rows, ranks_of, write_rows
from .tiles import tiles_of

# Parts of a total that are joined at a time.
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
    counter_ptr,
    totals_ptr,
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
    BLOCK_B: tl.constexpr,
):
    """Write a block's largest logit and its exponentials' sum to parts [B, HQ, blocks, A]; the last
    program of a key head joins them into logarithms of totals [B, HQ, A].
    """
    block, key_head = tl.program_id(0), tl.program_id(1)
    blocks, key_heads = tl.num_programs(0), tl.num_programs(1)
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
    first_head = (batch * key_heads + key_head) * GROUP
    for member in tl.range(0, GROUP):
        head = key_head * GROUP + member
        q = _load_queries(q_ptr, head, asking, dim, stride_q_row, stride_q_head, offs_a, offs_d)
        logits = tl.dot(q, k, input_precision="ieee") * scale
        logits = tl.where((row < end)[None, :], logits, LOWEST)
        peak = tl.max(logits, axis=1)
        total = tl.sum(tl.exp(logits - peak[:, None]), axis=1)
        part = (first_head + member) * blocks + block
        tl.store(peaks_ptr + part * BLOCK_A + offs_a, peak)
        tl.store(sums_ptr + part * BLOCK_A + offs_a, total)
    if arrive(counter_ptr + batch * key_heads + key_head, blocks):
        for member in tl.range(0, GROUP):
            parts = (first_head + member) * blocks * BLOCK_A
            totals = _log_totals(
                peaks_ptr + parts, sums_ptr + parts, blocks, offs_a, BLOCK_A, BLOCK_B
            )
            tl.store(totals_ptr + (first_head + member) * BLOCK_A + offs_a, totals)


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
        # Past the first-level cache, as all that other programs wrote.
        own = tl.load(peaks_ptr + places, mask=mask, other=LOWEST, cache_modifier=".cg")
        part = tl.load(sums_ptr + places, mask=mask, other=0.0, cache_modifier=".cg")
        larger = tl.maximum(peak, own)
        total = total * tl.exp(peak - larger) + part * tl.exp(own - larger)
        peak = larger
    largest = tl.max(peak, axis=0)
    return largest + tl.log(tl.sum(total * tl.exp(peak - largest[None, :]), axis=0))


@triton.jit
def _join(joined, scores, SUMS: tl.constexpr):
    """Scores joined with those of further heads."""
    if SUMS:
        joined += scores
    else:
        joined = tl.maximum(joined, scores, propagate_nan=tl.PropagateNan.ALL)
    return joined


@triton.jit(
    do_not_specialize=[
        *("rows", "asking", "keep", "first_row", "last_row", "before", "behind"),
        "stride_votes_batch",
    ],
    do_not_specialize_on_alignment=["votes_ptr"],
)
def _votes_kernel(
    q_ptr,
    k_ptr,
    totals_ptr,
    weights_ptr,
    votes_ptr,
    planes_ptr,
    scores_ptr,
    ranks_ptr,
    counter_ptr,
    kept_ptr,
    dropped_ptr,
    scale,
    rows,
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
    HEADS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """Write a block's scores by HEADS key heads to planes [B, heads / HEADS, T]; the last program
    of a chunk joins them into scores [B, T], and, where there are ranks, selects.
    """
    share, shares = tl.program_id(1), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_a, offs_d = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_D)
    q_ptr += batch * stride_q_batch
    k_ptr += batch * stride_k_batch
    planes_ptr += batch * shares * rows
    joined = tl.full([BLOCK_N], 0.0 if SUMS else float("-inf"), tl.float32)
    first_head = share * HEADS
    for key_head in tl.range(first_head, tl.minimum(first_head + HEADS, key_heads)):
        k = _load_keys(k_ptr, key_head, row, rows, dim, stride_k_row, stride_k_head, offs_d)
        for member in tl.range(0, GROUP):
            head = key_head * GROUP + member
            q = _load_queries(q_ptr, head, asking, dim, stride_q_row, stride_q_head, offs_a, offs_d)
            values = tl.dot(q, k, input_precision="ieee") * scale
            totals = tl.zeros([BLOCK_A], tl.float32)
            if totals_ptr is not None:
                totals = tl.load(totals_ptr + (batch * key_heads * GROUP + head) * BLOCK_A + offs_a)
            values = LOGIT(values, totals[:, None])
            values = tl.where((offs_a < asking)[:, None], values, 0.0)
            mean = tl.sum(values, axis=0) / asking
            if weights_ptr is not None:
                mean *= tl.load(weights_ptr + head)
            joined = _join(joined, mean, SUMS)
    tl.store(planes_ptr + share * rows + row, joined, mask=row < rows)
    if arrive(counter_ptr + batch, tl.num_programs(0) * shares):
        scores_ptr += batch * rows
        if votes_ptr is not None:
            votes_ptr += batch * stride_votes_batch
        _join_planes(planes_ptr, votes_ptr, scores_ptr, rows, shares, SUMS, BLOCK_T)
        if ranks_ptr is not None:
            ranks_ptr += batch * rows
            drop = last_row - first_row - keep
            _rank_by_neighbours(
                scores_ptr, ranks_ptr, rows, first_row, last_row, before, behind, BLOCK_T
            )
            write_rows(
                ranks_ptr,
                kept_ptr + batch * (rows - drop),
                dropped_ptr + batch * drop,
                rows,
                keep,
                first_row,
                last_row,
                COUNTS,
                BLOCK_T,
            )


@triton.jit
def _join_planes(
    planes_ptr, votes_ptr, scores_ptr, rows, shares, SUMS: tl.constexpr, BLOCK_T: tl.constexpr
):
    """Write the scores [T] that planes [shares, T] join to, with the votes given before."""
    offs_t = tl.arange(0, BLOCK_T)
    for first in tl.range(0, rows, BLOCK_T):
        row = first + offs_t
        mask = row < rows
        joined = tl.load(planes_ptr + row, mask=mask, other=0.0, cache_modifier=".cg")
        for share in tl.range(1, shares):
            plane = planes_ptr + share * rows
            more = tl.load(plane + row, mask=mask, other=0.0, cache_modifier=".cg")
            joined = _join(joined, more, SUMS)
        if votes_ptr is not None:
            joined += tl.load(votes_ptr + row, mask=mask, other=0.0)
        tl.store(scores_ptr + row, joined, mask=mask)
    tl.debug_barrier()


@triton.jit
def _rank_by_neighbours(
    scores_ptr, ranks_ptr, rows, first_row, last_row, before, behind, BLOCK_T: tl.constexpr
):
    """Write `ranks_of` the largest score of the rows that each row is a neighbour of."""
    offs_t = tl.arange(0, BLOCK_T)
    for first in tl.range(0, rows, BLOCK_T):
        row = first + offs_t
        best = tl.full([BLOCK_T], float("-inf"), tl.float32)
        for offset in tl.range(0, before + behind + 1, loop_unroll_factor=4):
            near = row + offset - behind
            mask = (near >= first_row) & (near < last_row)
            own = tl.load(scores_ptr + near, mask=mask, other=float("-inf"))
            best = tl.maximum(best, tl.where(own == own, own, float("-inf")))
        prunable = (row >= first_row) & (row < last_row)
        tl.store(ranks_ptr + row, ranks_of(best, prunable), mask=row < rows)
    tl.debug_barrier()


def score_rows(
    q: Tensor,
    k: Tensor,
    prefix_k: Tensor | None = None,
    logit: str = "logit",
    heads: str = "max",
    weights: Tensor | None = None,
) -> Tensor:
    """Score each row (token) of a chunk by the attention that the asking rows pay to it.

        score[i] = join over heads h of (w_h · mean over asking rows of f(q · k_i / sqrt(D)))

    One asking row with "logit" and "max" is the paper's score (HOMER, section 3.2). Several with
    "softmax" and "sum" are the votes of SnapKV (Li et al. 2024).

    Args:
        q: [B, A, HQ, D], rotated queries of the asking rows, the last A of the chunk. A query head
            reads the key head of its group.
        k: [B, T, HKV, D], rotated keys of all rows.
        prefix_k: [P, HKV, D], keys of the prefix, shared by the batch, or None.
        logit: f: "logit" (the logit itself), or its "log_softmax" or "softmax" over prefix and
            chunk, which the asking rows see whole.
        heads: How heads are joined: "max" or "sum".
        weights: w, [HQ] float32, or None for 1.

    Returns:
        [B, T] float32.

    Raises:
        ValueError: The arguments do not fit together, or no Triton kernel runs on their device and
            dtype.
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
    """Keep the rows (tokens) of a chunk whose neighbourhoods the asking rows attend to most.

    Of the rows [first_row, last_row), the `keep` most significant stay. All rows outside that range
    stay too. The significance of row i is the largest value of

        score_rows(q, k, prefix_k, logit, heads, weights)[j] + votes[j]

    over the rows j of the range that have i as their neighbour. NaN counts as the lowest. Of equal
    ones, the later row stays.

    Args:
        q: [B, A, HQ, D], rotated queries of the asking rows, the last A of the chunk.
        k: [B, T, HKV, D], rotated keys of all rows. T is at most `scoring.MAX_ROWS`.
        prefix_k: [P, HKV, D], keys of the prefix, or None.
        votes: [B, T] float32, scores from before to add, or None.
        keep: How many rows of the range stay.
        first_row: The first row of the range.
        last_row: The row after the range.
        logit: As in `score_rows`.
        heads: As in `score_rows`.
        reach: How many rows before and after a row are its neighbours, beside itself.
        weights: [HQ] float32, a weight for each query head, or None.

    Returns:
        The kept rows [B, T - dropped] and the dropped ones [B, dropped], int64, both ascending; and
        the scores with `votes` added, without neighbours, [B, T].

    Raises:
        ValueError: The arguments do not fit together, or no Triton kernel runs on their device and
            dtype.
    """
    check_scores(q, k, prefix_k, logit, heads, weights)
    check_budget(q, k, keep, first_row, last_row)
    check_votes(k, votes, reach)
    check_rows(k.shape[1])
    kept, dropped = new_rows(k, last_row - first_row - keep)
    scores = torch.empty(k.shape[:2], dtype=torch.float32, device=k.device)
    ranks = torch.empty(k.shape[:2], dtype=torch.int32, device=k.device)
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
    group = query_heads // key_heads
    # By a chunk's shape alone, so that its scores are the same beside others.
    tiles = tiles_of("voting", k.device)
    # Fewer in full precision, whose operands stand in registers.
    block_n = tiles["rows"] if k.element_size() == 2 else max(16, tiles["rows"] // 2)
    sizes: dict[str, Any] = {
        "GROUP": group,
        "BLOCK_A": max(16, triton.next_power_of_2(asking)),
        "BLOCK_N": block_n,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "num_warps": tiles["threads"] // warp_size(k.device),
    }
    heads_each = max(1, tiles["query_heads"] // group)
    shares = triton.cdiv(key_heads, heads_each)
    scale = dim**-0.5

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=k.device)

    totals = None
    with launching_on(k):
        if LOGITS[logit].uses_total:
            blocks = triton.cdiv(prefix, block_n) + triton.cdiv(rows, block_n)
            parts = (batch, query_heads, blocks, sizes["BLOCK_A"])
            totals = floats(batch, query_heads, sizes["BLOCK_A"])
            _totals_kernel[(blocks, key_heads, batch)](
                q,
                k,
                prefix_k,
                floats(*parts),
                floats(*parts),
                arrival_counters(batch * key_heads, k.device),
                totals,
                scale,
                prefix,
                rows,
                asking,
                dim,
                *q.stride()[:3],
                *k.stride()[:3],
                *prefix_k.stride()[:2],
                BLOCK_B=BLOCK_PARTS,
                **sizes,
            )
        _votes_kernel[(triton.cdiv(rows, block_n), shares, batch)](
            q,
            k,
            totals,
            weights,
            votes,
            floats(batch, shares, rows),
            scores,
            ranks,
            arrival_counters(batch, k.device),
            kept,
            dropped,
            scale,
            rows,
            asking,
            dim,
            key_heads,
            *ends,
            *q.stride()[:3],
            *k.stride()[:3],
            0 if votes is None else votes.stride(0),
            LOGIT=LOGITS[logit].function,
            SUMS=heads == "sum",
            HEADS=heads_each,
            BLOCK_T=min(triton.next_power_of_2(rows), ROW_TILE),
            COUNTS=counts_type(rows),
            **sizes,
        )
