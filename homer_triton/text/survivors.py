"""The kept tokens as text, for a reader that takes no KV cache: whole words, in their order."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from typing import Literal, get_args

from transformers import PreTrainedTokenizerBase

from ..checks import check_text
from .controls import Span, plain_ids
from .pieces import locate

Unit = Literal["token", "word", "sentence"]
GAP = " … "

# Scripts that put no space between words: Thai to Burmese, Khmer, and those of China and Japan.
_UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3000-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
    r"\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"
)
# Where a sentence is over: at its mark, unless a small letter follows, or at a blank line.
_SENTENCE_END = re.compile(
    r"(?<![.!?…])[.!?…]++[\"'”’»)\]]*+(?=\s+[^\sa-zß-ÿ])|(?<![。！？])[。！？]++[」』”’）]*|\n[^\S\n]*(?=\n)"
)
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")


def surviving_text(
    tokenizer: PreTrainedTokenizerBase,
    token_ids: Sequence[int],
    kept: Sequence[bool],
    target_len: int,
    unit: Unit = "word",
    gap: str = GAP,
    after: Sequence[int] = (),
    source: str | None = None,
) -> str:
    """What is left of a text where only some of its tokens are kept, in at most `target_len`
    tokens, counted in the result, gap marks included.

    token_ids, kept: [tokens], the text and which of its tokens stay. unit: "word" completes every
    kept token to its word, all up to white space, or in scripts without spaces to whole characters;
    "sentence" to its sentence; "token" to whole characters only. gap: what stands where words,
    sentences or tokens are left out; it ends in a line break or an empty line in place of a blank
    where what is left out holds one. after, source: as `pieces.locate` takes them.

    What does not fit is left out, first the units of whose tokens the smallest share is kept; of
    equal ones, those in the piece (all between two gaps) that has the fewest kept tokens, pieces of
    equal size by turns from all over the text and each from its end. Smaller units may take the
    room that a larger one did not fit.

    Raises `ValueError` for settings out of range, a `source` with other tokens, and a target that
    not a single unit fits.
    """
    if unit not in get_args(Unit):
        raise ValueError(f"unit={unit!r} is not known; choose one of {', '.join(get_args(Unit))}.")
    check_text(gap, "gap")
    if target_len < 1:
        raise ValueError(f"target_len={target_len} must be at least 1.")
    if len(kept) != len(token_ids):
        raise ValueError(f"{len(kept)} fates do not fit {len(token_ids)} tokens.")
    text, spans = locate(tokenizer, token_ids, after, source)
    units = _UNITS[unit](text, spans)
    sizes, kept_sizes = _count_tokens(units, spans, kept)

    def count(some: str) -> int:
        return len(plain_ids(tokenizer, some))

    def lay_out(chosen: Sequence[int]) -> str:
        return _join(text, units, sorted(chosen), gap)

    chosen: list[int] = []
    rest = ranked = _rank(sizes, kept_sizes)
    mark = count(gap)
    while rest:
        # The most of the rest that fit: `low` do, `high` do not.
        low, high, middle = 0, len(rest) + 1, len(rest)
        while high - low > 1:
            if count(lay_out(chosen + rest[:middle])) <= target_len:
                low = middle
            else:
                high = middle
            middle = (low + high) // 2
        chosen = chosen + rest[:low]
        room = target_len - count(lay_out(chosen)) - (mark if chosen else 0)
        rest = [index for index in rest[low + 1 :] if sizes[index] <= room]
    if ranked and not chosen:
        raise ValueError(f"target_len={target_len} has no room for a single {unit}; raise it.")
    return lay_out(chosen)


def _tokens(text: str, spans: Sequence[Span]) -> list[Span]:
    """What each token adds to the text: whole characters."""
    return [(start, stop) for start, stop in pairwise([0, *_ends(spans)]) if start < stop]


def _words(text: str, spans: Sequence[Span]) -> list[Span]:
    """The words: all between white space; where there is none by custom, what the tokens hold."""
    cuts = _ends(spans)
    words: list[Span] = []
    for match in re.finditer(r"\S+", text):
        start, stop = match.span()
        if _UNSPACED.search(match[0]):
            for cut in cuts[bisect_right(cuts, start) : bisect_right(cuts, stop - 1)]:
                at_unspaced = _UNSPACED.match(text[cut - 1]) or _UNSPACED.match(text[cut])
                # A mark that goes on top of a character belongs to it.
                if at_unspaced and not unicodedata.category(text[cut]).startswith("M"):
                    words.append((start, cut))
                    start = cut
        words.append((start, stop))
    return words


def sentence_ends(text: str) -> list[int]:
    """Where the sentences of a text end, but for the last."""
    return [match.end() for match in _SENTENCE_END.finditer(text)]


def _sentences(text: str, spans: Sequence[Span]) -> list[Span]:
    """The sentences, without the white space around them."""
    ends = sentence_ends(text)
    sentences = []
    for start, stop in zip([0, *ends], [*ends, len(text)], strict=True):
        start, stop = trim(text, start, stop)
        if start < stop:
            sentences.append((start, stop))
    return sentences


_UNITS: dict[str, Callable[[str, Sequence[Span]], list[Span]]] = {
    "token": _tokens,
    "word": _words,
    "sentence": _sentences,
}


def _ends(spans: Sequence[Span]) -> list[int]:
    """Where tokens end, ascending."""
    return sorted({stop for _, stop in spans})


def _count_tokens(
    units: Sequence[Span], spans: Sequence[Span], kept: Sequence[bool]
) -> tuple[list[int], list[int]]:
    """How many tokens, and how many kept ones, hold characters of each unit."""
    sizes, kept_sizes = [0] * len(units), [0] * len(units)
    ends = [stop for _, stop in units]
    for (start, stop), stays in zip(spans, kept, strict=True):
        index = bisect_right(ends, start)
        while index < len(units) and units[index][0] < stop:
            sizes[index] += 1
            kept_sizes[index] += bool(stays)
            index += 1
    return sizes, kept_sizes


def _rank(sizes: Sequence[int], kept_sizes: Sequence[int]) -> list[int]:
    """The units that hold kept tokens, the last to be left out first."""
    bits = len(sizes).bit_length()
    worth: dict[int, tuple[float, int, int, int]] = {}
    for stays, run in groupby(range(len(sizes)), key=lambda index: kept_sizes[index] > 0):
        if stays:
            piece = list(run)
            weight = sum(kept_sizes[index] for index in piece)
            # A number's digits from behind: neighbours come far apart.
            turn = int(f"{piece[0]:0{bits}b}"[::-1], 2)
            for index in piece:
                worth[index] = (-kept_sizes[index] / sizes[index], -weight, turn, index)
    return sorted(worth, key=worth.__getitem__)


def _join(text: str, units: Sequence[Span], chosen: Sequence[int], gap: str) -> str:
    """The chosen units' text, their indices ascending, with a mark where units are left out; the
    white space between neighbours, and at the ends of the text, goes with them.
    """
    pieces: list[Span] = []
    for order, index in enumerate(chosen):
        start = 0 if index == 0 else units[index][0]
        stop = len(text) if index == len(units) - 1 else units[index][1]
        if order and chosen[order - 1] == index - 1:
            start = pieces.pop()[0]
        pieces.append((start, stop))
    pieces = [piece for piece in pieces if text[slice(*piece)].strip()] or pieces[:1]
    if len(pieces) < 2:
        return "".join(text[slice(*piece)] for piece in pieces)
    # The blanks that tokens bring along belong to the gap, but for those at the ends of the text.
    inner = [trim(text, *piece) for piece in pieces]
    joined = [text[pieces[0][0] : inner[0][1]]]
    for (_, left), (right, stop) in pairwise(inner):
        joined += [_mark(text[left:right], gap), text[right:stop]]
    return "".join([*joined, text[inner[-1][1] : pieces[-1][1]]])


def _mark(missing: str, gap: str) -> str:
    """The mark for characters that are left out."""
    breaks = "\n\n" if _BLANK_LINE.search(missing) else "\n" if "\n" in missing else ""
    body = gap.rstrip()
    if not gap:
        return breaks or (" " if re.search(r"\s", missing) else "")
    return gap if breaks in gap[len(body) :] else body + breaks


def trim(text: str, start: int, stop: int) -> Span:
    """The same stretch without white space at its ends."""
    piece = text[start:stop]
    start += len(piece) - len(piece.lstrip())
    return start, max(start, start + len(piece.strip()))
