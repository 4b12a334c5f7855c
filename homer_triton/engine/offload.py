"""Host memory for what waits: copied there and back on a stream of its own, beside the device's
work.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Stored:
    """Tensors in host memory, and on their way back to the device once they were asked for."""

    host: list[Tensor]
    arriving: list[Tensor] | None = None


class HostStore:
    """Keeps a device's tensors in pinned host memory; nothing here waits for the device.

    For a model on the CPU the tensors simply stay where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def put(self, tensors: list[Tensor]) -> Stored:
        """Copy tensors out; the caller may let go of them at once."""
        if self._stream is None:
            return Stored(tensors)
        host = [torch.empty_like(x, device="cpu", pin_memory=True) for x in tensors]
        with self._beside():
            for place, x in zip(host, tensors, strict=True):
                place.copy_(x, non_blocking=True)
                x.record_stream(self._stream)
        return Stored(host)

    def prefetch(self, stored: Stored) -> None:
        """Begin to copy back, so that `get` finds the tensors there."""
        if self._stream is None or stored.arriving is not None:
            return
        stored.arriving = [torch.empty_like(x, device=self._device) for x in stored.host]
        with self._beside():
            for place, x in zip(stored.arriving, stored.host, strict=True):
                place.copy_(x, non_blocking=True)
                place.record_stream(self._stream)

    def get(self, stored: Stored) -> list[Tensor]:
        """The tensors, on the device."""
        if self._stream is None:
            return stored.host
        self.prefetch(stored)
        assert stored.arriving is not None
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return stored.arriving

    def _beside(self) -> AbstractContextManager[object]:
        """The store's stream, after all that the device was asked to do so far."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)
