"""Needles: a magic number hidden in a text, by the words of RULER (Hsieh et al. 2024).

Here the text is one that a user gives, novels say. RULER's own haystacks are in `ruler`.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from .samples import Count, Sample, Task, fill
from .words import draw_pair

NUMBER_DIGITS = 7
# The answer follows at once; a tokenizer may take a token for each digit.
NEW_TOKENS = 32

_PARAGRAPH = re.compile(r"\n\s*\n")
# A full stop with what closes around it, and a capital, with what opens before it.
_SENTENCE = re.compile(r"[.!?]+[\"'”’)\]]*\s+(?=[\"'“‘(\[_]*[^\W\d_a-z])")
# A title or an initial, whose full stop ends nothing.
_TITLE = re.compile(
    r"[\"“‘(\[_]*(?:Mrs?|Ms|Dr|St|Mme|Mlle|Prof|Capt|Col|Gen|Lieut|Rev|Hon|[A-Z])\.\s"
)


@dataclass(frozen=True)
class Needle:
    """A key and its value, and what is said of them; noun: what the value is."""

    key: str
    value: str
    noun: str = "number"

    @property
    def sentence(self) -> str:
        """What is hidden."""
        return f"One of the special magic {self.noun}s for {self.key} is: {self.value}."

    def ask(self, context: str, depth: float) -> Sample:
        """The question for the value, after a text that holds the sentence."""
        what = f"special magic {self.noun} for {self.key} mentioned in the provided text"
        return Sample(
            context,
            prompt=f"What is the {what}?",
            answers=(self.value,),
            depth=depth,
            instruction=f"A special magic {self.noun} is hidden within the following text. Make "
            f"sure to memorize it. I will quiz you about the {self.noun} afterwards.\n",
            reply=f" The {what} is",
        )


def draw_number(draw: random.Random) -> str:
    """A number of seven digits."""
    return str(draw.randrange(10 ** (NUMBER_DIGITS - 1), 10**NUMBER_DIGITS))


def split_sentences(text: str) -> Iterator[str]:
    """The sentences of a text, white space made single spaces; an empty line ends one too."""
    for paragraph in _PARAGRAPH.split(text):
        line, begin = " ".join(paragraph.split()), 0
        for end in _SENTENCE.finditer(line):
            word = line.rfind(" ", begin, end.start()) + 1 or begin
            if not _TITLE.fullmatch(line, word, end.end()):
                yield line[begin : end.end()].rstrip()
                begin = end.end()
        if begin < len(line):
            yield line[begin:]


def hide(hidden: Sequence[str], sentences: Sequence[str]) -> str:
    """A text of sentences, with others at equal distances among them."""
    lines = list(sentences)
    for number, one in reversed(list(enumerate(hidden))):
        lines.insert(round((number + 0.5) / len(hidden) * len(sentences)), one)
    return " ".join(lines)


def needles_in(texts: Sequence[str], count_tokens: Count) -> Task:
    """The task of one needle in a random stretch of the texts, which are taken one after another.

    The stretch is cut at sentence ends, and the needle stands between the two sentences that are
    nearest to its depth, in tokens. A sample of more tokens than the texts have is refused.
    """
    sentences = [sentence for text in texts for sentence in split_sentences(text)]
    # Tokens before each sentence, where one follows another.
    before = [0, *accumulate(count_tokens(f" {sentence}") for sentence in sentences)]

    def draw_sample(
        draw: random.Random, room: int, depth: float | None, count_tokens: Count
    ) -> Sample:
        needle = Needle(draw_pair(draw), draw_number(draw))
        place = draw.random() if depth is None else depth
        if not 0 <= place <= 1:
            raise ValueError(f"depth is {place}; it must lie between 0 and 1.")
        stretch = room - needle.ask(needle.sentence, place).size(count_tokens)
        if before[-1] < stretch:
            raise ValueError(
                f"the texts hold {before[-1]:,} tokens and {stretch:,} are needed; give more."
            )
        latest = bisect_right(before, before[-1] - max(stretch, 0)) - 1
        first = draw.randint(0, latest)

        def build(entries: int) -> Sample:
            begin, end = before[first], before[first + entries]
            goal = begin + place * (end - begin)
            split = bisect_left(before, goal, first, first + entries)
            if split > first and goal - before[split - 1] < before[split] - goal:
                split -= 1
            lines = [*sentences[first:split], needle.sentence]
            return needle.ask(" ".join([*lines, *sentences[split : first + entries]]), place)

        sample = fill(build, room, count_tokens, most=len(sentences) - first)
        if 2 * sample.size(count_tokens) < room:
            raise ValueError("a sentence of the texts is longer than half of it.")
        return sample

    return Task("needles", NEW_TOKENS, draw_sample)
