"""A text cut by its tokens into units (sentences, or lines of records), as documents keep it."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..model.llama import Llama
from .controls import Span
from .pieces import locate
from .tokens import TokensLike, tokenize
from .units import cut_units

# Where a text has no tokenizer, so many tokens are a unit.
_UNIT_LEN = 32


@dataclass(frozen=True)
class Part:
    """A text that was cut.

    Attributes:
        name: Its name, or None.
        ids: Its token ids, [N] int64 on the CPU.
        text: The text; empty where there is no tokenizer.
        starts: The first token of each unit.
        spans: The characters of each unit, or its tokens where there is no tokenizer.
    """

    name: str | None
    ids: Tensor
    text: str
    starts: list[int]
    spans: list[Span]


def cut(model: Llama, name: str | None, text_or_ids: TokensLike) -> Part:
    """A text's tokens and units."""
    what = "text" if name is None else f"The text {name!r}"
    ids = tokenize(model, text_or_ids, what)
    if not len(ids):
        raise ValueError(
            f"{'The text' if name is None else what} is empty; give at least one token."
        )
    tokenizer = model.tokenizer
    if tokenizer is None:
        return _cut_evenly(name, ids)
    source = text_or_ids if isinstance(text_or_ids, str) else None
    text, spans = locate(tokenizer, ids.tolist(), source=source)
    starts, characters = cut_units(text, spans)
    return Part(name, ids, text, starts, characters)


def _cut_evenly(name: str | None, ids: Tensor) -> Part:
    """Token ids without a text, in units of equal length."""
    starts = list(range(0, len(ids), _UNIT_LEN))
    return Part(name, ids, "", starts, list(pairwise([*starts, len(ids)])))


def extend(model: Llama, part: Part, more: TokensLike) -> Part:
    """A text that goes on. Its last paragraph is cut into units again."""
    new = cut(model, None, more)
    ids = torch.cat([part.ids, new.ids])
    if model.tokenizer is None:
        return _cut_evenly(part.name, ids)
    text, paragraph = part.text + new.text, part.text.rfind("\n\n", 0, -1) + 1
    firsts = [start for start, _ in part.spans]
    unit = min(bisect_right(firsts, max(paragraph, 1) - 1), len(firsts) - 1)
    token = part.starts[unit]
    tail, spans = locate(model.tokenizer, ids[token:].tolist())
    if not text.endswith(tail):  # the tokenizer does not keep all of a text
        unit, token, tail = len(firsts), len(part.ids), new.text
        starts, characters = new.starts, new.spans
    else:
        starts, characters = cut_units(tail, spans)
    shift = len(text) - len(tail)
    return Part(
        part.name,
        ids,
        text,
        part.starts[:unit] + [token + start for start in starts],
        part.spans[:unit] + [(shift + start, shift + end) for start, end in characters],
    )
