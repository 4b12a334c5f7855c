"""Weights of fewer bits: torchao's tensors, and the 4-bit ones of a model that bitsandbytes holds.
Products with them are those packages' own.

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

from .errors import CheckpointError

Quantize = Literal["int8", "fp8"]

# Compute capability that multiplies float8, by rows and columns of their own scales.
_FP8_SINCE = (8, 9)


class FourBit(Tensor):
    """A matrix [O, I] of bitsandbytes' 4-bit numbers, as its `Params4bit` holds them: two a byte,
    with scales for blocks of them.
    """

    held: Any

    @staticmethod
    def __new__(cls, held: Any) -> FourBit:
        state = held.quant_state
        made: FourBit = Tensor._make_wrapper_subclass(
            cls, state.shape, dtype=state.dtype, device=held.device
        )
        made.held = held
        return made

    @property
    def qdata(self) -> Tensor:
        """The bytes, as they are now: on a CPU, the transformers model packs them anew when it is
        first run.
        """
        data: Tensor = self.held.data
        return data

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Its product is bitsandbytes'; what else is asked of it is asked of any tensor."""
        if func is not nn.functional.linear:
            return super().__torch_function__(func, types, args, kwargs or {})
        bitsandbytes = import_module("bitsandbytes")
        x, weight, *bias = args
        return bitsandbytes.matmul_4bit(
            x, weight.held, quant_state=weight.held.quant_state, bias=bias[0] if bias else None
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any, kwargs: Any
    ) -> Any:
        raise TypeError(f"{func} of a matrix in 4 bits: only products are there.")


def shared(parameter: Tensor) -> Tensor:
    """A parameter of a transformers model, unknown to autograd, in the same memory.

    Raises `CheckpointError` for what bitsandbytes holds in 8 bits.
    """
    if hasattr(parameter, "SCB"):
        raise CheckpointError(
            "The model's weights are in 8 bits by bitsandbytes, which is not supported; take 4 "
            "bits, or torchao's int8."
        )
    four_bit = getattr(parameter, "quant_state", None) is not None
    return FourBit(parameter) if four_bit else parameter.detach()


def is_quantized(tensor: Tensor) -> bool:
    """Whether a tensor is a package's own, which no kernel of ours reads."""
    return type(tensor) not in (Tensor, nn.Parameter)


def stored(tensor: Tensor) -> Tensor:
    """The numbers that a tensor is held as: a quantised one's, without their scales."""
    held: Tensor = getattr(tensor, "qdata", tensor)
    return held


def unpacks(tensor: Tensor) -> bool:
    """Whether a product first makes a matrix of the numbers that it is taken in: float8's are
    multiplied as they are.
    """
    return is_quantized(tensor) and stored(tensor).dtype != torch.float8_e4m3fn


def unpacks_as(name: str | None) -> bool:
    """The same of the matrices that `quantizer` makes; None for none.

    Raises `ValueError` for another name.
    """
    if name is not None:
        _check_name(name)
    return name == "int8"


def _check_name(name: str) -> None:
    if name not in get_args(Quantize):
        known = ", ".join(get_args(Quantize))
        raise ValueError(f"quantize={name!r} is not known; choose one of {known}.")


def quantizer(name: Quantize, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """What turns a matrix [O, I] into a quantised one.

    "int8": whole numbers with a scale for each row, products in the activations' dtype. "fp8":
    float8_e4m3fn with a scale for each row, for the activations too (`torch._scaled_mm`). Raises
    `ValueError` for another name, without torchao, and on a device that cannot run it.
    """
    _check_name(name)
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
