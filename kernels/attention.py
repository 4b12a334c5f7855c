"""Exact causal attention over `prefix ‖ chunk` with an online softmax (Dao 2023, FlashAttention-2).

    out[i] = softmax(q[i] · K / sqrt(D)) · V,    K, V = prefix ‖ rows 0..row(i)

q: [B, R, HQ, D]; k, v: [B, T, HKV, D]; the prefix [P, HKV, D] is read where it lies, shared by the
batch. A program takes BLOCK_M queries of one head, and goes over blocks of the prefix and then of
the chunk in one loop. Queries stand at ascending rows, so all keys up to the first one's row need
no mask and none after the last one's are read: selected rows cost what their positions cost, and no
mask is ever in memory. One query a chunk is `kernels.decoding`'s.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_blocks import LOG2_E, attend_block, load_block
from .checks import check_attention, check_head_dim
from .decoding import attend_one
from .devices import launching_on
from .tiles import tiles_of

# Full precision has no tensor cores: its operands stand in registers.
FLOAT32_TILES = {64: (64, 16, 8, 1), 128: (32, 16, 8, 1), 256: (16, 16, 4, 1)}


@triton.jit(
    do_not_specialize=["queries", "keys", "prefix_keys", "stride_rows_batch"],
    do_not_specialize_on_alignment=["query_rows_ptr"],
)
def _causal_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    prefix_k_ptr,
    prefix_v_ptr,
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

    key_head = (head // group).to(tl.int64)
    k_ptr += batch * stride_k_batch + key_head * stride_k_head
    v_ptr += batch * stride_v_batch + key_head * stride_v_head
    prefix_blocks = 0
    if prefix_k_ptr is not None:
        prefix_k_ptr += key_head * stride_prefix_k_head
        prefix_v_ptr += key_head * stride_prefix_v_head
        prefix_blocks = tl.cdiv(prefix_keys, BLOCK_N)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    offs_n = tl.arange(0, BLOCK_N)
    # One loop over both parts: of two in a row, the compiler lets no product run beside another.
    for block in tl.range(0, prefix_blocks + tl.cdiv(last_row + 1, BLOCK_N)):
        seen_by_all, last_visible = first_row + 1, rows
        if prefix_k_ptr is not None:
            in_prefix = block < prefix_blocks
            seen_by_all = tl.where(in_prefix, prefix_keys, first_row + 1)
            last_visible = tl.where(in_prefix, prefix_keys - 1, rows)
        start, k, v = load_block(
            block,
            k_ptr,
            v_ptr,
            prefix_k_ptr,
            prefix_v_ptr,
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
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        if start + BLOCK_N > seen_by_all:
            visible = (start + offs_n)[None, :] <= last_visible[:, None]
            logits = tl.where(visible, logits, float("-inf"))
        acc, peak, total = attend_block(logits, v, scale, acc, peak, total)

    out_ptr += batch * stride_out_batch + head.to(tl.int64) * stride_out_head
    out_rows = offs_m.to(tl.int64) * stride_out_row
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_rows[:, None] + offs_d[None, :], out, mask=mask_q)


def attention_tile(dim: int, itemsize: int, device: torch.device) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, warps, pipeline stages) for a head dim."""
    width = max(64, triton.next_power_of_2(dim))
    if itemsize == 4:
        return FLOAT32_TILES[width]
    block_m, block_n, warps, stages = tiles_of("attention", device)[str(width)]
    return block_m, block_n, warps, stages


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    query_rows: Tensor | None = None,
) -> Tensor:
    """Exact attention over `prefix ‖ chunk`, causal by row: row i sees the prefix and rows 0..i.

    q: [B, R, HQ, D]; k, v: [B, T, HKV, D]; prefix_k, prefix_v: [P, HKV, D], shared by the batch;
    query_rows: [B, R], the ascending rows that the queries stand at, or None for all T rows.
    Returns [B, R, HQ, D]. The scale is 1/sqrt(D). D is one of `checks.HEAD_DIMS`. Raises
    `ValueError` for arguments that do not fit together.
    """
    check_attention(q, k, v, prefix_k, prefix_v, query_rows)
    batch, queries, heads, dim = q.shape
    check_head_dim(dim)
    if prefix_k is not None and not len(prefix_k):
        prefix_k = prefix_v = None
    if queries == 1:
        return attend_one(q, k, v, prefix_k, prefix_v, query_rows)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    block_m, block_n, warps, stages = attention_tile(dim, q.element_size(), q.device)
    with launching_on(q):
        _causal_attention_kernel[(heads, triton.cdiv(queries, block_m), batch)](
            q,
            k,
            v,
            prefix_k,
            prefix_v,
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
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_D=triton.next_power_of_2(dim),
            num_warps=warps,
            num_stages=stages,
        )
    return out
