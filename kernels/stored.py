"""The units (sentences) of a stored text that asking rows attend to.

    score[a, u] = max over tokens i of unit u of
                  sum over heads h of (w_h · softmax_i(q_a,h · k_i / sqrt(D)))

q: [A, H, D]; keys: [N, G, D], 16-bit, or int8 with scales [N, G] -> [A, U]. One launch reads the
keys for the softmax's totals. The next reads them once more, adds up the heads of each token, and
takes a unit's largest sum by a scan over its tokens. No [A, H, N] array is ever in memory.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_units
from .devices import launching_on

# Tokens of a program. A text of a million tokens has some eight thousand programs.
BLOCK_N = 128


@triton.jit
def _load_stored(keys_ptr, scales_ptr, head, heads, row, rows, dim, offs_d, DTYPE: tl.constexpr):
    """Some rows' keys of one head, transposed [D, N], and what their products are scaled by [N]."""
    place = row.to(tl.int64) * heads + head
    mask = row < rows
    k = tl.load(
        keys_ptr + place[None, :] * dim + offs_d[:, None],
        mask=mask[None, :] & (offs_d < dim)[:, None],
        other=0.0,
    ).to(DTYPE)
    if scales_ptr is not None:
        scale = tl.load(scales_ptr + place, mask=mask, other=0.0).to(tl.float32)
    else:
        scale = tl.full(row.shape, 1.0, tl.float32)
    return k, scale


@triton.jit
def _logits(q_ptr, head, heads, asking, dim, k, scale, offs_a, offs_d):
    """A head's logits [A, N]."""
    ptrs = q_ptr + (offs_a[:, None] * heads + head) * dim + offs_d[None, :]
    q = tl.load(ptrs, mask=(offs_a < asking)[:, None] & (offs_d < dim)[None, :], other=0.0)
    return tl.dot(q, k, input_precision="ieee") * scale[None, :]


@triton.jit(do_not_specialize=["rows", "asking"])
def _stored_totals_kernel(
    q_ptr,
    keys_ptr,
    scales_ptr,
    key_heads_ptr,
    totals_ptr,
    scale,
    rows,
    asking,
    heads,
    stored_heads,
    dim,
    BLOCK_A: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the logarithms of a block's totals, to [H, A, blocks]."""
    block, head = tl.program_id(0), tl.program_id(1)
    row = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_a, offs_d = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_D)
    key_head = tl.load(key_heads_ptr + head)
    k, by_row = _load_stored(
        keys_ptr, scales_ptr, key_head, stored_heads, row, rows, dim, offs_d, q_ptr.dtype.element_ty
    )
    logits = _logits(q_ptr, head, heads, asking, dim, k, by_row * scale, offs_a, offs_d)
    logits = tl.where((row < rows)[None, :], logits, float("-inf"))
    peak = tl.max(logits, axis=1)
    total = peak + tl.log(tl.sum(tl.exp(logits - peak[:, None]), axis=1))
    places = (head * asking + offs_a).to(tl.int64) * tl.num_programs(0) + block
    tl.store(totals_ptr + places, total, mask=offs_a < asking)


@triton.jit
def _larger_of_unit(unit, score, next_unit, next_score):
    """The best score of a unit so far, from left to right."""
    return next_unit, tl.where(unit == next_unit, tl.maximum(score, next_score), next_score)


@triton.jit(do_not_specialize=["rows", "asking", "units"])
def _stored_units_kernel(
    q_ptr,
    keys_ptr,
    scales_ptr,
    key_heads_ptr,
    weights_ptr,
    totals_ptr,
    unit_of_ptr,
    scores_ptr,
    scale,
    rows,
    asking,
    units,
    heads,
    stored_heads,
    dim,
    BLOCK_A: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Raise the units' scores [A, U] to those of a block's tokens."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_a, offs_d = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_D)
    joined = tl.zeros([BLOCK_A, BLOCK_N], tl.float32)
    for head in tl.range(0, heads):
        key_head = tl.load(key_heads_ptr + head)
        k, by_row = _load_stored(
            keys_ptr,
            scales_ptr,
            key_head,
            stored_heads,
            row,
            rows,
            dim,
            offs_d,
            q_ptr.dtype.element_ty,
        )
        logits = _logits(q_ptr, head, heads, asking, dim, k, by_row * scale, offs_a, offs_d)
        total = tl.load(totals_ptr + head * asking + offs_a, mask=offs_a < asking, other=0.0)
        joined += tl.load(weights_ptr + head) * tl.exp(logits - total[:, None])
    unit = tl.load(unit_of_ptr + row, mask=row < rows, other=-1)
    following = tl.load(unit_of_ptr + row + 1, mask=row + 1 < rows, other=-1)
    by_token = tl.broadcast_to(unit[None, :], [BLOCK_A, BLOCK_N])
    _, best = tl.associative_scan((by_token, joined), 1, _larger_of_unit)
    # A unit's last token of this block has its best score.
    last = (row < rows) & ((unit != following) | (tl.arange(0, BLOCK_N) == BLOCK_N - 1))
    places = offs_a.to(tl.int64)[:, None] * units + unit[None, :]
    mask = (offs_a < asking)[:, None] & last[None, :]
    # Scores are not negative: as whole numbers their bits are in the same order.
    tl.atomic_max(scores_ptr + places, best.to(tl.int32, bitcast=True), mask=mask, sem="relaxed")


def score_units(
    q: Tensor,
    keys: Tensor,
    scales: Tensor | None,
    key_heads: Sequence[int],
    weights: Tensor,
    before: Tensor,
    starts: Tensor,
) -> Tensor:
    """Score the units (sentences) of a stored text by the attention that the asking rows pay to it.

        score[a, u] = max over tokens i of unit u of
                      sum over heads h of (w_h · softmax_i(q_a,h · k_i / sqrt(D)))

    Each head's softmax is over all stored tokens and what the asking row sees besides.

    Args:
        q: [A, H, D], rotated queries of the asking rows.
        keys: [N, G, D], rotated keys of the stored tokens, in q's dtype or int8.
        scales: [N, G], floating point: what int8 keys are multiplied by. None for others.
        key_heads: Which of the G key heads each of the H query heads reads.
        weights: w, [H] float32, not negative.
        before: [A, H] float32, the logarithm of what each softmax adds up to over what the asking
            row sees besides; -inf for nothing.
        starts: [U] int64, each unit's first token, ascending from 0.

    Returns:
        [A, U] float32.

    Raises:
        ValueError: The arguments do not fit together, or no Triton kernel runs on their device and
            dtype.
    """
    check_units(q, keys, scales, key_heads, weights, before, starts)
    asking, heads, dim = q.shape
    rows, stored_heads, _ = keys.shape
    q, keys = q.contiguous(), keys.contiguous()
    scales = None if scales is None else scales.contiguous()
    which = torch.tensor(key_heads, dtype=torch.int32, device=q.device)
    unit_of = torch.zeros(rows, dtype=torch.int32, device=q.device)
    unit_of[starts[1:]] = 1
    unit_of = unit_of.cumsum(0, dtype=torch.int32)
    sizes = {
        "BLOCK_A": max(16, triton.next_power_of_2(asking)),
        "BLOCK_N": BLOCK_N,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
    }
    blocks, scale = triton.cdiv(rows, BLOCK_N), dim**-0.5
    parts = torch.empty((heads, asking, blocks), dtype=torch.float32, device=q.device)
    scores = torch.zeros((asking, len(starts)), dtype=torch.int32, device=q.device)
    with launching_on(q):
        _stored_totals_kernel[(blocks, heads)](
            q, keys, scales, which, parts, scale, rows, asking, heads, stored_heads, dim, **sizes
        )
        totals = torch.logaddexp(parts.logsumexp(2), before.T).contiguous()
        _stored_units_kernel[(blocks,)](
            q,
            keys,
            scales,
            which,
            weights,
            totals,
            unit_of,
            scores,
            scale,
            rows,
            asking,
            len(starts),
            heads,
            stored_heads,
            dim,
            **sizes,
        )
    return scores.view(torch.float32)
