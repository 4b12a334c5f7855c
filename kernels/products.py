"""Matrix products with what follows them, for all devices: no Triton here.

    linear: x Wᵀ + residual        gated_linear: silu(x Wgᵀ) * (x Wuᵀ)

On a GPU they are cuBLAS's. On a CPU they are oneDNN's, which adds, multiplies and activates while a
tile of the output is still in the cache, and which, unlike MKL, is as fast on every maker's chips.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_linear

# PyTorch's compiler calls these same ops for frozen models on a CPU.
_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


# Multiply-adds from which oneDNN pays: it compiles a kernel for every new number of rows and keeps
# it, some hundred kilobytes each.
LEAST_WORK = 2**26


def fuses(x: Tensor, weights: tuple[Tensor, ...]) -> bool:
    """Whether oneDNN takes the products of x [..., I] with matrices [O, I]: large ones, on an x86
    CPU, outside autograd, in a dtype that the chip's instructions know.
    """
    return (
        x.device.type == "cpu"
        and x.numel() * sum(len(weight) for weight in weights) >= max(LEAST_WORK, 1)
        and _dtype_fuses(x.dtype)
        and not (torch.is_grad_enabled() and any(a.requires_grad for a in (x, *weights)))
    )


def linear(x: Tensor, weights: tuple[Tensor, ...], residual: Tensor | None = None) -> Tensor:
    """x times each matrix transposed, the outputs side by side, and a residual added.

    x: [..., I]; weights: each [O, I]; residual: [..., sum of O] or None; returns [..., sum of O].
    Raises `ValueError` for arguments that do not fit together.
    """
    check_linear(x, weights, residual)
    fused = fuses(x, weights)
    if len(weights) == 1 and residual is not None and fused:
        return _ONEDNN.binary(x, residual, weights[0], None, "add")
    outputs = [_plain(x, weight) if fused else F.linear(x, weight) for weight in weights]
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    return joined if residual is None else joined + residual


def fused_gated_linear(x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """`gated_linear` where `fuses(x, weights)`; arguments as there."""
    check_linear(x, weights, None)
    gate, up = weights if len(weights) == 2 else weights[0].chunk(2)
    activated = _ONEDNN(x, gate, None, "swish", [], "")
    return _ONEDNN.binary(x, activated, up, None, "mul")


def _plain(x: Tensor, weight: Tensor) -> Tensor:
    return _ONEDNN(x, weight, None, "none", [], "")


def _dtype_fuses(dtype: torch.dtype) -> bool:
    if _ONEDNN is None or not torch.backends.mkldnn.enabled:
        return False
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
