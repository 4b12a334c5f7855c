"""Closing a level of the tree: two siblings' kept rows land in their parent's, and the suffixes'
keys and values are averaged (HOMER, section 3.1).

    parent = left's context ‖ right's context ‖ (left's suffix + right's suffix) / 2

left: [B, RL, E], right: [B, RR, E], labels [B, K, T] read through the kept rows, a program for each
of the parent's rows. Keys and values stay where they are but for the suffix's, averaged into
right's slots, a program for each suffix row of one layer's keys or values.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_average, check_merge
from .devices import launching_on


@triton.jit
def _load_labels(
    labels_ptr,
    kept_ptr,
    batch,
    row,
    kinds,
    count,
    stride_labels_batch,
    stride_labels_kind,
    stride_kept_batch,
):
    """The first `count` labels of a kept row."""
    kept = tl.load(kept_ptr + batch * stride_kept_batch + row, mask=count > 0, other=0)
    ptrs = labels_ptr + batch * stride_labels_batch + kinds * stride_labels_kind + kept
    return tl.load(ptrs, mask=kinds < count, other=0)


@triton.jit(
    do_not_specialize=[
        *("left_context", "right_context", "suffix", "label_kinds"),
        *("stride_left_labels_batch", "stride_left_labels_kind", "stride_left_kept_batch"),
        *("stride_right_labels_batch", "stride_right_labels_kind", "stride_right_kept_batch"),
    ],
    do_not_specialize_on_alignment=[
        *("left_labels_ptr", "right_labels_ptr", "left_kept_ptr", "right_kept_ptr")
    ],
)
def _prune_and_concatenate_kernel(
    left_ptr,
    right_ptr,
    left_labels_ptr,
    right_labels_ptr,
    left_kept_ptr,
    right_kept_ptr,
    hidden_ptr,
    labels_ptr,
    left_context,
    right_context,
    suffix,
    label_kinds,
    width,
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
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    rows = left_context + right_context + suffix
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

    kinds = tl.arange(0, BLOCK_K)
    left_labels = _load_labels(
        left_labels_ptr,
        left_kept_ptr,
        batch,
        left_row,
        kinds,
        tl.where(from_right, 0, label_kinds),
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
        tl.where(from_right, label_kinds, 0),
        stride_right_labels_batch,
        stride_right_labels_kind,
        stride_right_kept_batch,
    )
    label_ptrs = labels_ptr + (batch * label_kinds + kinds) * rows + row
    labels = tl.where(from_right, right_labels, left_labels)
    tl.store(label_ptrs, labels, mask=kinds < label_kinds)


@triton.jit(
    do_not_specialize=["suffix", "stride_left_batch", "stride_right_batch"],
    do_not_specialize_on_alignment=["left_slots_ptr", "right_slots_ptr"],
)
def _average_affix_kernel(
    cache_ptr,
    left_slots_ptr,
    right_slots_ptr,
    suffix,
    slot_width,
    stride_cache_layer,
    stride_cache_half,
    stride_cache_slot,
    stride_left_batch,
    stride_right_batch,
    BLOCK_S: tl.constexpr,
):
    batch, row = tl.program_id(0) // suffix, tl.program_id(0) % suffix
    layer = tl.program_id(1).to(tl.int64)
    cache_ptr += layer * stride_cache_layer + tl.program_id(2) * stride_cache_half
    left_slot = tl.load(left_slots_ptr + batch * stride_left_batch + row)
    right_slot = tl.load(right_slots_ptr + batch * stride_right_batch + row)
    offs_s = tl.arange(0, BLOCK_S)
    mask_s = offs_s < slot_width
    left_ptrs = cache_ptr + left_slot * stride_cache_slot + offs_s
    right_ptrs = cache_ptr + right_slot * stride_cache_slot + offs_s
    left = tl.load(left_ptrs, mask=mask_s, other=0.0).to(tl.float32)
    right = tl.load(right_ptrs, mask=mask_s, other=0.0).to(tl.float32)
    tl.store(right_ptrs, ((left + right) * 0.5).to(cache_ptr.dtype.element_ty), mask=mask_s)


def prune_and_concatenate(
    left: Tensor,
    right: Tensor,
    left_labels: Tensor,
    right_labels: Tensor,
    left_kept: Tensor,
    right_kept: Tensor,
    suffix: int,
) -> tuple[Tensor, Tensor]:
    """Join two pruned siblings of the merge tree into their parent's chunk (HOMER, section 3.1).

    The parent's rows (tokens) are left's context, right's context, and the mean of both suffixes,
    which keeps right's labels.

    Args:
        left: [B, RL, E], hidden states of the rows that the left chunks kept, suffix last.
        right: [B, RR, E], the same of the right chunks.
        left_labels: [B, K, T] int64, K labels of all rows before the prune, such as positions,
            source indices and slots.
        right_labels: The same of the right chunks; their T may be another.
        left_kept: [B, RL] int64, the rows that were kept, suffix included.
        right_kept: [B, RR] int64.
        suffix: Rows of the suffix.

    Returns:
        The parents' hidden states [B, RL + RR - suffix, E] and labels [B, K, RL + RR - suffix].

    Raises:
        ValueError: The arguments do not fit together, or no Triton kernel runs on their device and
            dtype.
    """
    check_merge(left, right, left_labels, right_labels, left_kept, right_kept, suffix)
    batch, left_rows, width = left.shape
    left_context, right_context = left_rows - suffix, right.shape[1] - suffix
    rows, label_kinds = left_context + right_context + suffix, left_labels.shape[1]
    hidden = torch.empty(batch, rows, width, dtype=left.dtype, device=left.device)
    labels = torch.empty(batch, label_kinds, rows, dtype=torch.int64, device=left.device)
    block_e = triton.next_power_of_2(width)
    with launching_on(left):
        _prune_and_concatenate_kernel[(batch * rows,)](
            left,
            right,
            left_labels,
            right_labels,
            left_kept,
            right_kept,
            hidden,
            labels,
            left_context,
            right_context,
            suffix,
            label_kinds,
            width,
            *left.stride()[:2],
            *right.stride()[:2],
            *left_labels.stride()[:2],
            *right_labels.stride()[:2],
            left_kept.stride(0),
            right_kept.stride(0),
            BLOCK_E=block_e,
            BLOCK_K=triton.next_power_of_2(label_kinds),
            num_warps=4 if block_e <= 4096 else 8,
        )
    return hidden, labels


def average_affix_(cache: Tensor, left_slots: Tensor, right_slots: Tensor) -> None:
    """Average the keys and values of two siblings' suffixes, in place (HOMER, section 3.1).

    Args:
        cache: [L, 2, slots, HKV, D], keys (0) and values (1) of L layers. The means are written to
            `right_slots`.
        left_slots: [B, S] int64, the slots of the left chunks' suffixes.
        right_slots: [B, S] int64, the slots of the right chunks' suffixes.

    Raises:
        ValueError: The arguments do not fit together, or no Triton kernel runs on their device and
            dtype.
    """
    check_average(cache, left_slots, right_slots)
    layers, _, _, heads, dim = cache.shape
    batch, suffix = left_slots.shape
    if not left_slots.numel():
        return
    block_s = triton.next_power_of_2(heads * dim)
    with launching_on(cache):
        _average_affix_kernel[(batch * suffix, layers, 2)](
            cache,
            left_slots,
            right_slots,
            suffix,
            heads * dim,
            *cache.stride()[:3],
            left_slots.stride(0),
            right_slots.stride(0),
            BLOCK_S=block_s,
            num_warps=4 if block_s <= 4096 else 8,
        )
