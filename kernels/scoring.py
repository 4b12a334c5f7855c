"""How much the chunk's last row attends to each row (HOMER, section 3.2); keys are read once.

    score[i] = max over heads of score(q_last · k_i / sqrt(D))

q_last: [B, HQ, D]; k: [B, T, HKV, D] -> [B, T]. Programs take blocks of rows; the last of a chunk's
programs to finish, known by a counter, sees all their logits and goes on with them: nobody waits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_scores, require
from .devices import launching_on, warp_size
from .scores import SCORES

# What the selection's packed counts hold, three or two to a word.
MAX_ROWS = 2**20
MAX_ROWS_IN_32_BITS = 2**15

# Threads of a program, elements of the key tile that it holds at a time, and rows that the last
# program takes at a time.
THREADS = 256
TILE = 16384
ROW_TILE = 2048


@triton.jit
def score_block(
    q_ptr,
    k_ptr,
    planes_ptr,
    scores_ptr,
    counter_ptr,
    scale,
    rows,
    dim,
    key_heads,
    stride_q_head,
    stride_k_row,
    stride_k_head,
    SCORE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write a block's logits to planes [HQ, T], or without planes its scores to scores [T].

    Returns whether this program is the last of its chunk's, and so sees what all others wrote.
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
            if planes_ptr is not None:
                ptrs = planes_ptr + query_heads[None, :] * rows + offs_n[:, None]
                tl.store(ptrs, logits, mask=mask_n[:, None] & mask_h[None, :])
            else:
                logits = tl.where(mask_h[None, :], logits, float("-inf"))
                best = tl.maximum(best, tl.max(logits, axis=1))
    if planes_ptr is None:
        tl.store(scores_ptr + offs_n, SCORE(best, 0.0), mask=mask_n)

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
    # Other programs wrote these: read past the first-level cache, which is blind to their stores.
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
def combine_planes(
    planes_ptr, scores_ptr, rows, planes, SCORE: tl.constexpr, BLOCK_T: tl.constexpr
):
    """Write the largest score over heads of each row to scores [T]."""
    offs_t = tl.arange(0, BLOCK_T)
    for plane in tl.range(0, planes):
        plane_ptr = planes_ptr + plane * rows
        log_total = _log_total(plane_ptr, rows, BLOCK_T)
        for first in tl.range(0, rows, BLOCK_T):
            row = first + offs_t
            mask = row < rows
            logits = tl.load(plane_ptr + row, mask=mask, other=0.0, cache_modifier=".cg")
            so_far = tl.load(
                scores_ptr + row, mask=row < rows * tl.minimum(plane, 1), other=float("-inf")
            )
            scores = tl.maximum(so_far, SCORE(logits, log_total))
            tl.store(scores_ptr + row, scores, mask=mask)
        tl.debug_barrier()


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
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    scores_ptr += batch * rows
    if planes_ptr is not None:
        planes_ptr += batch * key_heads * GROUP * rows
    is_last = score_block(
        q_ptr + batch * stride_q_batch,
        k_ptr + batch * stride_k_batch,
        planes_ptr,
        scores_ptr,
        counter_ptr + batch,
        scale,
        rows,
        dim,
        key_heads,
        stride_q_head,
        stride_k_row,
        stride_k_head,
        SCORE,
        GROUP,
        BLOCK_N,
        BLOCK_H,
        BLOCK_D,
    )
    if planes_ptr is not None and is_last:
        combine_planes(planes_ptr, scores_ptr, rows, key_heads * GROUP, SCORE, BLOCK_T)


def score_rows(q_last: Tensor, k: Tensor, score: str = "max_logit") -> Tensor:
    """How much the chunk's last row attends to each row, before calibration (HOMER, section 3.2).

    q_last: [B, HQ, D]; k: [B, T, HKV, D], T at most `MAX_ROWS`; score: a name in SCORES, applied to
    `q · k / sqrt(D)` of every query head (which reads its own group's key head). Returns [B, T]
    float32. Raises `ValueError` for arguments that do not fit together.
    """
    check_scores(q_last, k, score, tuple(SCORES))
    planes, scores, counters = new_scratch(q_last, k, score)
    sizes = scoring_sizes(q_last, k, score)
    with launching_on(k):
        _score_rows_kernel[scoring_grid(k, sizes)](
            q_last,
            k,
            planes,
            scores,
            counters,
            k.shape[3] ** -0.5,
            k.shape[1],
            k.shape[3],
            k.shape[2],
            *q_last.stride()[:2],
            *k.stride()[:3],
            **sizes,
        )
    return scores


def scoring_grid(k: Tensor, sizes: dict[str, Any]) -> tuple[int, int]:
    """Blocks of rows by chunks."""
    return triton.cdiv(k.shape[1], sizes["BLOCK_N"]), k.shape[0]


def scoring_sizes(q_last: Tensor, k: Tensor, score: str) -> dict[str, Any]:
    """What a scoring kernel is compiled for."""
    _, rows, key_heads, dim = k.shape
    require(rows <= MAX_ROWS, "the number of rows of k", rows, f"at most {MAX_ROWS} for Triton")
    block_d = triton.next_power_of_2(dim)
    block_n = min(max(triton.next_power_of_2(rows) // 128, 16), 64)
    block_h = max(1, min(triton.next_power_of_2(key_heads), TILE // (block_n * block_d)))
    return {
        "SCORE": SCORES[score].function,
        "GROUP": q_last.shape[1] // key_heads,
        "BLOCK_N": block_n,
        "BLOCK_H": block_h,
        "BLOCK_D": block_d,
        "BLOCK_T": min(triton.next_power_of_2(rows), ROW_TILE),
        "num_warps": THREADS // warp_size(k.device),
    }


def new_scratch(q_last: Tensor, k: Tensor, score: str) -> tuple[Tensor | None, Tensor, Tensor]:
    """Logits [B, HQ, T] where the score needs them all, scores [B, T], arrival counters [B]."""
    batch, rows = k.shape[:2]
    planes = None
    if SCORES[score].uses_total:
        shape = (batch, q_last.shape[1], rows)
        planes = torch.empty(shape, dtype=torch.float32, device=k.device)
    scores = torch.empty(batch, rows, dtype=torch.float32, device=k.device)
    return planes, scores, _arrival_counters(batch, k.device)


_counters: dict[tuple[torch.device, int], Tensor] = {}


def _arrival_counters(batch: int, device: torch.device) -> Tensor:
    """At least `batch` zeros. Every launch leaves them zero, so a stream's launches share them.

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
