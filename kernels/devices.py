"""Where a kernel runs: the device of its tensors, and what the launchers need to know of it."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
from torch import Tensor

from .checks import require

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INTERPRETED = bool(triton.knobs.runtime.interpret)


def launching_on(x: Tensor) -> AbstractContextManager[object]:
    """The context to launch a kernel on x's device in.

    Raises `ValueError` when no kernel can run there or none is compiled for x's dtype.
    """
    require(x.dtype in DTYPES, "the dtype", x.dtype, "float16, bfloat16 or float32 for Triton")
    _require_gpu(x.device)
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@cache
def architecture(device: torch.device) -> str:
    """The chip, such as "sm_90" or "gfx942"; "interpreter" where there is none."""
    if INTERPRETED:
        return "interpreter"
    target = _target(device)
    return target.arch if isinstance(target.arch, str) else f"sm_{target.arch}"


@cache
def warp_size(device: torch.device) -> int:
    """Threads that run in lockstep: 32 on NVIDIA chips, 64 on AMD's."""
    return 32 if INTERPRETED else _target(device).warp_size


def _require_gpu(device: torch.device) -> None:
    runs = INTERPRETED or device.type != "cpu"
    require(runs, "the device", device, "a GPU for Triton; kernels.reference runs on any")


def _target(device: torch.device) -> triton.backends.compiler.GPUTarget:
    _require_gpu(device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return triton.runtime.driver.active.get_current_target()
