"""RMS norm (Zhang & Sennrich 2019), alone or of a residual sum.

    norm(x) = x / sqrt(mean(x²) + eps) * weight

x: [..., E], weight: [E]. A program normalises whole rows that stay in registers: every byte is read
and written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_norm, checked_by
from .devices import launching_on
from .rows import as_rows

# Elements of one program's tile: a row of up to this many is batched with its neighbours.
TILE = 4096


@triton.jit(do_not_specialize=["rows", "total_rows"])
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    eps,
    rows,
    total_rows,
    width,
    stride_x_batch,
    stride_x_row,
    stride_residual_batch,
    stride_residual_row,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < width
    mask = (offs_r < total_rows)[:, None] & mask_e[None, :]
    batch, row = offs_r // rows, offs_r % rows

    x_rows = batch * stride_x_batch + row * stride_x_row
    x = tl.load(x_ptr + x_rows[:, None] + offs_e[None, :], mask=mask, other=0.0)
    out_offsets = offs_r[:, None] * width + offs_e[None, :]
    if residual_ptr is not None:
        residual_rows = batch * stride_residual_batch + row * stride_residual_row
        residual = tl.load(
            residual_ptr + residual_rows[:, None] + offs_e[None, :], mask=mask, other=0.0
        )
        # The sum is rounded before it is normalised: it is what goes on down the residual stream.
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + out_offsets, x, mask=mask)

    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / width + eps)
    # Rounded to the working dtype before the weight, as transformers does.
    normal = (wide * scale[:, None]).to(x.dtype).to(tl.float32)
    weight = tl.load(weight_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    tl.store(out_ptr + out_offsets, (normal * weight[None, :]).to(x.dtype), mask=mask)


@checked_by(lambda x, weight, eps: check_norm(x, None, weight))
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm: `x / sqrt(mean(x²) + eps) * weight` over the last dimension.

    The mean and the division are computed in float32 (Zhang & Sennrich 2019).

    Args:
        x: [..., E].
        weight: [E].
        eps: A small number that keeps the root above zero.

    Returns:
        [..., E] in x's dtype.

    Raises:
        ValueError: The arguments do not fit together, or no Triton kernel runs on their device and
            dtype.
    """
    return _launch(x, None, weight, eps)[1]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum with a residual, and its norm: `(x + residual, rms_norm(x + residual))`.

    Args:
        x: [..., E].
        residual: [..., E].
        weight: [E].
        eps: As in `rms_norm`.

    Returns:
        The sum and its norm, each [..., E] in x's dtype.

    Raises:
        ValueError: The arguments do not fit together, or no Triton kernel runs on their device and
            dtype.
    """
    check_norm(x, residual, weight)
    return _launch(x, residual, weight, eps)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(out)
    x_rows = as_rows("x", x)
    residual_rows = x_rows if residual is None else as_rows("residual", residual)
    batch, rows, width = x_rows.shape
    block_e = triton.next_power_of_2(width)
    block_r = max(1, TILE // block_e)
    with launching_on(x):
        _rms_norm_kernel[(triton.cdiv(batch * rows, block_r),)](
            x_rows,
            residual,
            weight,
            out,
            total,
            eps,
            rows,
            batch * rows,
            width,
            *x_rows.stride()[:2],
            *residual_rows.stride()[:2],
            BLOCK_R=block_r,
            BLOCK_E=block_e,
            num_warps=4 if block_e <= 4096 else 8,
        )
    return total, out
