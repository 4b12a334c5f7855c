"""The walk of a rank that shares a plan with others: it runs the subtrees that are its own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ranks import Ranks, Sent
from .offload import Stored
from .scheduler import Chunk, Merged, Parked, Scheduler
from .shares import Shares
from .tree import Node


class RankScheduler(Scheduler):
    """Walks the nodes of its rank. A chunk whose parent is another rank's is sent there, in the
    form in which chunks wait in host memory, while the next subtree runs.

    The same numbers as one walk of all, but for rounding; only the first rank has them in the end.
    """

    def __init__(self, *args: Any, ranks: Ranks) -> None:
        super().__init__(*args)
        self._ranks = ranks
        self._shares = Shares(self.plan, ranks.size)
        self._sent: list[Sent] = []

    def steps(self) -> Iterator[tuple[Node, ...]]:
        """The plan's steps that this rank runs, in their order."""
        return self._shares.steps(self._ranks.rank)

    def _step(
        self,
        nodes: tuple[Node, ...],
        waiting: list[Chunk | Parked],
        contexts: Tensor,
        suffixes: Tensor,
    ) -> None:
        """A step between what arrives for it and what leaves after it. Raises `RankError` where
        another rank does not answer.
        """
        child = self._shares.arriving(nodes)
        if child is not None:
            waiting.append(self._receive(child))
        super()._step(nodes, waiting, contexts, suffixes)
        to = self._shares.destination(nodes)
        if to is not None:
            (node,) = nodes
            self._send(node, waiting, to)

    def _end(self, waiting: list[Chunk | Parked]) -> Merged | None:
        """The root's on the first rank, None on the others, once what they sent has arrived."""
        for sent in self._sent:
            sent.wait()
        return None if self._ranks.rank else super()._end(waiting)

    def _send(self, node: Node, waiting: list[Chunk | Parked], to: int) -> None:
        """Begin to send the last chunk that waits, and what its tokens have been given so far."""
        chunk = waiting.pop()
        assert isinstance(chunk, Chunk)
        labels, parts = self._take_out(chunk)
        self._sent.append(self._ranks.send([labels, *parts, *self._marks(node)], to))

    def _receive(self, node: Node) -> Parked:
        """A chunk that another rank has run, as it would wait."""
        model, rows = self.model, node.kept + self.plan.suffix_len
        shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
            ((self.documents, 2, rows), torch.int64),
            ((self.documents, rows, model.config.hidden_size), model.dtype),
        ]
        for pool in self.pools[: node.height + 1]:
            layers, halves, _, *row = pool.cache.shape
            shapes.append(((layers, halves, self.documents, rows, *row), pool.cache.dtype))
        marks = self._marks(node)
        shapes += [(tuple(mark.shape), mark.dtype) for mark in marks]
        arrived = self._ranks.receive(shapes, self._shares.owner(node))
        to_device = partial(torch.Tensor.to, device=model.device)
        labels, *parts = map(to_device, arrived[: -len(marks)])
        for mark, theirs in zip(marks, arrived[-len(marks) :], strict=True):
            mark.copy_(theirs)
        return Parked(labels, Stored(parts, parts))

    def _marks(self, node: Node) -> list[Tensor]:
        """What is known of a subtree's tokens: where they were pruned, and their votes."""
        known = [self._pruned_at] if self._voted is None else [self._pruned_at, self._voted]
        return [own[:, self._shares.sources(node)] for own in known]
