"""Exact causal attention over `prefix ‖ chunk` with an online softmax (Dao 2023, FlashAttention-2).

    out[i] = softmax(q[i] · K / sqrt(D)) · V,    K, V = prefix ‖ rows 0..row(i)

q: [B, R, HQ, D]; k, v: [B, T, HKV, D]; the prefix [P, HKV, D] is read where it lies, shared by the
batch. A program takes BLOCK_M queries of one head, and goes over blocks of the prefix and then of
the chunk, by pointers in one loop or by tensor descriptors in two. Queries stand at ascending rows,
so all keys up to the first one's row need no mask and none after the last one's are read: selected
rows cost what their positions cost, and no mask is ever in memory. One query a chunk is
`kernels.decoding`'s.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .attention_blocks import LOG2_E, attend_block, load_block
from .checks import check_attention, check_head_dim, checked_by
from .decoding import attend_one
from .devices import launching_on
from .tiles import tiles_of


class Tile(NamedTuple):
    """How the kernel is launched: queries and keys in a block, warps, pipeline stages, and whether
    a chip's copy engine brings the keys by tensor descriptors (TMA), or threads by pointers.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    descriptors: bool = False


# Full precision has no tensor cores: its operands stand in registers.
FLOAT32_TILES = {64: Tile(64, 16, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(16, 16, 4, 1)}
# Bytes that a descriptor's address and strides are multiples of.
DESCRIPTOR_ALIGNMENT = 16


@triton.jit
def _attend(q, k, v, start, seen_by_all, last_visible, scale, acc, peak, total):
    """A block of keys from row `start` of its part on, of which every query sees those before
    `seen_by_all`, and each those up to its `last_visible`.
    """
    logits = tl.dot(q, tl.trans(k), input_precision="ieee")
    if start + k.shape[0] > seen_by_all:
        key_rows = start + tl.arange(0, k.shape[0])
        visible = key_rows[None, :] <= last_visible[:, None]
        logits = tl.where(visible, logits, float("-inf"))
    return attend_block(logits, v, scale, acc, peak, total)


@triton.jit
def _attend_part(
    q,
    k,
    v,
    batch,
    head,
    end,
    seen_by_all,
    last_visible,
    scale,
    acc,
    peak,
    total,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The rows 0..end of keys and values behind descriptors. Past the last row there are zeros."""
    for start in tl.range(0, end, BLOCK_N):
        k_block = tl.reshape(k.load([batch, start, head, 0]), [BLOCK_N, BLOCK_D])
        v_block = tl.reshape(v.load([batch, start, head, 0]), [BLOCK_N, BLOCK_D])
        acc, peak, total = _attend(
            q, k_block, v_block, start, seen_by_all, last_visible, scale, acc, peak, total
        )
    return acc, peak, total


@triton.jit(
    do_not_specialize=["queries", "keys", "prefix_keys", "stride_rows_batch"],
    do_not_specialize_on_alignment=["query_rows_ptr"],
)
def _causal_attention_kernel(
    q_ptr,
    k,
    v,
    prefix_k,
    prefix_v,
    query_rows_ptr,
    out_ptr,
    scale,
    queries,
    keys,
    prefix_keys,
    group,
    stride_q_batch,
    stride_q_row,
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
    stride_out_row,
    stride_out_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    head, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    # The last queries see most keys: they start first, so that the short programs fill the end.
    first_m = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    offs_m, offs_d = first_m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mask_m = offs_m < queries
    last_m = tl.minimum(first_m + BLOCK_M, queries) - 1
    if query_rows_ptr is not None:
        query_rows_ptr += batch * stride_rows_batch
        rows = tl.load(query_rows_ptr + offs_m, mask=mask_m, other=0).to(tl.int32)
        first_row = tl.load(query_rows_ptr + first_m).to(tl.int32)
        last_row = tl.load(query_rows_ptr + last_m).to(tl.int32)
    else:
        rows, first_row, last_row = offs_m, first_m, last_m

    mask_q = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    q_ptr += batch * stride_q_batch + head.to(tl.int64) * stride_q_head
    q_rows = offs_m.to(tl.int64) * stride_q_row
    q = tl.load(q_ptr + q_rows[:, None] + offs_d[None, :], mask=mask_q, other=0.0)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    key_head = head // group
    if DESCRIPTORS:
        # A loop for each part: a descriptor chosen inside of one would not be read ahead.
        if prefix_k is not None:
            whole = tl.full([BLOCK_M], 0, tl.int32) + prefix_keys - 1
            acc, peak, total = _attend_part(
                q,
                prefix_k,
                prefix_v,
                0,
                key_head,
                prefix_keys,
                prefix_keys,
                whole,
                scale,
                acc,
                peak,
                total,
                BLOCK_N,
                BLOCK_D,
            )
        acc, peak, total = _attend_part(
            q,
            k,
            v,
            tl.program_id(2),
            key_head,
            last_row + 1,
            first_row + 1,
            rows,
            scale,
            acc,
            peak,
            total,
            BLOCK_N,
            BLOCK_D,
        )
    else:
        key_head = key_head.to(tl.int64)
        k += batch * stride_k_batch + key_head * stride_k_head
        v += batch * stride_v_batch + key_head * stride_v_head
        prefix_blocks = 0
        if prefix_k is not None:
            prefix_k += key_head * stride_prefix_k_head
            prefix_v += key_head * stride_prefix_v_head
            prefix_blocks = tl.cdiv(prefix_keys, BLOCK_N)
        # One loop over both parts: of two in a row, no product runs beside another.
        for block in tl.range(0, prefix_blocks + tl.cdiv(last_row + 1, BLOCK_N)):
            seen_by_all, last_visible = first_row + 1, rows
            if prefix_k is not None:
                in_prefix = block < prefix_blocks
                seen_by_all = tl.where(in_prefix, prefix_keys, first_row + 1)
                last_visible = tl.where(in_prefix, prefix_keys - 1, rows)
            start, k_block, v_block = load_block(
                block,
                k,
                v,
                prefix_k,
                prefix_v,
                keys,
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
            acc, peak, total = _attend(
                q, k_block, v_block, start, seen_by_all, last_visible, scale, acc, peak, total
            )

    out_ptr += batch * stride_out_batch + head.to(tl.int64) * stride_out_head
    out_rows = offs_m.to(tl.int64) * stride_out_row
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_rows[:, None] + offs_d[None, :], out, mask=mask_q)


def attention_tile(dim: int, itemsize: int, device: torch.device) -> Tile:
    """The tile for a head dim."""
    width = max(64, triton.next_power_of_2(dim))
    if itemsize == 4:
        return FLOAT32_TILES[width]
    return Tile(*tiles_of("attention", device)[str(width)])


def _can_be_described(x: Tensor) -> bool:
    strides = [stride * x.element_size() for stride in x.stride()[:-1]]
    return not any(at % DESCRIPTOR_ALIGNMENT for at in (x.data_ptr(), *strides))


def _describe(x: Tensor | None, block_n: int) -> TensorDescriptor | None:
    """Keys or values [B, T, HKV, D], or the prefix's [P, HKV, D], to be read in blocks of rows."""
    if x is None:
        return None
    x = x if x.dim() == 4 else x[None]
    block = [1, block_n, 1, triton.next_power_of_2(x.shape[3])]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


@checked_by(check_attention)
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    query_rows: Tensor | None = None,
) -> Tensor:
    """Exact softmax attention over a shared prefix and a chunk, causal by row (token).

    Row i sees the whole prefix and the chunk's rows 0 to i. The scale is 1/sqrt(D). A query head
    reads the key head of its group.

    Args:
        q: [B, R, HQ, D]. D is one of `checks.HEAD_DIMS`.
        k: [B, T, HKV, D].
        v: [B, T, HKV, D].
        prefix_k: [P, HKV, D], shared by the batch, or None.
        prefix_v: [P, HKV, D], or None.
        query_rows: [B, R] int64, the rows of the queries in the chunk, ascending. None: all rows
            have a query, so that R is T.

    Returns:
        [B, R, HQ, D].

    Raises:
        ValueError: The arguments do not fit together, or no Triton kernel runs on their device and
            dtype.
    """
    batch, queries, heads, dim = q.shape
    check_head_dim(dim)
    if prefix_k is not None and not len(prefix_k):
        prefix_k = prefix_v = None
    if queries == 1:
        return attend_one(q, k, v, prefix_k, prefix_v, query_rows)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tile = attention_tile(dim, q.element_size(), q.device)
    sources = (k, v, prefix_k, prefix_v)
    described = tile.descriptors and all(x is None or _can_be_described(x) for x in sources)
    with launching_on(q):
        _causal_attention_kernel[(heads, triton.cdiv(queries, tile.block_m), batch)](
            q,
            *(_describe(x, tile.block_n) if described else x for x in sources),
            query_rows,
            out,
            LOG2_E / dim**0.5,
            queries,
            k.shape[1],
            0 if prefix_k is None else len(prefix_k),
            heads // k.shape[2],
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *(k[0] if prefix_k is None else prefix_k).stride()[:2],
            *(v[0] if prefix_v is None else prefix_v).stride()[:2],
            0 if query_rows is None else query_rows.stride(0),
            *out.stride()[:3],
            HEAD_DIM=dim,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_D=triton.next_power_of_2(dim),
            DESCRIPTORS=described,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out
