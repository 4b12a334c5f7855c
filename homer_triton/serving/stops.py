"""Texts that end an answer are not part of it for OpenAI's clients."""

from __future__ import annotations

from collections.abc import Sequence


class Stops:
    """Passes on an answer's text as it comes, up to the first of some texts; what may be the
    beginning of one is held back until it is known.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = list(stops)
        self._held = ""
        self._over = False

    def pass_on(self, piece: str) -> str:
        """What of the text so far can be told now, and has not been yet."""
        if self._over:
            return ""
        text = self._held + piece
        found = [text.find(stop) for stop in self._stops if stop in text]
        if found:
            self._over, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back, once nothing more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at a text's end begin a stop."""
    most = min(len(stop) - 1, len(text))
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
