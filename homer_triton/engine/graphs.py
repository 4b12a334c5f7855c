"""CUDA graphs: each step of the tree is captured once per shape, then replayed for equal steps.

For a small model, the host takes longer to launch a step's kernels than the device to run them; a
replay is a single launch. Graphs read and write memory that must stay where it is, so a run's
graphs are kept with its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Step = Callable[..., tuple[Tensor, ...]]

# The devices that steps are captured on.
HAS_GRAPHS = ("cuda",)
# How many runs are kept. Each holds the memory of reading a text, and of its graphs.
MOST_KEPT = 2


@dataclass(frozen=True)
class Captured:
    """A step's graph, with the memory that it reads and writes. `replay` runs it once."""

    replay: Callable[[], object]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class Replays:
    """Runs steps. A step whose key was seen before is replayed.

    A step is a function from tensors to tensors. All calls with one key must have inputs of the
    same shapes and do the same work, and everything else that the step reads or writes must stay
    where it is. The first call with a key runs normally, so that kernels are compiled and libraries
    initialised; the second captures the graph.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._captured: dict[Hashable, Captured | None] = {}
        self._memory: Any = None  # PyTorch's handle of a memory pool
        # Not PyTorch's own capture stream: it belongs to the device that was current when it was
        # made. One stream for all graphs, because only those of one stream share a pool's memory.
        self._stream: Any = None

    def __call__(self, key: Hashable, step: Step, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What `step(*inputs)` returns."""
        if key not in self._captured:
            self._captured[key] = None
            return step(*inputs)
        captured = self._captured[key]
        if captured is None:
            if self._memory is None:
                self._memory = torch.cuda.graph_pool_handle()
                self._stream = torch.cuda.Stream(self._device)
            captured = self._captured[key] = capture(step, inputs, self._memory, self._stream)
        for place, given in zip(captured.inputs, inputs, strict=True):
            place.copy_(given)
        captured.replay()
        # Copies: the next replay writes to the same memory.
        return tuple(output.clone() for output in captured.outputs)


def capture(step: Step, inputs: tuple[Tensor, ...], memory: Any, stream: Any) -> Captured:
    """Record what a step launches, without running it.

    memory, stream: the pool and the stream that all graphs share. They may share them because no
    two graphs run at once.
    """
    places = tuple(torch.empty_like(given) for given in inputs)
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.device(stream.device),
        torch.cuda.graph(graph, memory, stream, capture_error_mode="thread_local"),
    ):
        outputs = step(*places)
    return Captured(graph.replay, places, outputs)


class Graphs:
    """Captured steps and the memory they run in, for later texts of the same lengths.

        graphs = ht.Graphs()
        for text in texts:
            encoded = ht.encode(model, text, graphs=graphs)

    It holds the last two kinds of texts, each with as much memory as reading one takes. Texts of
    other lengths, another config or changed weights are captured anew. Its memory goes with it.
    """

    def __init__(self) -> None:
        self._runs: dict[Hashable, Any] = {}

    def __len__(self) -> int:
        return len(self._runs)

    def take(self, key: Hashable) -> Any:
        """Remove what is kept under a key and return it, or None if there is nothing."""
        return self._runs.pop(key, None)

    def keep(self, key: Hashable, run: Any) -> None:
        """Keep a run, and drop the oldest ones beyond `MOST_KEPT`."""
        self._runs[key] = run
        while len(self._runs) > MOST_KEPT:
            del self._runs[next(iter(self._runs))]
