"""Control tokens, such as those that open and close a chat's turns: they are a template's to give,
and a document or a question that spells them has their characters read like any others.
"""

from __future__ import annotations

import re
from itertools import pairwise
from threading import Lock
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..model.errors import is_panic, shorten

# Where in a text something begins and ends, in characters.
Span = tuple[int, int]

# Any text of ordinary words.
_PROBE = "a text"

# Whether special tokens are split is a state of the tokenizer, which threads may share.
_reading = Lock()


class Affix(str):
    """Text around a context that is a template's in part: control tokens count in it, but not in
    the words that the template was filled with.

    words: where these begin and end, in characters. Joined by + it stays an `Affix`; what any other
    operation makes of it is ordinary text.
    """

    words: tuple[Span, ...]

    def __new__(cls, text: str, words: tuple[Span, ...] = ()) -> Affix:
        affix = super().__new__(cls, text)
        affix.words = words
        return affix

    def __add__(self, other: str) -> Affix:
        later = other.words if isinstance(other, Affix) else ()
        moved = tuple((start + len(self), stop + len(self)) for start, stop in later)
        return Affix(str.__add__(self, other), self.words + moved)

    def __radd__(self, other: str) -> Affix:
        return Affix(other) + self


def words(text: str) -> Affix:
    """Text that is words from end to end."""
    return Affix(text, ((0, len(text)),))


def affix_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a prefix or suffix: control tokens count, but not in an `Affix`'s words."""
    spoken = text.words if isinstance(text, Affix) else ()
    parts = [text[slice(*span)] for span in spoken]
    if all(plain_ids(tokenizer, part) == _read(tokenizer, part) for part in parts):
        return _read(tokenizer, text)
    ids: list[int] = []
    reached = 0
    for start, stop in (*spoken, (len(text), len(text))):
        ids += _read(tokenizer, text[reached:start])
        ids += plain_ids(tokenizer, text[start:stop])
        reached = stop
    return ids


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text whose characters are nothing but text."""
    controls = control_ids(tokenizer)
    ids = _read(tokenizer, text, plain=True)
    if controls.isdisjoint(ids):
        return ids
    pieces = _cut(tokenizer, text)
    if len(pieces) == 1:
        return [token for token in ids if token not in controls]
    return [token for _, piece in pieces for token in plain_ids(tokenizer, piece)]


def plain_spans(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[Span]]:
    """`plain_ids`, and where each token comes from, as a fast tokenizer tells."""
    controls = control_ids(tokenizer)
    ids, spans = control_spans(tokenizer, text, plain=True)
    if controls.isdisjoint(ids):
        return ids, spans
    pieces = _cut(tokenizer, text)
    if len(pieces) == 1:
        chosen = [pair for pair in zip(ids, spans, strict=True) if pair[0] not in controls]
        return [token for token, _ in chosen], [span for _, span in chosen]
    ids, spans = [], []
    for first, piece in pieces:
        more, within = plain_spans(tokenizer, piece)
        ids += more
        spans += [(first + start, first + stop) for start, stop in within]
    return ids, spans


def control_spans(
    tokenizer: PreTrainedTokenizerBase, text: str, plain: bool = False
) -> tuple[list[int], list[Span]]:
    """Token ids of a text in which control tokens count, unless `plain`, and where each comes from,
    as a fast tokenizer tells.
    """
    read = _encode(tokenizer, text, plain, return_offsets_mapping=True)
    return list(read["input_ids"]), list(read["offset_mapping"])


def control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that only a template may give: the special ones, but for that of unknown words,
    and those that its chat template writes, which not every checkpoint calls special.
    """
    template: Any = tokenizer.chat_template or ""
    if isinstance(template, dict):
        template = "\n".join(map(str, template.values()))
    return {
        index
        for index, token in tokenizer.added_tokens_decoder.items()
        if index != tokenizer.unk_token_id
        and len(token.content) > 1
        and not token.content.isspace()
        and (token.special or token.content in template)
    }


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids that the tokenizer puts before a text by itself.

    They are read off a probe, since tokenizers say it in many ways (a template post-processor,
    `add_bos_token`, code of their own).
    """
    text = _read(tokenizer, _PROBE)
    whole = list(_encode(tokenizer, _PROBE, plain=False, add_special_tokens=True)["input_ids"])
    for start in range(len(whole) - len(text) + 1):
        if whole[start : start + len(text)] == text:
            return whole[:start]
    raise ValueError("The tokenizer changes a text when it adds its special tokens; give a prefix.")


def _read(tokenizer: PreTrainedTokenizerBase, text: str, plain: bool = False) -> list[int]:
    return list(_encode(tokenizer, str(text), plain)["input_ids"])


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    plain: bool,
    add_special_tokens: bool = False,
    **wanted: Any,
) -> BatchEncoding:
    """What a tokenizer makes of a text. Raises `ValueError` where it cannot read it."""
    try:
        with _reading:
            return tokenizer(
                text,
                add_special_tokens=add_special_tokens,
                split_special_tokens=plain,
                verbose=False,
                **wanted,
            )
    except BaseException as error:
        if type(error) is not Exception and not is_panic(error):  # tokenizers has none of its own
            raise
        raise ValueError(f"The tokenizer cannot read the text: {shorten(error)}.") from error


def _cut(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, str]]:
    """The text cut within each control token that is read in it even so, as a word of the
    vocabulary or since it is not called special: where each piece begins, and the piece.
    """
    controls = control_ids(tokenizer)
    if tokenizer.is_fast:
        read = zip(*control_spans(tokenizer, text, plain=True), strict=True)
        found = [span for token, span in read if token in controls]
    else:
        tokens = tokenizer.added_tokens_decoder
        spelt = "|".join(re.escape(tokens[index].content) for index in controls)
        found = [match.span() for match in re.finditer(spelt, text)]
    inside = {(start + stop + 1) // 2 for start, stop in found if stop - start > 1}
    edges = sorted({0, *inside, len(text)})
    return [(start, text[start:stop]) for start, stop in pairwise(edges)]
