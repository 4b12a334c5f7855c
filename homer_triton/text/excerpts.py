"""Excerpts: some units of several texts, as one text to read again."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .controls import Span, plain_ids
from .pieces import locate

# What stands where text was left out: the first that a tokenizer knows.
GAPS = ("\n", " ")


@dataclass(frozen=True)
class Unit:
    """A unit of a text: the text's number, the unit's number among all, and its characters."""

    text: int
    number: int
    span: Span


@dataclass(frozen=True)
class Excerpt:
    """Token ids [T] to read again, and the number of each one's unit, -1 between units."""

    ids: Tensor
    units: Tensor

    @classmethod
    def of(cls, ids: Sequence[int], units: Sequence[int]) -> Excerpt:
        """An excerpt of these numbers."""
        ids_and_units = (torch.tensor(own, dtype=torch.int64, device="cpu") for own in (ids, units))
        return cls(*ids_and_units)


def join(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], units: Sequence[Unit]
) -> Excerpt:
    """Join units, in their order. Neighbours keep what stands between them; others get a gap."""
    gap = gap_of(tokenizer)
    pieces: list[str] = []
    spans: list[Span] = []
    reached, before = 0, None
    for unit in units:
        start, stop = unit.span
        if before is not None:
            together = (before.text, before.number + 1) == (unit.text, unit.number)
            pieces.append(texts[unit.text][before.span[1] : start] if together else gap)
            reached += len(pieces[-1])
        pieces.append(texts[unit.text][start:stop])
        spans.append((reached, reached + stop - start))
        reached += stop - start
        before = unit
    text = "".join(pieces)
    ids = plain_ids(tokenizer, text)
    starts = [start for start, _ in spans]
    numbers = []
    for _, stop in locate(tokenizer, ids, source=text)[1]:
        index = bisect_right(starts, stop - 1) - 1
        inside = index >= 0 and stop - 1 < spans[index][1]
        numbers.append(units[index].number if inside else -1)
    return Excerpt.of(ids, numbers)


def gap_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands where text was left out."""
    known = (gap for gap in GAPS if tokenizer.unk_token_id not in plain_ids(tokenizer, gap))
    return next(known, "")
