"""Encodings at hand: those used last, as many as fit a bound."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import fields
from threading import Lock

from torch import Tensor

from ..context import EncodedContext


class Memory:
    """Encodings by their keys, on the model's device; any thread may use it."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._held: OrderedDict[str, EncodedContext] = OrderedDict()
        self._lock = Lock()

    def get(self, key: str | None) -> EncodedContext | None:
        """An encoding, which is now the one used last."""
        with self._lock:
            if key is None or key not in self._held:
                return None
            self._held.move_to_end(key)
            return self._held[key]

    def put(self, key: str, encoded: EncodedContext) -> None:
        """Hold an encoding; those used longest ago go, and it itself where it is too large."""
        with self._lock:
            self._held[key] = encoded
            self._held.move_to_end(key)
            while self._held and sum(map(size_of, self._held.values())) > self._most:
                self._held.popitem(last=False)

    def forget(self, keys: Iterable[str]) -> None:
        """Let some go."""
        with self._lock:
            for key in keys:
                self._held.pop(key, None)


def size_of(encoded: EncodedContext) -> int:
    """Bytes of an encoding's tensors."""
    parts = (getattr(encoded, field.name) for field in fields(encoded))
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))
