"""Tokens that come one by one, as text: each piece as soon as its characters are whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

# Stands at the end of what tokens read as that hold a part of a character.
_BROKEN = "\ufffd"
# Tokens that are read again with a new one, and how many of them at least.
_MOST, _LEAST = 64, 16


def plain_end(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[int]:
    """The last tokens of a text behind which others are decoded: none where it ends in a special
    token, which begins a text anew.
    """
    special, last = set(tokenizer.all_special_ids), list(token_ids[-_LEAST:])
    begin = max((place for place, token in enumerate(last) if token in special), default=-1)
    return last[begin + 1 :]


def text_behind(
    tokenizer: PreTrainedTokenizerBase, before: Sequence[int], token_ids: Sequence[int]
) -> str:
    """What tokens add to the text of those before them, special ones left out.

    A tokenizer of Llama 2's kind drops the space that a whole text begins with.
    """
    first = str(tokenizer.decode(list(before), skip_special_tokens=True))
    whole = str(tokenizer.decode([*before, *token_ids], skip_special_tokens=True))
    if whole.startswith(first):
        return whole[len(first) :]
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))


class TextStream:
    """Hands on the text of tokens; joined, the pieces are `text_behind` those before them.

    before: the tokens before the first one, by `plain_end`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        on_text: Callable[[str], None],
        before: Sequence[int] = (),
    ) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._ids = list(before)
        # Characters of their text that have been handed on.
        self._told = len(self._read(self._ids))
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
