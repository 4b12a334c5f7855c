"""CUDA graphs: a step of the tree is captured once for its shape, and replayed for all its equals.

For a small model the host takes longer to launch a step's kernels than the device to run them; a
replay is one launch. Graphs read and write memory that must stay where it is, so a run of a tree is
kept with them, for the next text of the same lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..model.llama import Llama

Step = Callable[..., tuple[Tensor, ...]]

# The devices that steps are captured on.
HAS_GRAPHS = ("cuda",)
# Runs that a model keeps: each has the memory that reading a text takes, and its graphs'.
MOST_KEPT = 2


@dataclass(frozen=True)
class Captured:
    """A step's graph with the memory that it reads and writes; `replay` runs it once."""

    replay: Callable[[], object]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class Replays:
    """Runs steps; one whose key has been seen before is replayed.

    A step is a function of tensors to tensors. All calls with one key must have inputs of the same
    shapes and do the same work, and whatever else the step reads or writes must stay where it is.
    The first call with a key runs as it is: kernels are compiled, libraries set themselves up.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._captured: dict[Hashable, Captured | None] = {}
        self._memory: Any = None  # PyTorch's handle of a memory pool
        # PyTorch's own capture stream belongs to the device that was current when it was made, and
        # a pool's memory is shared by what one stream captures.
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
        # The next replay writes to the same places.
        return tuple(output.clone() for output in captured.outputs)


def capture(step: Step, inputs: tuple[Tensor, ...], memory: Any, stream: Any) -> Captured:
    """Record what a step launches; nothing is run. memory, stream: the pool and the stream that the
    graphs share, which they may since no two run at once.
    """
    places = tuple(torch.empty_like(given) for given in inputs)
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.device(stream.device),
        torch.cuda.graph(graph, memory, stream, capture_error_mode="thread_local"),
    ):
        outputs = step(*places)
    return Captured(graph.replay, places, outputs)


def take_run(model: Llama, key: Hashable) -> Any:
    """What a model keeps by a key, which is the caller's alone then; None where there is none."""
    return model.kept_runs.pop(key, None)


def keep_run(model: Llama, key: Hashable, run: Any) -> None:
    """Let a model keep a run, and forget those that were kept longest ago."""
    model.kept_runs[key] = run
    while len(model.kept_runs) > MOST_KEPT:
        model.kept_runs.pop(next(iter(model.kept_runs)))


def drop_graphs(model: Llama) -> None:
    """Free the CUDA graphs that `encode` left with a model, and the memory that they run in: as
    much as reading the last texts took. The next text captures its own.
    """
    model.kept_runs.clear()
