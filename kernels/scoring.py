"""How much the chunk's last row attends to each row (HOMER, section 3.2); keys are read once.

    score[i] = max over heads of (q_last · k_i / sqrt(D))

q_last: [B, HQ, D]; k: [B, T, HKV, D] -> [B, T]. Programs take blocks of rows; the last of a chunk's
programs to finish, known by a counter, sees what all have written and goes on with it: nobody
waits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import require
from .devices import warp_size
from .tiles import tiles_of

# What the selection counts, and what two counts to a signed word of 32 bits hold.
MAX_ROWS = 2**20
MAX_ROWS_IN_32_BITS = 2**15 - 1

# Rows that the last program takes at a time.
ROW_TILE = 2048


@triton.jit
def arrive(counter_ptr, programs):
    """Whether this is the last of so many programs, and so sees what all others wrote."""
    # All of this program's stores come before its count, all of the others' before the last count.
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    is_last = arrived == programs - 1
    # Ready for the next launch, or the next replay of a captured graph.
    tl.store(counter_ptr, 0, mask=is_last)
    return is_last


@triton.jit
def best_scores(
    q_ptr,
    k_ptr,
    row,
    scale,
    rows,
    dim,
    key_heads,
    stride_q_head,
    stride_k_row,
    stride_k_head,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Some rows' scores [BLOCK_N], NaN where any head's is."""
    offs_h, offs_d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    mask_n, mask_d = row < rows, offs_d < dim
    k_rows = k_ptr + row.to(tl.int64) * stride_k_row
    best = tl.full([BLOCK_N, BLOCK_H], float("-inf"), tl.float32)
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
            logits = tl.where(mask_h[None, :], logits, float("-inf"))
            best = tl.maximum(best, logits, propagate_nan=tl.PropagateNan.ALL)
    # What a reduction makes of NaN is up to the chip.
    is_nan = tl.max((best != best).to(tl.int32), axis=1) != 0
    return tl.where(is_nan, float("nan"), tl.max(best, axis=1))


def scoring_grid(k: Tensor, sizes: dict[str, Any]) -> tuple[int, int]:
    """Blocks of rows by chunks."""
    return triton.cdiv(k.shape[1], sizes["BLOCK_N"]), k.shape[0]


def scoring_sizes(q_last: Tensor, k: Tensor) -> dict[str, Any]:
    """What the paper's scoring is compiled for."""
    _, rows, key_heads, dim = k.shape
    check_rows(rows)
    # Programs as a large chip runs at once, unless they would have too few rows.
    tiles = tiles_of("scoring", k.device)
    block_d = triton.next_power_of_2(dim)
    each = triton.next_power_of_2(rows) // tiles["programs"]
    block_n = min(max(each, tiles["least_rows"]), 64)
    most_heads = tiles["elements"] // (block_n * block_d)
    return {
        "GROUP": q_last.shape[1] // key_heads,
        "BLOCK_N": block_n,
        "BLOCK_H": max(1, min(triton.next_power_of_2(key_heads), most_heads)),
        "BLOCK_D": block_d,
        "BLOCK_T": min(triton.next_power_of_2(rows), ROW_TILE),
        "num_warps": tiles["threads"] // warp_size(k.device),
    }


def check_rows(rows: int) -> None:
    """Raise `ValueError` for more rows than the selection counts."""
    require(rows <= MAX_ROWS, "the number of rows of k", rows, f"at most {MAX_ROWS} for Triton")


_counters: dict[tuple[torch.device, int], Tensor] = {}


def arrival_counters(batch: int, device: torch.device) -> Tensor:
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
