"""Peak memory: a process's resident memory from Linux, a GPU's from PyTorch's allocator.

Imports nothing but the standard library, so that a Python without the rest can use the file too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def forget_peak() -> int:
    """Start the process's peak anew; returns the memory in use, in bytes, without what was freed.

    Raises `OSError` or `AttributeError` where the system is not Linux with glibc.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """The most memory in use since `forget_peak`, in bytes."""
    return _status("VmHWM")


def watch_peak(device: torch.device) -> Callable[[], int | None]:
    """Start a peak anew; what is returned tells how far it has been above what is in use now.

    In bytes: of a GPU's allocator on CUDA, of the process's resident memory otherwise; None where
    the system tells neither.
    """
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        return lambda: torch.cuda.max_memory_allocated(device) - allocated
    try:
        resident = forget_peak()
    except (OSError, AttributeError):
        return lambda: None
    return lambda: max(0, peak() - resident)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status does not tell {name}")
