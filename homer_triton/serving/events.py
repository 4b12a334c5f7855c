"""What happens to a request, as the engine tells it."""

from __future__ import annotations

from dataclasses import dataclass

from ..answering import Generation
from ..context import EncodedContext, EncodeStats


@dataclass(frozen=True)
class Walked:
    """A node of the tree is done. levels: how many nodes there are by height; height, index: which
    one this is, from the left within its height.
    """

    levels: tuple[int, ...]
    height: int
    index: int


@dataclass(frozen=True)
class Read:
    """The text has been read, or was before (reused).

    tokens: how many it has; stats: what reading it took; encoded: on the CPU, what is to be kept of
    it: other threads leave the model's device alone, where a graph may be captured.
    """

    tokens: int
    stats: EncodeStats
    reused: bool
    encoded: EncodedContext | None = None


@dataclass(frozen=True)
class Piece:
    """A finished piece of an answer's text."""

    index: int
    text: str


@dataclass(frozen=True)
class Ended:
    """An answer has ended."""

    index: int
    answer: Generation


@dataclass(frozen=True)
class Failed:
    """The request has ended without all its answers."""

    error: Exception


@dataclass(frozen=True)
class Gone:
    """The client no longer listens."""


Event = Walked | Read | Piece | Ended | Failed | Gone
