"""Aggregation: which words are the most frequent of a text (RULER, section 3.4)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial

from .samples import Count, Sample, fill
from .words import draw_coded, draw_made_up, syllables_for

# From this many tokens on, RULER's 4,096 less what may surround a text, words stand more often.
FULL_LENGTH = 3584
_COMMON = 10
_COMMON_INSTRUCTION = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
_COMMON_QUESTION = "Question: What are the 10 most common words in the above list?"
_COMMON_REPLY = " Answer: The top 10 words that appear most often in the list are:"

_FREQUENT = 3
# Words of so long a text have three that stand more often than the fourth for certain.
_LEAST_CODED = 80
_NOISE = "..."
_FREQUENT_INSTRUCTION = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words.\n"
)
_FREQUENT_QUESTION = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three "
    "most frequently appeared words in the above coded text?"
)
_FREQUENT_REPLY = (
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)


def draw_common_words(draw: random.Random, room: int, depth: float | None, count: Count) -> Sample:
    """Common words extraction: ten words stand more often than the others in a numbered list,
    after an example with its answer, which counts as instruction; it has no depth.

    The ten stand 30 times and the others 3 times; 6 times and once in texts below `FULL_LENGTH`.
    """
    often, seldom = (30, 3) if room >= FULL_LENGTH else (6, 1)
    example_often, example_seldom, example_others = (
        (10, 3, 30) if room >= FULL_LENGTH else (3, 1, 10)
    )
    seed = draw.getrandbits(32)
    # The shortest words of which there are enough, since every one takes a token at least.
    syllables = syllables_for(room)
    words = _Vocabulary(partial(draw_made_up, draw, syllables))
    common, example_common = words.first(_COMMON), words.first(2 * _COMMON)[_COMMON:]
    used = 2 * _COMMON + example_others
    example = _list(
        example_common * example_often + words.first(used)[2 * _COMMON :] * example_seldom, seed
    )
    answer = _number(example_common)
    shown = f"{example}\n{_COMMON_QUESTION}{_COMMON_REPLY} {answer}\n"

    def build(others: int) -> Sample:
        entries = common * often + words.first(used + others)[used:] * seldom
        return Sample(
            _list(entries, seed),
            _COMMON_QUESTION,
            tuple(common),
            None,
            _COMMON_INSTRUCTION + shown + _COMMON_INSTRUCTION,
            _COMMON_REPLY,
        )

    return fill(build, room, count)


def draw_frequent_words(
    draw: random.Random, room: int, depth: float | None, count: Count
) -> Sample:
    """Frequent words extraction: coded words by a Zeta distribution, of which the first is noise;
    it has no depth.

    Of N words that of rank k stands N / (k² ζ(2)) times, rounded down.
    """
    seed = draw.getrandbits(32)
    words = _Vocabulary(partial(draw_coded, draw))
    answers = tuple(words.first(_FREQUENT))

    def build(total: int) -> Sample:
        most = total / (math.pi**2 / 6)
        ranked = [_NOISE, *words.first(math.isqrt(int(most)) - 1)]
        text = [word for rank, word in enumerate(ranked, 1) for _ in range(int(most / rank**2))]
        return Sample(
            " ".join(_shuffled(text, seed)),
            _FREQUENT_QUESTION,
            answers,
            None,
            _FREQUENT_INSTRUCTION,
            _FREQUENT_REPLY,
        )

    return fill(build, room, count, least=_LEAST_CODED)


class _Vocabulary:
    """Different words, drawn as they are needed."""

    def __init__(self, draw_word: Callable[[], str]) -> None:
        self._words: dict[str, None] = {}
        self._draw_word = draw_word

    def first(self, count: int) -> list[str]:
        while len(self._words) < count:
            self._words[self._draw_word()] = None
        return list(self._words)[:count]


def _list(words: list[str], seed: int) -> str:
    return _number(_shuffled(words, seed))


def _shuffled(words: list[str], seed: int) -> list[str]:
    return random.Random(seed).sample(words, len(words))


def _number(words: list[str]) -> str:
    """For example "1. lomeda 2. sifano"."""
    return " ".join(f"{index}. {word}" for index, word in enumerate(words, 1))
