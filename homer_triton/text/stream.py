"""Tokens that come one by one, as text: each piece as soon as its characters are whole."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

# Stands at the end of what tokens read as that hold a part of a character.
_BROKEN = "\ufffd"
# Tokens that are read again with a new one, and how many of them at least.
_MOST, _LEAST = 64, 16


class TextStream:
    """Hands on the text of tokens; joined, the pieces are what all tokens read as, special ones
    left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._ids: list[int] = []
        # Characters of their text that have been handed on.
        self._told = 0
        # Such a tokenizer may take back a space before what follows.
        self._tidies = bool(tokenizer.clean_up_tokenization_spaces)

    def put(self, token: int) -> None:
        """One more token."""
        self._ids.append(token)
        text = self._read(self._ids)
        if text.endswith(_BROKEN):
            return
        self._tell(text[: text.rfind(" ") + 1] if self._tidies else text)
        if len(self._ids) > _MOST and self._told == len(text):
            ids = self._ids[-_LEAST:]
            shorter = self._read(ids)
            if text.endswith(shorter):  # not where it begins within a character
                self._ids, self._told = ids, len(shorter)

    def end(self) -> None:
        """Hand on what was held back."""
        self._tell(self._read(self._ids))

    def _tell(self, text: str) -> None:
        new = text[self._told :]
        self._told = max(self._told, len(text))
        if new:
            self._on_text(new)

    def _read(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
