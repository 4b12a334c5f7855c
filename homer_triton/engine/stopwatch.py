"""Elapsed time on a device without waiting for it: CUDA events on a GPU, the process clock
elsewhere.
"""

from time import perf_counter

import torch


class Stopwatch:
    """Marks moments, one at construction; `laps` turns them into seconds."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._marks: list[float] = []
        self._events: list[torch.cuda.Event] = []
        self.mark()

    def mark(self) -> None:
        """End a lap and begin the next."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._events.append(event)
        else:
            self._marks.append(perf_counter())

    def laps(self) -> list[float]:
        """Seconds between consecutive marks; on a GPU this waits for the last one."""
        if not self._cuda:
            return [b - a for a, b in zip(self._marks, self._marks[1:], strict=False)]
        self._events[-1].synchronize()
        pairs = zip(self._events, self._events[1:], strict=False)
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]
