"""Attention of one query a chunk, as in decoding, split over the keys (Flash-Decoding, Dao 2023).

    out = softmax(q · K / sqrt(D)) · V,    K, V = prefix ‖ rows 0..row

q: [B, 1, HQ, D]; k, v: [B, T, HKV, D]; prefix [P, HKV, D]. The work is to read the keys and values:
a program takes a run of blocks of one key head for all query heads that share it, and the last
program of a head joins what they made. How many rows are seen is read on the device, so that a
captured graph serves a cache while it grows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_blocks import LOG2_E, attend_block, load_block
from .devices import launching_on, warp_size
from .scoring import arrival_counters, arrive
from .tiles import tiles_of

# Elements of the splits' outputs that are joined at a time.
JOINED = 8192


@triton.jit(
    do_not_specialize=["keys", "prefix_keys", "stride_rows_batch"],
    do_not_specialize_on_alignment=["query_rows_ptr"],
)
def _attend_one_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    prefix_k_ptr,
    prefix_v_ptr,
    query_rows_ptr,
    mixed_ptr,
    peaks_ptr,
    totals_ptr,
    counter_ptr,
    out_ptr,
    scale,
    keys,
    prefix_keys,
    stride_q_batch,
    stride_q_head,
    stride_k_batch,
    stride_k_row,
    stride_k_head,
    stride_v_batch,
    stride_v_row,
    stride_v_head,
    stride_prefix_k_row,
    stride_prefix_k_head,
    stride_prefix_v_row,
    stride_prefix_v_head,
    stride_rows_batch,
    stride_out_batch,
    stride_out_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    split, key_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    splits, key_heads = tl.num_programs(0), tl.num_programs(1)
    offs_g, offs_d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    mask_g, mask_d = offs_g < GROUP, offs_d < HEAD_DIM
    heads = key_head * GROUP + offs_g
    seen = keys
    if query_rows_ptr is not None:  # rows behind the query's may not have been written yet
        row = tl.load(query_rows_ptr + batch * stride_rows_batch).to(tl.int32)
        seen = tl.minimum(row + 1, keys)
    prefix_blocks = 0
    if prefix_k_ptr is not None:
        prefix_k_ptr += key_head * stride_prefix_k_head
        prefix_v_ptr += key_head * stride_prefix_v_head
        prefix_blocks = tl.cdiv(prefix_keys, BLOCK_N)
    blocks = prefix_blocks + tl.cdiv(seen, BLOCK_N)
    each = tl.cdiv(blocks, splits)

    q_ptr += batch * stride_q_batch
    mask = mask_g[:, None] & mask_d[None, :]
    q = tl.load(q_ptr + (heads * stride_q_head)[:, None] + offs_d[None, :], mask=mask, other=0.0)
    k_ptr += batch * stride_k_batch + key_head * stride_k_head
    v_ptr += batch * stride_v_batch + key_head * stride_v_head
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    for block in tl.range(split * each, tl.minimum(split * each + each, blocks)):
        start, k, v = load_block(
            block,
            k_ptr,
            v_ptr,
            prefix_k_ptr,
            prefix_v_ptr,
            seen,
            prefix_keys,
            prefix_blocks,
            stride_k_row,
            stride_v_row,
            stride_prefix_k_row,
            stride_prefix_v_row,
            HEAD_DIM,
            BLOCK_N,
            BLOCK_D,
        )
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        end = tl.where(block < prefix_blocks, prefix_keys, seen)
        visible = (start + tl.arange(0, BLOCK_N))[None, :] < end
        logits = tl.where(visible, logits, float("-inf"))
        acc, peak, total = attend_block(logits, v, scale, acc, peak, total)

    # [B, HKV, GROUP, splits] places.
    head = (batch * key_heads + key_head) * GROUP
    places = (head + offs_g) * splits + split
    tl.store(mixed_ptr + places[:, None] * BLOCK_D + offs_d[None, :], acc, mask=mask_g[:, None])
    tl.store(peaks_ptr + places, peak, mask=mask_g)
    tl.store(totals_ptr + places, total, mask=mask_g)
    if arrive(counter_ptr + batch * key_heads + key_head, splits):
        out_ptr += batch * stride_out_batch + key_head * GROUP * stride_out_head
        _join_splits(
            mixed_ptr,
            peaks_ptr,
            totals_ptr,
            out_ptr,
            head,
            splits,
            stride_out_head,
            GROUP,
            HEAD_DIM,
            BLOCK_M,
            BLOCK_S,
            BLOCK_D,
        )


@triton.jit
def _join_splits(
    mixed_ptr,
    peaks_ptr,
    totals_ptr,
    out_ptr,
    head,
    splits,
    stride_out_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the outputs of GROUP heads from what their splits made of their keys."""
    member, offs_s, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    mask_m = member < GROUP
    places = (head + member) * splits
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in tl.range(0, splits, BLOCK_S):
        # Others wrote these: past the first-level cache.
        at = places[:, None] + (first + offs_s)[None, :]
        mask = mask_m[:, None] & (first + offs_s < splits)[None, :]
        peaks = tl.load(peaks_ptr + at, mask=mask, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(totals_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
        own = tl.load(
            mixed_ptr + at[:, :, None] * BLOCK_D + offs_d[None, None, :],
            mask=mask[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        # The first split has the first key, so that largest is a number from here on; one that had
        # no keys has the lowest peak, and weighs nothing.
        larger = tl.where(mask_m, tl.maximum(largest, tl.max(peaks, axis=1)), 0.0)
        weights, shrink = tl.exp2(peaks - larger[:, None]), tl.exp2(largest - larger)
        total = total * shrink + tl.sum(totals * weights, axis=1)
        mixed = mixed * shrink[:, None] + tl.sum(own * weights[:, :, None], axis=1)
        largest = larger
    out = mixed / tl.where(mask_m, total, 1.0)[:, None]
    out_ptrs = out_ptr + (member * stride_out_head)[:, None] + offs_d[None, :]
    mask_out = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_out)


def attend_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    query_rows: Tensor | None,
) -> Tensor:
    """`causal_attention` of one query a chunk, whose arguments it has checked: q [B, 1, HQ, D],
    query_rows [B, 1], or None for the last rows -> [B, 1, HQ, D].
    """
    batch, keys, key_heads, dim = k.shape
    prefix = 0 if prefix_k is None else len(prefix_k)
    block_d = triton.next_power_of_2(dim)
    tiles = tiles_of("decoding", q.device)
    # Fewer in full precision, whose operands stand in registers.
    elements = tiles["elements"] if q.element_size() == 2 else tiles["elements"] // 4
    block_n = max(16, elements // block_d)
    blocks = triton.cdiv(prefix, block_n) + triton.cdiv(keys, block_n)
    splits = max(1, min(blocks, tiles["programs"] // (batch * key_heads)))
    group = q.shape[2] // key_heads
    block_m = triton.next_power_of_2(group)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    parts = (batch, key_heads, group, splits)
    mixed = torch.empty(*parts, block_d, dtype=torch.float32, device=q.device)
    peaks, totals = (torch.empty(parts, dtype=torch.float32, device=q.device) for _ in range(2))
    with launching_on(q):
        _attend_one_kernel[(splits, key_heads, batch)](
            q,
            k,
            v,
            prefix_k,
            prefix_v,
            query_rows,
            mixed,
            peaks,
            totals,
            arrival_counters(batch * key_heads, q.device),
            out,
            LOG2_E / dim**0.5,
            keys,
            prefix,
            *(q.stride(0), q.stride(2)),
            *k.stride()[:3],
            *v.stride()[:3],
            *(k[0] if prefix_k is None else prefix_k).stride()[:2],
            *(v[0] if prefix_v is None else prefix_v).stride()[:2],
            0 if query_rows is None else query_rows.stride(0),
            *(out.stride(0), out.stride(2)),
            GROUP=group,
            HEAD_DIM=dim,
            BLOCK_G=max(16, triton.next_power_of_2(group)),
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            BLOCK_M=block_m,
            BLOCK_S=max(1, JOINED // (block_m * block_d)),
            num_warps=tiles["threads"] // warp_size(q.device),
            num_stages=tiles["stages"],
        )
    return out
