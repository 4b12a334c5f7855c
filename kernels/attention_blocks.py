"""What attention does with a block of keys and values, whoever asks: `kernels.attention`'s many
queries, or `kernels.decoding`'s one.
"""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit
def load_block(
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
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of `prefix ‖ chunk`, the prefix's blocks first: the first row in its part, and keys
    and values [BLOCK_N, BLOCK_D]. Past a part's end its last row is read again.
    """
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    start, end = block * BLOCK_N, keys
    stride_k, stride_v = stride_k_row, stride_v_row
    if prefix_k_ptr is not None:
        in_prefix = block < prefix_blocks
        start = tl.where(in_prefix, block, block - prefix_blocks) * BLOCK_N
        end = tl.where(in_prefix, prefix_keys, keys)
        k_ptr = tl.where(in_prefix, prefix_k_ptr, k_ptr)
        v_ptr = tl.where(in_prefix, prefix_v_ptr, v_ptr)
        stride_k = tl.where(in_prefix, stride_prefix_k_row, stride_k_row)
        stride_v = tl.where(in_prefix, stride_prefix_v_row, stride_v_row)
    key_rows = tl.minimum(start + offs_n, end - 1).to(tl.int64)
    k_ptrs = k_ptr + key_rows[:, None] * stride_k + offs_d[None, :]
    v_ptrs = v_ptr + key_rows[:, None] * stride_v + offs_d[None, :]
    if BLOCK_D == HEAD_DIM:
        k, v = tl.load(k_ptrs), tl.load(v_ptrs)
    else:
        k = tl.load(k_ptrs, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
        v = tl.load(v_ptrs, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
    return start, k, v


@triton.jit
def attend_block(logits, v, scale, acc, peak, total):
    """The online softmax's sums with a block's values in it: acc [M, D], peak and total [M]."""
    # The first key of all is visible to every query, so peak is finite after the first block.
    new_peak = tl.maximum(peak, tl.max(logits, axis=1) * scale)
    weights = tl.exp2(logits * scale - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_peak, total
