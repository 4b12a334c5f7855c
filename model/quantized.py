"""Weights of fewer bits, held as torchao's tensors; products with them are torchao's too.

Only the layers' matrices are quantised: norms, biases and the embeddings stay as they are. torchao
is the extra `quantized`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Quantize = Literal["int8", "fp8"]

# Compute capability that multiplies float8, by rows and columns of their own scales.
_FP8_SINCE = (8, 9)


def is_quantized(tensor: Tensor) -> bool:
    """Whether a tensor is one of torchao's, which no kernel of ours reads."""
    return type(tensor) not in (Tensor, nn.Parameter)


def stored(tensor: Tensor) -> Tensor:
    """The numbers that a tensor is held as: a quantised one's, without their scales."""
    held: Tensor = getattr(tensor, "qdata", tensor)
    return held


def quantizer(name: Quantize, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """What turns a matrix [O, I] into a quantised one.

    "int8": whole numbers with a scale for each row, products in the activations' dtype. "fp8":
    float8_e4m3fn with a scale for each row, for the activations too (`torch._scaled_mm`). Raises
    `ValueError` for another name, without torchao, and on a device that cannot run it.
    """
    if name not in get_args(Quantize):
        known = ", ".join(get_args(Quantize))
        raise ValueError(f"quantize={name!r} is not known; choose one of {known}.")
    quantization = _torchao(name)
    config: Any
    if name == "int8":
        config = quantization.Int8WeightOnlyConfig()
    else:
        chip = torch.device(device)
        if chip.type != "cuda" or torch.cuda.get_device_capability(chip) < _FP8_SINCE:
            raise ValueError(
                f"quantize='fp8' needs an NVIDIA GPU of compute capability 8.9 or more, and the "
                f"device is {chip}; choose int8."
            )
        by_row = quantization.PerRow()
        config = quantization.Float8DynamicActivationFloat8WeightConfig(granularity=by_row)

    def quantize(matrix: Tensor) -> Tensor:
        layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(matrix, requires_grad=False)
        quantization.quantize_(layer, config)
        return layer.weight.detach()

    return quantize


def _torchao(name: str) -> Any:
    """torchao's module of quantisations, without its warnings of kernels that it has not."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return import_module("torchao.quantization")
    except ImportError:
        raise ValueError(
            f"quantize={name!r} needs torchao: pip install 'homer_triton[quantized]'."
        ) from None
    finally:
        logging.disable(level)
