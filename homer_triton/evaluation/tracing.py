"""Variable tracking: which variables have a value, each from the one before (RULER, section 3.3).

One chain of four hops is hidden in the passkey task's filler. An example with its answer stands
before the text, and counts as instruction: as a user would have it, no method leaves it out.
"""

from __future__ import annotations

import random
import string
from itertools import chain

from .passkey import FILLER
from .samples import Count, Sample, fill

_INSTRUCTION = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
)
_NOISE = " ".join(FILLER) + "\n"
_VARIABLES = 5
_LETTERS, _EXAMPLE_LETTERS = 5, 3
# RULER's example takes up to 500 tokens, which common tokenizers reach with ten lines of noise.
_EXAMPLE_LINES = 10


def draw_trace(draw: random.Random, room: int, depth: float | None, count: Count) -> Sample:
    """A sample of the task; it has no depth."""
    value, example_value = draw.sample(range(10_000, 100_000), 2)
    prompt, reply = _question(value)
    names, statements = _draw_chain(draw, value, _LETTERS)
    seed, example_seed = draw.getrandbits(32), draw.getrandbits(32)
    example_names, example = _draw_chain(draw, example_value, _EXAMPLE_LETTERS)
    instruction = (
        _INSTRUCTION
        + _hide(example, _EXAMPLE_LINES, example_seed)
        + "\n"
        + "".join(_question(example_value))
        + f" {' '.join(example_names)}\n\n"
        + _INSTRUCTION
    )

    def build(lines: int) -> Sample:
        return Sample(
            _hide(statements, lines, seed), prompt, tuple(names), None, instruction, reply
        )

    return fill(build, room, count, least=len(statements))


def _question(value: int) -> tuple[str, str]:
    """The question for the variables of a value, and how its answer begins."""
    return (
        f"Question: Find all variables that are assigned the value {value} in the text above.",
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"{_VARIABLES} variables are assigned the value {value}, they are:",
    )


def _draw_chain(draw: random.Random, value: int, letters: int) -> tuple[list[str], list[str]]:
    """The names of variables, and the statements that give them a value, one after another."""
    names: list[str] = []
    while len(names) < _VARIABLES:
        name = "".join(draw.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    sources = [str(value), *(f"VAR {name}" for name in names[:-1])]
    return names, [f"VAR {name} = {source}" for name, source in zip(names, sources, strict=True)]


def _hide(statements: list[str], lines: int, seed: int) -> str:
    """Statements in their order, each before another line of the noise, at random."""
    places = sorted(random.Random(seed).sample(range(lines), len(statements)))
    before = dict(zip(places, statements, strict=True))
    hidden = ([before[i], _NOISE] if i in before else [_NOISE] for i in range(lines))
    return " ".join(chain.from_iterable(hidden)).rstrip()
