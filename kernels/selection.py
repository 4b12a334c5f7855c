"""Scoring, calibration and the selection of the kept rows in one launch (HOMER, sections 3.2 and 3.3).

    significance[i] = max over heads of score(q_last · k_i / sqrt(D)) - bias[position_last - position_i]

q_last: [B, HQ, D]; k: [B, T, HKV, D], read once. Programs score blocks of rows; the last of a chunk's programs to
finish, known by a counter, selects: nobody waits. The selection is a radix descent to the `keep`-th largest
significance over order-preserving integer keys, then one prefix sum for the output rows. All T scores are one register tile.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_scores, check_selection, require
from .devices import launching_on, warp_size
from .scores import SCORES

MAX_ROWS = 32768

# Threads of a program that share a row's keys, and the elements of the key tile that each holds.
THREADS_PER_ROW = 16
TILE_PER_THREAD = 64


@triton.jit
def _score_block(
    q_ptr,
    k_ptr,
    planes_ptr,
    counter_ptr,
    scale,
    rows,
    dim,
    key_heads,
    stride_q_head,
    stride_k_row,
    stride_k_head,
    GROUP: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write a block's logits to planes [PLANES, T]: one per head, or one of the largest over heads.

    Returns whether this program is the last of its chunk's, and so sees all the others' logits.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_h, offs_d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    mask_n, mask_d = offs_n < rows, offs_d < dim
    k_rows = k_ptr + offs_n.to(tl.int64) * stride_k_row
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for first_head in tl.range(0, key_heads, BLOCK_H):
        heads = first_head + offs_h
        mask_h = heads < key_heads
        k_ptrs = k_rows[:, None, None] + (heads * stride_k_head)[None, :, None]
        mask_k = mask_n[:, None, None] & mask_h[None, :, None] & mask_d[None, None, :]
        k = tl.load(k_ptrs + offs_d[None, None, :], mask=mask_k, other=0.0).to(tl.float32)
        for member in tl.range(0, GROUP):
            query_heads = heads * GROUP + member
            q_ptrs = q_ptr + (query_heads * stride_q_head)[:, None]
            mask_q = mask_h[:, None] & mask_d[None, :]
            q = tl.load(q_ptrs + offs_d[None, :], mask=mask_q, other=0.0).to(tl.float32)
            logits = tl.sum(k * q[None, :, :], axis=2) * scale
            if PLANES == 1:
                logits = tl.where(mask_h[None, :], logits, float("-inf"))
                best = tl.maximum(best, tl.max(logits, axis=1))
            else:
                ptrs = planes_ptr + query_heads[None, :] * rows + offs_n[:, None]
                tl.store(ptrs, logits, mask=mask_n[:, None] & mask_h[None, :])
    if PLANES == 1:
        tl.store(planes_ptr + offs_n, best, mask=mask_n)

    # All of this program's stores come before its count, all of the others' before the last count.
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    is_last = arrived == tl.num_programs(0) - 1
    # Ready for the next launch, or the next replay of a captured graph.
    tl.store(counter_ptr, 0, mask=is_last)
    return is_last


@triton.jit
def _log_total(plane_ptr, rows, BLOCK_T: tl.constexpr):
    """The logarithm of the sum of the exponentials of one head's logits over all rows."""
    offs_t = tl.arange(0, BLOCK_T)
    peak = tl.full([BLOCK_T], float("-inf"), tl.float32)
    for first in tl.range(0, rows, BLOCK_T):
        row = first + offs_t
        logits = tl.load(
            plane_ptr + row, mask=row < rows, other=float("-inf"), cache_modifier=".cg"
        )
        peak = tl.maximum(peak, logits)
    largest = tl.max(peak, axis=0)
    total = tl.zeros([BLOCK_T], tl.float32)
    for first in tl.range(0, rows, BLOCK_T):
        row = first + offs_t
        logits = tl.load(
            plane_ptr + row, mask=row < rows, other=float("-inf"), cache_modifier=".cg"
        )
        total += tl.exp(logits - largest)
    return largest + tl.log(tl.sum(total, axis=0))


@triton.jit
def _combine_planes(
    planes_ptr, scores_ptr, rows, SCORE: tl.constexpr, PLANES: tl.constexpr, BLOCK_T: tl.constexpr
):
    """Write the largest score over heads of each row to scores [T]."""
    offs_t = tl.arange(0, BLOCK_T)
    for plane in tl.range(0, PLANES):
        plane_ptr = planes_ptr + plane * rows
        log_total = 0.0
        if PLANES > 1:
            log_total = _log_total(plane_ptr, rows, BLOCK_T)
        for first in tl.range(0, rows, BLOCK_T):
            row = first + offs_t
            mask = row < rows
            # Other programs wrote these: read past the first-level cache, blind to their stores.
            logits = tl.load(plane_ptr + row, mask=mask, other=0.0, cache_modifier=".cg")
            scores = SCORE(logits, log_total)
            if PLANES > 1:
                so_far = tl.load(scores_ptr + row, mask=mask & (plane > 0), other=float("-inf"))
                scores = tl.maximum(scores, so_far)
            tl.store(scores_ptr + row, scores, mask=mask)
    tl.debug_barrier()


@triton.jit
def _rank_rows_(
    scores_ptr,
    positions_ptr,
    bias_ptr,
    rows,
    distances,
    first_row,
    last_row,
    BLOCK_T: tl.constexpr,
):
    """Replace the prunable rows' scores, in place, by uint32 that order as their significance does.

    Returns nothing; rows that are not prunable get the smallest rank, 0, which no number has.
    """
    offs_t = tl.arange(0, BLOCK_T)
    for first in tl.range(0, rows, BLOCK_T):
        row = first + offs_t
        prunable = (row >= first_row) & (row < last_row)
        scores = tl.load(scores_ptr + row, mask=prunable, other=0.0)
        if bias_ptr is not None:
            positions = tl.load(positions_ptr + row, mask=prunable, other=0)
            distance = tl.load(positions_ptr + rows - 1) - positions
            # Kept inside the bias whatever the positions are: a bad address would end the process.
            distance = tl.minimum(tl.maximum(distance, 0), distances - 1)
            scores -= tl.load(bias_ptr + distance, mask=prunable, other=0.0)
        # Negative floats have all bits flipped, others only the sign; both zeros rank alike.
        bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)
        ranks = tl.where(prunable, bits ^ ((bits >> 31) | -2147483648), 0)
        tl.store(scores_ptr + row, ranks.to(tl.float32, bitcast=True), mask=row < rows)
    tl.debug_barrier()


@triton.jit
def _load_ranks(ranks_ptr, row, rows):
    bits = tl.load(ranks_ptr + row, mask=row < rows, other=0.0)
    return bits.to(tl.uint32, bitcast=True)


@triton.jit
def _threshold(ranks_ptr, rows, keep, BLOCK_T: tl.constexpr):
    """The largest uint32 that at least `keep` ranks reach, found two bits at a time."""
    offs_t = tl.arange(0, BLOCK_T)
    threshold = tl.full([], 0, tl.uint32)
    quarter = tl.full([], 1 << 30, tl.uint32)
    for _ in tl.range(0, 16):
        # Three counts in one reduction: each is at most 2^15, so 21 bits apart they never meet.
        reached = tl.zeros([BLOCK_T], tl.int64)
        for first in tl.range(0, rows, BLOCK_T):
            ranks = _load_ranks(ranks_ptr, first + offs_t, rows)
            reached += (ranks >= threshold + quarter).to(tl.int64)
            reached += (ranks >= threshold + 2 * quarter).to(tl.int64) << 21
            reached += (ranks >= threshold + 3 * quarter).to(tl.int64) << 42
        counts = tl.sum(reached, axis=0)
        quarters = ((counts & 0x1FFFFF) >= keep).to(tl.uint32)
        quarters += (((counts >> 21) & 0x1FFFFF) >= keep).to(tl.uint32)
        quarters += ((counts >> 42) >= keep).to(tl.uint32)
        threshold += quarters * quarter
        quarter >>= 2
    return threshold


@triton.jit
def _write_rows(
    ranks_ptr,
    kept_ptr,
    dropped_ptr,
    rows,
    keep,
    first_row,
    last_row,
    BLOCK_T: tl.constexpr,
):
    """Write the kept rows and the dropped ones, ascending; of equal ranks the later rows are kept."""
    offs_t = tl.arange(0, BLOCK_T)
    threshold = _threshold(ranks_ptr, rows, keep, BLOCK_T)
    # How many ranks are above the threshold, and in the high half how many are equal to it.
    counts = tl.zeros([BLOCK_T], tl.int32)
    for first in tl.range(0, rows, BLOCK_T):
        row = first + offs_t
        ranks = _load_ranks(ranks_ptr, row, rows)
        prunable = (row >= first_row) & (row < last_row)
        counts += (prunable & (ranks > threshold)).to(tl.int32)
        counts += (prunable & (ranks == threshold)).to(tl.int32) << 16
    total = tl.sum(counts, axis=0)
    surplus = ((total >> 16) & 0xFFFF) + (total & 0xFFFF) - keep

    drop = last_row - first_row - keep
    done = tl.full([], 0, tl.int32)
    for first in tl.range(0, rows, BLOCK_T):
        row = first + offs_t
        ranks = _load_ranks(ranks_ptr, row, rows)
        prunable = (row >= first_row) & (row < last_row)
        is_above = prunable & (ranks > threshold)
        is_tie = prunable & (ranks == threshold)
        flags = is_above.to(tl.int32) + (is_tie.to(tl.int32) << 16)
        before = done + tl.cumsum(flags, axis=0) - flags
        done += tl.sum(flags, axis=0)
        ties_before = (before >> 16) & 0xFFFF
        is_selected = is_above | (is_tie & (ties_before >= surplus))
        selected_before = (before & 0xFFFF) + tl.maximum(ties_before - surplus, 0)

        after = tl.where(row < first_row, row, row - drop)
        target = tl.where(prunable, first_row + selected_before, after)
        is_kept = (row < rows) & (is_selected | (prunable == 0))
        wide = row.to(tl.int64)
        tl.store(kept_ptr + target, wide, mask=is_kept)
        target = row - first_row - selected_before
        tl.store(dropped_ptr + target, wide, mask=prunable & (is_selected == 0))


@triton.jit(do_not_specialize=["rows"])
def _score_rows_kernel(
    q_ptr,
    k_ptr,
    planes_ptr,
    scores_ptr,
    counter_ptr,
    scale,
    rows,
    dim,
    key_heads,
    stride_q_batch,
    stride_q_head,
    stride_k_batch,
    stride_k_row,
    stride_k_head,
    SCORE: tl.constexpr,
    GROUP: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    planes_ptr += batch * PLANES * rows
    is_last = _score_block(
        q_ptr + batch * stride_q_batch,
        k_ptr + batch * stride_k_batch,
        planes_ptr,
        counter_ptr + batch,
        scale,
        rows,
        dim,
        key_heads,
        stride_q_head,
        stride_k_row,
        stride_k_head,
        GROUP,
        PLANES,
        BLOCK_N,
        BLOCK_H,
        BLOCK_D,
    )
    if is_last:
        _combine_planes(planes_ptr, scores_ptr + batch * rows, rows, SCORE, PLANES, BLOCK_T)


@triton.jit(do_not_specialize=["rows", "distances", "keep", "first_row", "last_row"])
def _score_and_select_kernel(
    q_ptr,
    k_ptr,
    positions_ptr,
    bias_ptr,
    planes_ptr,
    scores_ptr,
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
    SCORE: tl.constexpr,
    GROUP: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    planes_ptr += batch * PLANES * rows
    is_last = _score_block(
        q_ptr + batch * stride_q_batch,
        k_ptr + batch * stride_k_batch,
        planes_ptr,
        counter_ptr + batch,
        scale,
        rows,
        dim,
        key_heads,
        stride_q_head,
        stride_k_row,
        stride_k_head,
        GROUP,
        PLANES,
        BLOCK_N,
        BLOCK_H,
        BLOCK_D,
    )
    if is_last:
        scores_ptr += batch * rows
        _combine_planes(planes_ptr, scores_ptr, rows, SCORE, PLANES, BLOCK_T)
        positions_ptr += batch * stride_positions_batch
        _rank_rows_(
            scores_ptr, positions_ptr, bias_ptr, rows, distances, first_row, last_row, BLOCK_T
        )
        drop = last_row - first_row - keep
        kept_ptr += batch * (rows - drop)
        dropped_ptr += batch * drop
        _write_rows(scores_ptr, kept_ptr, dropped_ptr, rows, keep, first_row, last_row, BLOCK_T)


def score_rows(q_last: Tensor, k: Tensor, score: str = "max_logit") -> Tensor:
    """How much the chunk's last row attends to each row, before calibration (HOMER, section 3.2).

    q_last: [B, HQ, D]; k: [B, T, HKV, D], T at most `MAX_ROWS`; score: a name in SCORES, applied to `q · k / sqrt(D)` of
    every query head (which reads its own group's key head). Returns [B, T] float32. Raises `ValueError` for arguments
    that do not fit together.
    """
    check_scores(q_last, k, score, tuple(SCORES))
    out = torch.empty(k.shape[:2], dtype=torch.float32, device=k.device)
    planes, counter, sizes = _scratch(k, q_last.shape[1], score)
    with launching_on(k):
        _score_rows_kernel[_grid(k, sizes)](
            q_last,
            k,
            planes,
            counter,
            out,
            k.shape[3] ** -0.5,
            k.shape[1],
            k.shape[3],
            k.shape[2],
            *q_last.stride()[:2],
            *k.stride()[:3],
            **sizes,
        )
    return out


def score_and_select(
    q_last: Tensor,
    k: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    keep: int,
    first_row: int,
    last_row: int,
    score: str = "max_logit",
) -> tuple[Tensor, Tensor]:
    """Keep the `keep` most significant of the rows [first_row, last_row), and every row outside that range.

    The significance of row i is `score_rows(...)[i] - bias[positions[-1] - positions[i]]`; of equal ones the later row
    is kept (HOMER, sections 3.2 and 3.3).

    q_last: [B, HQ, D], the last row's rotated query; k: [B, T, HKV, D], rotated, T at most `MAX_ROWS`; positions: [B, T];
    bias: [distances] float32, longer than the largest distance, or None. Returns `(kept [B, T - dropped], dropped
    [B, dropped])`, both ascending. Raises `ValueError` for arguments that do not fit together; see
    `checks.check_selection` for what of a bias can be checked on a GPU.
    """
    check_scores(q_last, k, score, tuple(SCORES))
    check_selection(k, positions, bias, keep, first_row, last_row)
    batch, rows = k.shape[:2]
    drop = last_row - first_row - keep
    kept = torch.empty(batch, rows - drop, dtype=torch.int64, device=k.device)
    dropped = torch.empty(batch, drop, dtype=torch.int64, device=k.device)
    planes, counter, sizes = _scratch(k, q_last.shape[1], score)
    with launching_on(k):
        _score_and_select_kernel[_grid(k, sizes)](
            q_last,
            k,
            positions,
            bias,
            planes,
            counter,
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
            **sizes,
        )
    return kept, dropped


def _grid(k: Tensor, sizes: dict[str, Any]) -> tuple[int, int]:
    return triton.cdiv(k.shape[1], sizes["BLOCK_N"]), k.shape[0]


def _scratch(k: Tensor, query_heads: int, score: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The logits' planes [B, PLANES, T], the arrival counters [B] at zero, and the kernel's compile-time sizes."""
    batch, rows, key_heads, dim = k.shape
    require(rows <= MAX_ROWS, "the number of rows of k", rows, f"at most {MAX_ROWS} for Triton")
    planes = query_heads if SCORES[score].needs_whole_head else 1
    block_d, block_t = triton.next_power_of_2(dim), triton.next_power_of_2(rows)
    threads = min(max(block_t // 32, 256), 1024)
    block_n, tile = threads // THREADS_PER_ROW, threads * TILE_PER_THREAD
    sizes: dict[str, Any] = {
        "SCORE": SCORES[score].function,
        "GROUP": query_heads // key_heads,
        "PLANES": planes,
        "BLOCK_N": block_n,
        "BLOCK_H": max(1, min(triton.next_power_of_2(key_heads), tile // (block_n * block_d))),
        "BLOCK_D": block_d,
        "BLOCK_T": block_t,
        "num_warps": threads // warp_size(k.device),
    }
    scratch = torch.empty(batch, planes, rows, dtype=torch.float32, device=k.device)
    return scratch, _arrival_counters(batch, k.device), sizes


_counters: dict[tuple[torch.device, int], Tensor] = {}


def _arrival_counters(batch: int, device: torch.device) -> Tensor:
    """At least `batch` zeros; every launch leaves them zero, so a stream's launches share them without clearing.

    A graph is given its own, cleared in the graph: it may be replayed beside anything.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(batch, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    counters = _counters.get((device, stream))
    if counters is None or len(counters) < batch:
        counters = torch.zeros(max(batch, 64), dtype=torch.int32, device=device)
        _counters[device, stream] = counters
    return counters
