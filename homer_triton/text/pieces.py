"""Which characters of a text each of its tokens stands for.

A tokenizer may spread a character over several tokens, as those do that work on bytes. Characters
are never cut here: all tokens that hold a part of one stand for all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .controls import Span, control_spans, plain_spans

_BROKEN = "\N{REPLACEMENT CHARACTER}"
# The most tokens that the bytes of one character are spread over.
_CHARACTER_TOKENS = 4


def piece_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Tensor) -> list[str]:
    """Each token's own text, the space before it included where it makes one; joined, they read as
    the text does.

    token_ids: [tokens]. Of tokens that hold the bytes of one character between them, the first has
    it and the others are empty.
    """
    texts: list[str] = []
    for count, text in _characters(tokenizer, token_ids.tolist()):
        texts += [text] + [""] * (count - 1)
    return texts


def locate(
    tokenizer: PreTrainedTokenizerBase,
    token_ids: Sequence[int],
    after: Sequence[int] = (),
    source: str | None = None,
) -> tuple[str, list[Span]]:
    """The text of some tokens, and the characters of it that each one stands for, the white space
    before them included.

    after: the tokens that come next, whose text is left out, in case both were once one text.
    source: the text that the tokens (with or without `after`) were made from, for tokenizers that
    do not keep all of it, such as its line breaks; left out, it is what the tokens decode to.

    Raises `ValueError` where `source` does not have these tokens.
    """
    ids, tail = list(token_ids), list(after)
    if tokenizer.is_fast:
        for text in _candidates(tokenizer, ids, tail, source):
            found = _by_offsets(tokenizer, text, ids, tail)
            if found is not None:
                return found
        if source is not None:
            raise ValueError("source is not the text that the encoded tokens were made from.")
    # Ids that no text has, such as ones that were cut in the middle of a character.
    texts, spans = [], []
    end = 0
    for count, text in _characters(tokenizer, ids):
        texts.append(text)
        spans += [(end, end + len(text))] * count
        end += len(text)
    return "".join(texts), spans


def _candidates(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], tail: list[int], source: str | None
) -> Iterator[str]:
    """Texts that may have these tokens."""
    if source is not None:
        yield source
        return
    yield _decode(tokenizer, ids)
    if tail:
        yield _decode(tokenizer, ids + tail)


def _by_offsets(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], tail: list[int]
) -> tuple[str, list[Span]] | None:
    """What `locate` returns, from the tokenizer's own word on where its tokens come from; None
    where the text has other tokens.
    """
    for read in (plain_spans, control_spans):
        own, offsets = read(tokenizer, text)
        if own in (ids, ids + tail):
            break
    else:
        return None
    spans: list[Span] = []
    reached = 0
    for start, end in offsets[: len(ids)]:
        # Some tokenizers leave white space out of the spans; it goes with the token after it.
        start, reached = min(start, reached), max(end, reached)
        spans.append((start, reached))
    if len(own) == len(ids) and spans:
        reached = len(text)
        spans[-1] = (spans[-1][0], reached)
    return text[:reached], spans


def _characters(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]
) -> Iterator[tuple[int, str]]:
    """Cut the tokens into the smallest stretches that hold whole characters; each one's count of
    tokens and its text.
    """
    # Tokenizers drop the space at the beginning of a text, so the others are decoded after a token.
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][:1]
    before = len(_decode(tokenizer, anchor))
    known: dict[int, str] = {}

    def text(start: int, stop: int) -> str:
        if start == 0:
            return _decode(tokenizer, ids[:stop])
        if stop > start + 1:
            return _decode(tokenizer, [*anchor, *ids[start:stop]])[before:]
        if ids[start] not in known:
            known[ids[start]] = _decode(tokenizer, [*anchor, ids[start]])[before:]
        return known[ids[start]]

    start = 0
    while start < len(ids):
        stop, whole = start + 1, text(start, start + 1)
        broken = whole.count(_BROKEN)
        more = 1
        while broken and more < _CHARACTER_TOKENS and stop + more <= len(ids):
            # Tokens that read better together than apart share a character.
            joined = text(start, stop + more)
            apart = sum(text(i, i + 1).count(_BROKEN) for i in range(stop, stop + more))
            if joined.count(_BROKEN) < broken + apart:
                stop, whole, broken, more = stop + more, joined, joined.count(_BROKEN), 1
            else:
                more += 1
        yield stop - start, whole
        start = stop


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The ids as text, unchanged: some tokenizers would tidy up the blanks."""
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
