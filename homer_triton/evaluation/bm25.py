"""Passages that a question asks for, by BM25: what most people do with a text that is too long.

The text is cut into passages, which are ranked by the words that they share with the question
(Robertson & Zaragoza 2009, Lucene's variant, by the package bm25s); the plain model then reads the
best ones, in the text's own order. Passages of 100 are customary since Karpukhin et al. 2020.
"""

from __future__ import annotations

import os
import re

import torch
from torch import Tensor

from ..extras import require
from ..model.llama import Llama

# The most tokens in a passage.
PASSAGE_LEN = 100
# A budget holds this many passages at least: where it is small, they are shorter.
LEAST_PASSAGES = 4

_SENTENCE_END = re.compile(r"\n|[.!?…。！？][\"'”’»)\]]*\s*$")
_WORD = re.compile(r"\w+")


def require_bm25s() -> None:
    """Raise `ValueError` where bm25s is missing: to be asked before hours of work."""
    # Where JAX is installed bm25s sets it up, which takes three quarters of a GPU's memory unless
    # this says otherwise.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    require("bm25s", "The method 'retrieval'")


def retrieve(model: Llama, context: Tensor, question: Tensor, budget: int) -> Tensor:
    """The best passages of a text for a question, in the text's order: at most `budget` tokens.

    context, question: [tokens] token ids; returns [kept], one part of `context` after another.
    Passages are taken from the best on, each that still fits; of equal ones the earlier is better.
    A model without a tokenizer has token ids for words, and passages that end anywhere. Raises
    `ValueError` for a budget of less than one token, and where bm25s is missing.
    """
    if budget < 1:
        raise ValueError(
            "prefix and suffix leave target_len no room for a passage; raise it or shorten them."
        )
    longest = max(1, min(PASSAGE_LEN, budget // LEAST_PASSAGES))
    passages = context.split(passage_lengths(model, context, longest))
    *terms, asked = _terms(model, (*passages, question))
    kept: list[int] = []
    for index in rank(terms, asked):
        if len(passages[index]) <= budget:
            kept.append(index)
            budget -= len(passages[index])
    return torch.cat([passages[index] for index in sorted(kept)])


def passage_lengths(model: Llama, context: Tensor, longest: int) -> list[int]:
    """Where to cut a text: the lengths in tokens of its passages, at most `longest` each.

    context: [tokens]. A passage ends with the last sentence that ends in its second half, or is
    `longest` tokens long where none does.
    """
    ends = _sentence_ends(model, context)
    lengths = []
    start = 0
    while start < len(ends):
        stop = min(start + longest, len(ends))
        if stop < len(ends):
            near = range(stop, start + (longest + 1) // 2, -1)
            stop = next((after for after in near if ends[after - 1]), stop)
        lengths.append(stop - start)
        start = stop
    return lengths


def rank(passages: list[list[str]], question: list[str]) -> list[int]:
    """The indices of passages, given as their words, from the best for a question to the worst;
    equal ones in their order. Raises `ValueError` where bm25s is missing.
    """
    require_bm25s()
    import bm25s

    known = set().union(*passages)
    asked = [word for word in question if word in known]
    if not asked:
        return list(range(len(passages)))
    index = bm25s.BM25(method="lucene", backend="numpy")
    index.index(passages, show_progress=False)
    scores = index.get_scores(asked).tolist()
    return sorted(range(len(passages)), key=lambda passage: (-scores[passage], passage))


def _sentence_ends(model: Llama, context: Tensor) -> list[bool]:
    """Whether a sentence or a line ends with each token."""
    tokenizer, ids = model.tokenizer, context.tolist()
    if tokenizer is None:
        return [False] * len(ids)
    ends = {token: bool(_SENTENCE_END.search(str(tokenizer.decode([token])))) for token in set(ids)}
    return [ends[token] for token in ids]


def _terms(model: Llama, texts: tuple[Tensor, ...]) -> list[list[str]]:
    """The words of each text, in small letters."""
    if model.tokenizer is None:
        return [list(map(str, ids.tolist())) for ids in texts]
    decoded = (str(model.tokenizer.decode(ids.tolist(), skip_special_tokens=True)) for ids in texts)
    return [_WORD.findall(text.lower()) for text in decoded]
