"""What a question about a long text is, and how a text is made to fill its length."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

# A text's number of tokens, special tokens not counted.
Count = Callable[[str], int]

# How many entries the second try has more than the first: enough to tell what an entry takes.
_PROBE = 16


@dataclass(frozen=True)
class Sample:
    """One text, what is asked about it, and what is expected.

    context: the text; prompt: the question after it; answers: the strings that a right answer
    holds; depth: where the answer stands in the text, from 0 to 1, None if in no single place;
    instruction: what is said before the text; reply: how the answer begins, "" to leave that to the
    model.
    """

    context: str
    prompt: str
    answers: tuple[str, ...]
    depth: float | None = None
    instruction: str = ""
    reply: str = ""

    @property
    def answer(self) -> str:
        """The first of the answers, of most tasks the only one."""
        return self.answers[0]

    def affix_size(self, count: Count) -> int:
        """Tokens of all that is not the text."""
        return count(self.instruction) + count(self.prompt + self.reply)

    def size(self, count: Count) -> int:
        """Tokens of text, instruction and question."""
        return count(self.context) + self.affix_size(count)


def match_all(generated: str, sample: Sample) -> float:
    """The share of the answers that stand in a generated text, whatever their case (the "string
    match all" of Hsieh et al. 2024).
    """
    text = generated.lower()
    return sum(answer.lower() in text for answer in sample.answers) / len(sample.answers)


@dataclass(frozen=True)
class Task:
    """A kind of question.

    name: in records and figures; new_tokens: how many an answer takes at most; draw: a sample of at
    most so many tokens, from a seeded random, the tokens, the depth of what is looked for (None for
    anywhere) and a count of tokens. Its question must be the same for any number of tokens. It
    raises `ValueError` where there is no room for the shortest text. score: what a generated text
    is worth, from 0 to 1.
    """

    name: str
    new_tokens: int
    draw: Callable[[random.Random, int, float | None, Count], Sample]
    score: Callable[[str, Sample], float] = match_all


def fill(
    build: Callable[[int], Sample],
    room: int,
    count: Count,
    least: int = 0,
    most: int | None = None,
) -> Sample:
    """The sample of as many entries as fit `room` tokens; one more would not.

    build: a sample of so many entries, between `least` and `most` (None for any number), that grows
    with them. Raises `ValueError` where even `least` entries do not fit.
    """

    def size(entries: int) -> int:
        return build(entries).size(count)

    low, used = least, size(least)
    if used > room:
        raise ValueError(f"the shortest text takes {used} tokens, and there is room for {room}.")
    shortest, step = used, _PROBE
    high, over = most, None
    # Up by what an entry takes, until more do not fit.
    while over is None and low != most:
        entries = low + step if most is None else min(low + step, most)
        taken = size(entries)
        if taken > room:
            high, over = entries, taken
        else:
            low, used = entries, taken
            step = max(1, (room - used) * (low - least) // max(used - shortest, 1))
    # Between the two by the same, and every other time by half, which ends however uneven it is.
    halve = False
    while over is not None and high is not None and high - low > 1:
        part = (high - low) * (room - used) // (over - used)
        entries = (low + high) // 2 if halve else min(max(low + part, low + 1), high - 1)
        taken = size(entries)
        if taken > room:
            high, over = entries, taken
        else:
            low, used = entries, taken
        halve = not halve
    return build(low)
