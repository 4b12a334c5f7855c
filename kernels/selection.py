"""Scoring, calibration and the selection of the kept rows in one launch (HOMER, sections 3.2, 3.3).

    significance[i] = score[i] - bias[position_last - position_i]

Every program turns its rows' significances into integers of the same order. The last one of a chunk
descends from their highest bits to a threshold that `keep` of them reach, and finds the output rows
by a prefix sum.
Sizes are those of `kernels.scoring`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_bias, check_selection
from .devices import launching_on
from .scoring import (
    MAX_ROWS_IN_32_BITS,
    arrival_counters,
    arrive,
    best_scores,
    scoring_grid,
    scoring_sizes,
)


@triton.jit
def ranks_of(significances, prunable):
    """The bits of uint32 ranks that order as the significances do, NaN as -inf. Rows that are not
    prunable get the smallest rank, 0, which no number has.
    """
    bits = tl.where(significances == significances, significances, float("-inf"))
    # Negative floats have all bits flipped, others only the sign; both zeros rank alike.
    bits = tl.where(bits == 0, 0.0, bits).to(tl.int32, bitcast=True)
    return tl.where(prunable, bits ^ ((bits >> 31) | -2147483648), 0)


@triton.jit
def _load_ranks(ranks_ptr, row, rows):
    """The ranks of some rows, 0 past the end."""
    # Other programs wrote these: read past the first-level cache, blind to their stores.
    bits = tl.load(ranks_ptr + row, mask=row < rows, other=0, cache_modifier=".cg")
    return bits.to(tl.uint32, bitcast=True)


@triton.jit
def _threshold(first_ranks, ranks_ptr, rows, keep, prunable_rows, COUNTS, BLOCK_T: tl.constexpr):
    """A uint32 that at least `keep` ranks reach, and how many do; the largest, unless one is found
    before that just `keep` reach. Each pass leaves a third of where it can be: two counts fit into
    a word, whose sum over a warp is one instruction.

    first_ranks: those of the first BLOCK_T rows, which stay in registers.
    """
    half: tl.constexpr = COUNTS.primitive_bitwidth // 2
    offs_t = tl.arange(0, BLOCK_T)
    low, high = tl.full([], 0, tl.uint32), tl.full([], 0xFFFFFFFF, tl.uint32)
    count = prunable_rows.to(COUNTS)
    while (low < high) & (count != keep):
        one = low + (high - low) // 3 + 1
        two = one + (high - one + 1) // 2
        reached = (first_ranks >= one).to(COUNTS) + ((first_ranks >= two).to(COUNTS) << half)
        for first in tl.range(BLOCK_T, rows, BLOCK_T):
            ranks = _load_ranks(ranks_ptr, first + offs_t, rows)
            reached += (ranks >= one).to(COUNTS) + ((ranks >= two).to(COUNTS) << half)
        counts = tl.sum(reached, axis=0)
        reach_one, reach_two = counts & ((1 << half) - 1), counts >> half
        high = tl.where(reach_two >= keep, high, tl.where(reach_one >= keep, two, one) - 1)
        low = tl.where(reach_two >= keep, two, tl.where(reach_one >= keep, one, low))
        count = tl.where(
            reach_two >= keep, reach_two, tl.where(reach_one >= keep, reach_one, count)
        )
    return low, count


@triton.jit
def _write_tile(
    ranks,
    row,
    done,
    threshold,
    surplus,
    kept_ptr,
    dropped_ptr,
    rows,
    keep,
    first_row,
    last_row,
    COUNTS: tl.constexpr,
):
    """Write some rows to where they go; returns flags of those whose ranks are above the threshold,
    and in the high half of those whose ranks are equal to it. done: how many are before them.
    """
    half: tl.constexpr = COUNTS.primitive_bitwidth // 2
    low_half: tl.constexpr = (1 << half) - 1
    prunable = (row >= first_row) & (row < last_row)
    is_above = prunable & (ranks > threshold)
    is_tie = prunable & (ranks == threshold)
    flags = is_above.to(COUNTS) + (is_tie.to(COUNTS) << half)
    before = done + tl.cumsum(flags, axis=0) - flags
    ties_before = (before >> half) & low_half
    is_selected = is_above | (is_tie & (ties_before >= surplus))
    selected_before = (before & low_half) + tl.maximum(ties_before - surplus, 0)

    after = tl.where(row < first_row, row, row - (last_row - first_row - keep))
    target = tl.where(prunable, first_row + selected_before, after)
    is_kept = (row < rows) & (is_selected | (prunable == 0))
    wide = row.to(tl.int64)
    tl.store(kept_ptr + target, wide, mask=is_kept)
    target = row - first_row - selected_before
    tl.store(dropped_ptr + target, wide, mask=prunable & (is_selected == 0))
    return flags


@triton.jit
def write_rows(
    ranks_ptr,
    kept_ptr,
    dropped_ptr,
    rows,
    keep,
    first_row,
    last_row,
    COUNTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Write the kept rows and the dropped ones, ascending; of equal ranks, later rows are kept.

    COUNTS: an integer type whose halves hold a number of rows each.
    """
    row = tl.arange(0, BLOCK_T)
    ranks = _load_ranks(ranks_ptr, row, rows)
    threshold, count = _threshold(
        ranks, ranks_ptr, rows, keep, last_row - first_row, COUNTS, BLOCK_T
    )
    surplus, done = count - keep, tl.full([], 0, COUNTS)
    flags = _write_tile(
        ranks,
        row,
        done,
        threshold,
        surplus,
        kept_ptr,
        dropped_ptr,
        rows,
        keep,
        first_row,
        last_row,
        COUNTS,
    )
    for first in tl.range(BLOCK_T, rows, BLOCK_T):
        done += tl.sum(flags, axis=0)
        flags = _write_tile(
            _load_ranks(ranks_ptr, first + row, rows),
            first + row,
            done,
            threshold,
            surplus,
            kept_ptr,
            dropped_ptr,
            rows,
            keep,
            first_row,
            last_row,
            COUNTS,
        )


@triton.jit(
    do_not_specialize=[
        *("rows", "distances", "keep", "first_row", "last_row", "stride_positions_batch")
    ],
    do_not_specialize_on_alignment=["positions_ptr"],
)
def _score_and_select_kernel(
    q_ptr,
    k_ptr,
    positions_ptr,
    bias_ptr,
    ranks_ptr,
    counter_ptr,
    kept_ptr,
    dropped_ptr,
    scale,
    rows,
    dim,
    key_heads,
    distances,
    keep,
    first_row,
    last_row,
    stride_q_batch,
    stride_q_head,
    stride_k_batch,
    stride_k_row,
    stride_k_head,
    stride_positions_batch,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    COUNTS: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    prunable = (row >= first_row) & (row < last_row)
    bias = tl.zeros([BLOCK_N], tl.float32)
    if bias_ptr is not None:  # asked for before the keys, it comes while they do
        positions_ptr += batch * stride_positions_batch
        positions = tl.load(positions_ptr + row, mask=prunable, other=0)
        distance = tl.load(positions_ptr + rows - 1) - positions
        # Kept inside the bias whatever the positions are: a bad address would end the process.
        distance = tl.minimum(tl.maximum(distance, 0), distances - 1)
        bias = tl.load(bias_ptr + distance, mask=prunable, other=0.0)
    scores = best_scores(
        q_ptr + batch * stride_q_batch,
        k_ptr + batch * stride_k_batch,
        row,
        scale,
        rows,
        dim,
        key_heads,
        stride_q_head,
        stride_k_row,
        stride_k_head,
        GROUP,
        BLOCK_N,
        BLOCK_H,
        BLOCK_D,
    )
    ranks_ptr += batch * rows
    tl.store(ranks_ptr + row, ranks_of(scores - bias, prunable), mask=row < rows)
    if arrive(counter_ptr + batch, tl.num_programs(0)):
        drop = last_row - first_row - keep
        kept_ptr += batch * (rows - drop)
        dropped_ptr += batch * drop
        write_rows(
            ranks_ptr, kept_ptr, dropped_ptr, rows, keep, first_row, last_row, COUNTS, BLOCK_T
        )


def score_and_select(
    q_last: Tensor,
    k: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    keep: int,
    first_row: int,
    last_row: int,
) -> tuple[Tensor, Tensor]:
    """Keep the rows (tokens) of a chunk that its last row attends to most: the paper's selection.

    Of the rows [first_row, last_row), the `keep` most significant stay. All rows outside that range
    stay too. The significance of row i (HOMER, sections 3.2 and 3.3) is

        score_rows(q_last[:, None], k)[i] - bias[positions[-1] - positions[i]]

    NaN counts as the lowest. Of equal ones, the later row stays.

    Args:
        q_last: [B, HQ, D], rotated query of the last row.
        k: [B, T, HKV, D], rotated keys of all rows. T is at most `scoring.MAX_ROWS`.
        positions: [B, T] int64, RoPE positions.
        bias: [distances] float32, the calibration of this layer, longer than the largest distance;
            or None. On a GPU its length is not checked: a larger distance reads its last entry.
        keep: How many rows of the range stay.
        first_row: The first row of the range.
        last_row: The row after the range.

    Returns:
        The kept rows [B, T - dropped] and the dropped ones [B, dropped], int64, both ascending.

    Raises:
        ValueError: The arguments do not fit together, or no Triton kernel runs on their device and
            dtype.
    """
    check_selection(q_last[:, None], k, keep, first_row, last_row)
    check_bias(k, positions, bias, first_row, last_row)
    batch, rows = k.shape[:2]
    kept, dropped = new_rows(k, last_row - first_row - keep)
    ranks = torch.empty(batch, rows, dtype=torch.int32, device=k.device)
    sizes = scoring_sizes(q_last, k)
    with launching_on(k):
        _score_and_select_kernel[scoring_grid(k, sizes)](
            q_last,
            k,
            positions,
            bias,
            ranks,
            arrival_counters(batch, k.device),
            kept,
            dropped,
            k.shape[3] ** -0.5,
            rows,
            k.shape[3],
            k.shape[2],
            0 if bias is None else len(bias),
            keep,
            first_row,
            last_row,
            *q_last.stride()[:2],
            *k.stride()[:3],
            positions.stride(0),
            COUNTS=counts_type(rows),
            **sizes,
        )
    return kept, dropped


def new_rows(k: Tensor, drop: int) -> tuple[Tensor, Tensor]:
    """Room for the kept and the dropped of k's rows."""
    batch, rows = k.shape[:2]
    kept = torch.empty(batch, rows - drop, dtype=torch.int64, device=k.device)
    return kept, torch.empty(batch, drop, dtype=torch.int64, device=k.device)


def counts_type(rows: int) -> tl.dtype:
    """What `write_rows` counts in."""
    return tl.int32 if rows <= MAX_ROWS_IN_32_BITS else tl.int64
