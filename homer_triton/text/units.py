"""Cuts a text into units that are never taken apart: sentences, and lines that are records."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

from .controls import Span
from .survivors import sentence_ends, trim

# The most tokens of a unit. What is longer is cut between words.
LONGEST = 128
# Sentences of fewer bytes, such as "Yes." or a list's number, belong to what follows them.
SHORTEST = 8
# Lines of prose are this wide at least where somebody wrapped them.
_WRAPPED = 40
# A title or an initial: its full stop ends no sentence.
_TITLE = re.compile(
    r"(?:^|[\s\"“‘(\[_])(?:Mrs?|Ms|Dr|St|Mme|Mlle|Prof|Capt|Col|Gen|Lieut|Rev|Hon|Sr|Jr|No|vs|[A-Z])"
    r"\.$"
)
_BLANK = re.compile(r"\n[^\S\n]*\n\s*")


def cut_units(text: str, spans: Sequence[Span]) -> tuple[list[int], list[Span]]:
    """Cut a text and its tokens into units.

    A unit is a sentence. Where a line break is no line wrap, as in records, logs, code and verse,
    it is a line. What is longer than `LONGEST` tokens is cut between words.

    Args:
        text: The text.
        spans: The characters of each token, the white space before it included.

    Returns:
        Where each unit's tokens begin, ascending from 0 (empty for no tokens), and each unit's
        characters, without the white space around them.
    """
    if not spans:
        return [], []
    ends = [stop for _, stop in spans]
    starts: list[int] = []
    for cut in [0, *_cuts(text)]:
        # A token that holds a cut belongs to the unit before it, as `."` before a line break.
        first = bisect_left(ends, cut + 1) if cut else 0
        if first < len(spans) and spans[first][0] < cut and text[spans[first][0] : cut].strip():
            first += 1
        if first < len(spans) and (not starts or first > starts[-1]):
            starts.append(first)
    starts = _split_long(text, spans, starts)
    stops = [*starts[1:], len(spans)]
    return starts, [
        trim(text, spans[start][0], spans[stop - 1][1])
        for start, stop in zip(starts, stops, strict=True)
    ]


def _cuts(text: str) -> list[int]:
    """Where units of a text begin, but for the first."""
    cuts: list[int] = []
    begin = 0
    for paragraph_end in [*(match.end() for match in _BLANK.finditer(text)), len(text)]:
        paragraph = text[begin:paragraph_end]
        breaks = set() if _is_wrapped(paragraph) else _line_breaks(paragraph)
        last = 0
        for end in sorted(breaks.union(sentence_ends(paragraph), [len(paragraph)])):
            piece = paragraph[last:end].strip()
            short = len(piece.encode()) < SHORTEST and end not in breaks
            if end < len(paragraph) and (short or _TITLE.search(paragraph[max(end - 9, 0) : end])):
                continue
            if piece:
                cuts.append(begin + end)
            last = end
        begin = paragraph_end
    return [cut for cut in cuts if text[cut:].strip()] if text[-1:].isspace() else cuts[:-1]


def _line_breaks(paragraph: str) -> set[int]:
    """Where the lines of a paragraph end."""
    return {match.end() for match in re.finditer(r"\n", paragraph)}


def _is_wrapped(paragraph: str) -> bool:
    """Whether line breaks are only wraps: the next line's first word had no room before them, and
    sentences go on behind them.
    """
    lines = paragraph.strip().split("\n")
    width = max(map(len, lines))
    if len(lines) < 2 or width < _WRAPPED:
        return False
    full = goes_on = 0
    for line, after in pairwise(lines):
        word = after.split(maxsplit=1)[:1]
        full += len(line) + 1 + sum(map(len, word)) > 0.9 * width
        goes_on += after[:1].islower() or line[-1:].isalpha() or line[-1:] in ",;-—"
    return min(full, goes_on) >= 0.8 * (len(lines) - 1)


def _split_long(text: str, spans: Sequence[Span], starts: list[int]) -> list[int]:
    """The same starts, and more of them where a unit is too long."""
    every: list[int] = []
    for start, stop in pairwise([*starts, len(spans)]):
        every.append(start)
        while stop - start > LONGEST:
            start = _best_cut(text, spans, start)
            every.append(start)
    return every


def _best_cut(text: str, spans: Sequence[Span], start: int) -> int:
    """Where to cut a unit that is too long: behind a clause, or else between two words."""
    longest = range(start + LONGEST, start + LONGEST // 2, -1)
    for marks in (r"[;:,–—、，；：]$", r"$"):
        for token in longest:
            before, space = spans[token][0], text[spans[token][0] : spans[token][1]][:1].isspace()
            if (space or (before and not text[before - 1 : before + 1].isalnum())) and re.search(
                marks, text[max(before - 1, 0) : before]
            ):
                return token
    return start + LONGEST
