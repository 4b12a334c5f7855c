"""Requests as the engine takes them: something to go on from, and the answers that are wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from ..config import HomerConfig
from ..context import EncodedContext
from ..decoding import Decoding
from .events import Event


@dataclass(frozen=True)
class Reading:
    """A text to read.

    prefix, context, suffix: token ids, int64 on the CPU; is_short: it is read in one piece.
    """

    prefix: Tensor
    context: Tensor
    suffix: Tensor
    config: HomerConfig
    is_short: bool


@dataclass(eq=False)
class Job:
    """One request.

    source: an encoding, on whatever device, or the text to make one of; key: what the encoding is
    known by, None where nobody will ask for it again; prompt: token ids [n] to append first;
    decodings: of each answer, none where the encoding is all that is wanted; tell: called in the
    engine's thread with all that happens.
    """

    source: EncodedContext | Reading
    prompt: Tensor
    decodings: tuple[Decoding, ...]
    tell: Callable[[Event], None]
    key: str | None = None
    cancelled: bool = field(default=False, init=False)
