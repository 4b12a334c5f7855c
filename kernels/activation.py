"""The gated activation of Llama's MLP (Shazeer 2020, SwiGLU): `silu(gate) * up`.

gate_up: [..., 2F], the gate in the first half -> [..., F]. A program takes a tile of rows and
columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_silu_mul
from .devices import launching_on
from .products import linear
from .rows import as_rows

# Elements of one program's tile: enough loads in flight to hide memory latency at four warps.
TILE = 2048


@triton.jit(do_not_specialize=["rows", "total_rows"])
def _silu_mul_kernel(
    gate_up_ptr,
    out_ptr,
    rows,
    total_rows,
    width,
    stride_batch,
    stride_row,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    offs_r = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (offs_r < total_rows)[:, None] & (offs_f < width)[None, :]
    offsets = (offs_r // rows) * stride_batch + (offs_r % rows) * stride_row
    gate_ptrs = gate_up_ptr + offsets[:, None] + offs_f[None, :]
    gate = tl.load(gate_ptrs, mask=mask, other=0.0)
    up = tl.load(gate_ptrs + width, mask=mask, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    out = wide * tl.sigmoid(wide) * up
    tl.store(out_ptr + offs_r[:, None] * width + offs_f[None, :], out.to(gate.dtype), mask=mask)


def silu_mul(gate_up: Tensor) -> Tensor:
    """The gated activation of Llama's MLP: `silu(gate) * up` (Shazeer 2020, SwiGLU).

    Computed in float32.

    Args:
        gate_up: [..., 2F], the output of a fused projection, with the gate in the first half.

    Returns:
        [..., F] in the same dtype.

    Raises:
        ValueError: The last dimension is odd, or no Triton kernel runs on this device and dtype.
    """
    check_silu_mul(gate_up)
    x = as_rows("gate_up", gate_up)
    batch, rows, width = x.shape[0], x.shape[1], x.shape[2] // 2
    out = torch.empty(*gate_up.shape[:-1], width, dtype=x.dtype, device=x.device)
    block_f = min(TILE, triton.next_power_of_2(width))
    # Rows may outnumber what a grid's second dimension holds: many at a time where they are short.
    block_r = max(TILE // block_f, triton.next_power_of_2(triton.cdiv(batch * rows, 65535)))
    grid = (triton.cdiv(width, block_f), triton.cdiv(batch * rows, block_r))
    with launching_on(x):
        _silu_mul_kernel[grid](
            x,
            out,
            rows,
            batch * rows,
            width,
            *x.stride()[:2],
            BLOCK_R=block_r,
            BLOCK_F=block_f,
            num_warps=4,
        )
    return out


def gated_linear(x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """The first half of Llama's MLP: `silu(x Wgᵀ) * (x Wuᵀ)` (Shazeer 2020, SwiGLU).

    Args:
        x: [..., I].
        weights: One [2F, I] with the gate in the first half, or gate and up, each [F, I].

    Returns:
        [..., F].

    Raises:
        ValueError: The arguments do not fit together, or no Triton kernel runs on their device and
            dtype.
    """
    return silu_mul(linear(x, weights))
