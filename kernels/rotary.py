"""Rotary positions (RoPE, Su et al. 2021), fused with storing keys and values in their slots.

    first' = first * cos - second * sin,    second' = second * cos + first * sin

x: [B, T, H, D] rotated in place, first and second the halves of D; keys, values: [slots, HKV, D]. A
program takes all heads of a few rows, so cos and sin are read once for all of them.
"""

from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from .checks import check_rotary, check_rotary_and_store, checked_by
from .devices import launching_on

# Elements of one program's widest tile, half a head dim counted: rows are batched up to it.
TILE = 2048


@triton.jit
def _rotate_(x_ptr, cos, sin, mask, row_offsets, stride_head, half, offs_h, offs_d):
    """Rotate rows x heads x half pairs in place; returns both rotated halves in x's dtype."""
    ptrs = x_ptr + row_offsets[:, None, None] + offs_h[None, :, None] * stride_head
    ptrs += offs_d[None, None, :]
    first = tl.load(ptrs, mask=mask, other=0.0)
    second = tl.load(ptrs + half, mask=mask, other=0.0)
    wide, other = first.to(tl.float32), second.to(tl.float32)
    rotated = (wide * cos - other * sin).to(first.dtype)
    rotated_other = (other * cos + wide * sin).to(first.dtype)
    tl.store(ptrs, rotated, mask=mask)
    tl.store(ptrs + half, rotated_other, mask=mask)
    return rotated, rotated_other


@triton.jit
def _load_angles(positions_ptr, cos_ptr, sin_ptr, batch, row, mask_r, offs_d, half, stride_batch):
    """cos and sin [rows, 1, half] at the rows' positions."""
    positions = tl.load(positions_ptr + batch * stride_batch + row, mask=mask_r, other=0)
    offsets = positions[:, None] * half + offs_d[None, :]
    mask = mask_r[:, None] & (offs_d < half)[None, :]
    cos = tl.load(cos_ptr + offsets, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + offsets, mask=mask, other=0.0)
    return cos[:, None, :], sin[:, None, :]


@triton.jit(
    do_not_specialize=["rows", "total_rows", "stride_positions_batch"],
    do_not_specialize_on_alignment=["positions_ptr"],
)
def _rotary_kernel(
    x_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    rows,
    total_rows,
    heads,
    half,
    stride_x_batch,
    stride_x_row,
    stride_x_head,
    stride_positions_batch,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_h, offs_d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_HALF)
    batch, row, mask_r = offs_r // rows, offs_r % rows, offs_r < total_rows
    cos, sin = _load_angles(
        positions_ptr, cos_ptr, sin_ptr, batch, row, mask_r, offs_d, half, stride_positions_batch
    )
    mask = mask_r[:, None, None] & (offs_h < heads)[None, :, None] & (offs_d < half)[None, None, :]
    x_rows = batch * stride_x_batch + row * stride_x_row
    _rotate_(x_ptr, cos, sin, mask, x_rows, stride_x_head, half, offs_h, offs_d)


@triton.jit(
    do_not_specialize=["rows", "total_rows", "stride_positions_batch", "stride_slots_batch"],
    do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"],
)
def _rotary_and_store_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    keys_ptr,
    values_ptr,
    rows,
    total_rows,
    query_heads,
    key_heads,
    half,
    stride_q_batch,
    stride_q_row,
    stride_q_head,
    stride_k_batch,
    stride_k_row,
    stride_k_head,
    stride_v_batch,
    stride_v_row,
    stride_v_head,
    stride_positions_batch,
    stride_slots_batch,
    stride_keys_slot,
    stride_keys_head,
    stride_values_slot,
    stride_values_head,
    BLOCK_R: tl.constexpr,
    BLOCK_HQ: tl.constexpr,
    BLOCK_HKV: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_h, offs_d = tl.arange(0, BLOCK_HKV), tl.arange(0, BLOCK_HALF)
    batch, row, mask_r = offs_r // rows, offs_r % rows, offs_r < total_rows
    cos, sin = _load_angles(
        positions_ptr, cos_ptr, sin_ptr, batch, row, mask_r, offs_d, half, stride_positions_batch
    )
    mask_rd = mask_r[:, None, None] & (offs_d < half)[None, None, :]
    if q_ptr is not None:
        offs_q = tl.arange(0, BLOCK_HQ)
        q_rows = batch * stride_q_batch + row * stride_q_row
        mask_q = mask_rd & (offs_q < query_heads)[None, :, None]
        _rotate_(q_ptr, cos, sin, mask_q, q_rows, stride_q_head, half, offs_q, offs_d)

    mask = mask_rd & (offs_h < key_heads)[None, :, None]
    k_rows = batch * stride_k_batch + row * stride_k_row
    first, second = _rotate_(k_ptr, cos, sin, mask, k_rows, stride_k_head, half, offs_h, offs_d)
    slots = tl.load(slots_ptr + batch * stride_slots_batch + row, mask=mask_r, other=0)
    columns = offs_d[None, None, :]
    key_ptrs = keys_ptr + (slots * stride_keys_slot)[:, None, None] + columns
    key_ptrs += offs_h[None, :, None] * stride_keys_head
    tl.store(key_ptrs, first, mask=mask)
    tl.store(key_ptrs + half, second, mask=mask)

    v_rows = batch * stride_v_batch + row * stride_v_row
    v_ptrs = v_ptr + v_rows[:, None, None] + offs_h[None, :, None] * stride_v_head + columns
    value_ptrs = values_ptr + (slots * stride_values_slot)[:, None, None] + columns
    value_ptrs += offs_h[None, :, None] * stride_values_head
    tl.store(value_ptrs, tl.load(v_ptrs, mask=mask, other=0.0), mask=mask)
    tl.store(value_ptrs + half, tl.load(v_ptrs + half, mask=mask, other=0.0), mask=mask)


@checked_by(partial(check_rotary, "x"))
def apply_rotary_(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate queries or keys in place by their positions (RoPE, Su et al. 2021).

    Element i of a head is paired with element i + D/2, as in Llama.

    Args:
        x: [B, T, H, D], rotated in place.
        positions: [B, T] int64, each below len(cos).
        cos: [positions, D/2] float32.
        sin: [positions, D/2] float32.

    Raises:
        ValueError: The arguments do not fit together, or no Triton kernel runs on their device and
            dtype.
    """
    batch, rows, heads, dim = x.shape
    block_h, block_half = triton.next_power_of_2(heads), triton.next_power_of_2(dim // 2)
    block_r = max(1, TILE // (block_h * block_half))
    with launching_on(x):
        _rotary_kernel[(triton.cdiv(batch * rows, block_r),)](
            x,
            positions,
            cos,
            sin,
            rows,
            batch * rows,
            heads,
            dim // 2,
            *x.stride()[:3],
            positions.stride(0),
            BLOCK_R=block_r,
            BLOCK_H=block_h,
            BLOCK_HALF=block_half,
            num_warps=4,
        )


@checked_by(check_rotary_and_store)
def rotary_and_store_(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
) -> None:
    """Rotate q and k in place (RoPE), then write k and v to their slots of one layer's cache.

    Args:
        q: [B, T, HQ, D], rotated in place, or None.
        k: [B, T, HKV, D], rotated in place.
        v: [B, T, HKV, D].
        positions: [B, T] int64, each below len(cos).
        cos: [positions, D/2] float32.
        sin: [positions, D/2] float32.
        keys: [slots, HKV, D], the cache's keys, written at `slots`.
        values: [slots, HKV, D], the cache's values, written at `slots`.
        slots: [B, T] int64, where each row (token) goes.

    Raises:
        ValueError: The arguments do not fit together, or no Triton kernel runs on their device and
            dtype.
    """
    batch, rows, key_heads, dim = k.shape
    query_heads = 1 if q is None else q.shape[2]
    block_hq, block_hkv = triton.next_power_of_2(query_heads), triton.next_power_of_2(key_heads)
    block_half = triton.next_power_of_2(dim // 2)
    block_r = max(1, TILE // (max(block_hq, block_hkv) * block_half))
    with launching_on(k):
        _rotary_and_store_kernel[(triton.cdiv(batch * rows, block_r),)](
            q,
            k,
            v,
            positions,
            cos,
            sin,
            slots,
            keys,
            values,
            rows,
            batch * rows,
            query_heads,
            key_heads,
            dim // 2,
            *(k if q is None else q).stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            positions.stride(0),
            slots.stride(0),
            *keys.stride()[:2],
            *values.stride()[:2],
            BLOCK_R=block_r,
            BLOCK_HQ=block_hq,
            BLOCK_HKV=block_hkv,
            BLOCK_HALF=block_half,
            num_warps=4,
        )
