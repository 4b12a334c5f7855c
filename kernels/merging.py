"""Prune and concatenate: two siblings' kept rows land in their parent's (HOMER, section 3.1).

    parent = left's context ‖ right's context ‖ (left's suffix + right's suffix) / 2

left: [B, RL, E], right: [B, RR, E], labels [B, 3, T] (positions, source indices, slots) read
through the kept rows; keys and values stay where they are but for the suffix's, averaged over all
layers into right's slots. The first programs take a row of the parent each, the others a suffix row
of one layer's keys or values.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_merge
from .devices import launching_on


@triton.jit
def _load_labels(
    labels_ptr,
    kept_ptr,
    batch,
    row,
    kinds,
    wanted,
    stride_labels_batch,
    stride_labels_kind,
    stride_kept_batch,
):
    """The labels of a kept row: its position (kind 0), source index (1) and slot (2)."""
    kept = tl.load(kept_ptr + batch * stride_kept_batch + row, mask=wanted, other=0)
    ptrs = labels_ptr + batch * stride_labels_batch + kinds * stride_labels_kind + kept
    return tl.load(ptrs, mask=kinds < tl.where(wanted, 3, 0), other=0)


@triton.jit
def _average_(left_ptr, right_ptr, width, BLOCK_S: tl.constexpr):
    """Write the mean of two slots of one layer's keys or values to the right one."""
    offs_s = tl.arange(0, BLOCK_S)
    mask_s = offs_s < width
    left = tl.load(left_ptr + offs_s, mask=mask_s, other=0.0).to(tl.float32)
    right = tl.load(right_ptr + offs_s, mask=mask_s, other=0.0).to(tl.float32)
    tl.store(right_ptr + offs_s, ((left + right) * 0.5).to(right_ptr.dtype.element_ty), mask=mask_s)


@triton.jit(do_not_specialize=["batches", "left_context", "right_context", "suffix"])
def _prune_and_concatenate_kernel(
    left_ptr,
    right_ptr,
    left_labels_ptr,
    right_labels_ptr,
    left_kept_ptr,
    right_kept_ptr,
    cache_ptr,
    hidden_ptr,
    labels_ptr,
    batches,
    left_context,
    right_context,
    suffix,
    width,
    slot_width,
    stride_left_batch,
    stride_left_row,
    stride_right_batch,
    stride_right_row,
    stride_left_labels_batch,
    stride_left_labels_kind,
    stride_right_labels_batch,
    stride_right_labels_kind,
    stride_left_kept_batch,
    stride_right_kept_batch,
    stride_cache_layer,
    stride_cache_half,
    stride_cache_slot,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    rows = left_context + right_context + suffix
    if program < batches * rows:
        batch, row = program // rows, program % rows
        # The suffix follows the context on both sides, so right's rows are one run of the parent's.
        is_suffix = row >= left_context + right_context
        from_right = row >= left_context
        from_left = is_suffix | (row < left_context)
        right_row = row - left_context
        left_row = tl.where(is_suffix, row - right_context, row)

        offs_e = tl.arange(0, BLOCK_E)
        mask_e = offs_e < width
        left_ptrs = left_ptr + batch * stride_left_batch + left_row * stride_left_row + offs_e
        right_ptrs = right_ptr + batch * stride_right_batch + right_row * stride_right_row + offs_e
        left_width, right_width = tl.where(from_left, width, 0), tl.where(from_right, width, 0)
        left = tl.load(left_ptrs, mask=offs_e < left_width, other=0.0).to(tl.float32)
        right = tl.load(right_ptrs, mask=offs_e < right_width, other=0.0).to(tl.float32)
        hidden = (left + right) * tl.where(is_suffix, 0.5, 1.0)
        hidden_ptrs = hidden_ptr + program * width + offs_e
        tl.store(hidden_ptrs, hidden.to(hidden_ptr.dtype.element_ty), mask=mask_e)

        kinds = tl.arange(0, 4)
        left_labels = _load_labels(
            left_labels_ptr,
            left_kept_ptr,
            batch,
            left_row,
            kinds,
            row < left_context,
            stride_left_labels_batch,
            stride_left_labels_kind,
            stride_left_kept_batch,
        )
        right_labels = _load_labels(
            right_labels_ptr,
            right_kept_ptr,
            batch,
            right_row,
            kinds,
            from_right,
            stride_right_labels_batch,
            stride_right_labels_kind,
            stride_right_kept_batch,
        )
        label_ptrs = labels_ptr + (batch * 3 + kinds) * rows + row
        tl.store(label_ptrs, tl.where(from_right, right_labels, left_labels), mask=kinds < 3)
    else:
        program -= batches * rows
        half, suffix_row = program % 2, (program // 2) % suffix
        batch, layer = (program // (2 * suffix)) % batches, program // (2 * suffix * batches)
        left_slot = _load_labels(
            left_labels_ptr,
            left_kept_ptr,
            batch,
            left_context + suffix_row,
            2,
            suffix_row < suffix,
            stride_left_labels_batch,
            stride_left_labels_kind,
            stride_left_kept_batch,
        )
        right_slot = _load_labels(
            right_labels_ptr,
            right_kept_ptr,
            batch,
            right_context + suffix_row,
            2,
            suffix_row < suffix,
            stride_right_labels_batch,
            stride_right_labels_kind,
            stride_right_kept_batch,
        )
        cache_ptr += layer * stride_cache_layer + half * stride_cache_half
        left_slot_ptr = cache_ptr + left_slot * stride_cache_slot
        _average_(left_slot_ptr, cache_ptr + right_slot * stride_cache_slot, slot_width, BLOCK_S)


def prune_and_concatenate(
    left: Tensor,
    right: Tensor,
    left_labels: Tensor,
    right_labels: Tensor,
    left_kept: Tensor,
    right_kept: Tensor,
    cache: Tensor,
    suffix: int,
) -> tuple[Tensor, Tensor]:
    """Join two pruned siblings into their parent's chunk, suffixes averaged (HOMER, section 3.1).

    The parent's rows are left's context, right's context, and the mean of both suffixes. The
    suffix's keys and values are averaged in the cache, in right's slots; left's suffix slots are
    free afterwards.

    left, right: [B, RL, E] and [B, RR, E], the kept rows' hidden states, suffix last; labels: [B,
    3, T], the positions, source indices and slots of all rows before the prune; kept: [B, RL] and
    [B, RR], the rows that survived it, affix included; cache: [L, 2, slots, HKV, D], the layers run
    so far; suffix: rows of the suffix. Returns the parent's hidden states [B, RL + RR - suffix, E]
    and labels [B, 3, RL + RR - suffix]. Raises `ValueError` for arguments that do not fit together.
    """
    check_merge(left, right, left_labels, right_labels, left_kept, right_kept, cache, suffix)
    batch, left_rows, width = left.shape
    left_context, right_context = left_rows - suffix, right.shape[1] - suffix
    rows = left_context + right_context + suffix
    layers, _, _, heads, dim = cache.shape
    hidden = torch.empty(batch, rows, width, dtype=left.dtype, device=left.device)
    labels = torch.empty(batch, 3, rows, dtype=torch.int64, device=left.device)
    block_e, block_s = triton.next_power_of_2(width), triton.next_power_of_2(heads * dim)
    with launching_on(left):
        _prune_and_concatenate_kernel[(batch * rows + layers * batch * suffix * 2,)](
            left,
            right,
            left_labels,
            right_labels,
            left_kept,
            right_kept,
            cache,
            hidden,
            labels,
            batch,
            left_context,
            right_context,
            suffix,
            width,
            heads * dim,
            *left.stride()[:2],
            *right.stride()[:2],
            *left_labels.stride()[:2],
            *right_labels.stride()[:2],
            left_kept.stride(0),
            right_kept.stride(0),
            *cache.stride()[:3],
            BLOCK_E=block_e,
            BLOCK_S=block_s,
            num_warps=4 if max(block_e, block_s) <= 4096 else 8,
        )
    return hidden, labels
