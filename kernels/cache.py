"""The finished cache: some layers' keys and values of the surviving slots, gathered once.

cache: [L, 2, slots, HKV, D], slots: [T] -> keys, values: [L, HKV, T, D]. A program takes some rows
of one head of one layer, keys and values both; neighbouring programs take the heads that lie next
to each other in a slot.
"""

import triton
import triton.language as tl
from torch import Tensor

from .checks import check_gather
from .devices import launching_on

# Elements of one program's tile, of keys and of values each.
TILE = 4096


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["slots_ptr"])
def _gather_cache_kernel(
    cache_ptr,
    slots_ptr,
    keys_ptr,
    values_ptr,
    rows,
    dim,
    stride_cache_layer,
    stride_cache_half,
    stride_cache_slot,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head, layer = tl.program_id(0), tl.program_id(2).to(tl.int64)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    mask_r = offs_r < rows
    mask = mask_r[:, None] & (offs_d < dim)[None, :]
    slots = tl.load(slots_ptr + offs_r, mask=mask_r, other=0)
    cache_ptr += layer * stride_cache_layer + head * dim
    ptrs = cache_ptr + (slots * stride_cache_slot)[:, None] + offs_d[None, :]
    keys = tl.load(ptrs, mask=mask, other=0.0)
    values = tl.load(ptrs + stride_cache_half, mask=mask, other=0.0)
    out_rows = (layer * tl.num_programs(0) + head) * rows + offs_r
    out = out_rows[:, None] * dim + offs_d[None, :]
    tl.store(keys_ptr + out, keys, mask=mask)
    tl.store(values_ptr + out, values, mask=mask)


def gather_cache_(cache: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Copy the keys and values of some slots into a contiguous cache, in place.

    Args:
        cache: [L, 2, slots, HKV, D], keys (0) and values (1) of L layers.
        slots: [T] int64, the slots to copy.
        keys: [L, HKV, T, D], contiguous, written.
        values: [L, HKV, T, D], contiguous, written.

    Raises:
        ValueError: The arguments do not fit together, or no Triton kernel runs on their device and
            dtype.
    """
    check_gather(cache, slots, keys, values)
    layers, _, _, heads, dim = cache.shape
    rows = len(slots)
    if not rows:
        return
    block_d = triton.next_power_of_2(dim)
    block_r = max(1, TILE // block_d)
    with launching_on(cache):
        _gather_cache_kernel[(heads, triton.cdiv(rows, block_r), layers)](
            cache,
            slots,
            keys,
            values,
            rows,
            dim,
            *cache.stride()[:3],
            BLOCK_R=block_r,
            BLOCK_D=block_d,
            num_warps=4,
        )
