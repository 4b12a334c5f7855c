"""Six tasks of RULER that need no data: retrieval, tracing and aggregation in made-up texts.

Hsieh et al. 2024, "RULER: What's the Real Context Size of Your Long-Context Language Models?"
(section 3; templates of appendix D). The templates, the counts and the length of an answer are
RULER's; the words and the generators are ours. Three things differ: a template's first line ends in
a line break in every task, an answer's beginning ends without a space, and RULER's own English
words are made-up ones in common words extraction.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable

from .aggregation import draw_common_words, draw_frequent_words
from .needles import Needle, draw_number
from .passkey import FILLER
from .samples import Count, Sample, Task, fill
from .tracing import draw_trace
from .words import draw_pair

_NOISE = " ".join(FILLER)


def _draw_uuid(draw: random.Random) -> str:
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def _draw_needle(
    draw_key: Callable[[random.Random], str],
    draw_value: Callable[[random.Random], str],
    noun: str,
    among_needles: bool,
) -> Callable[[random.Random, int, float | None, Count], Sample]:
    """Needle in a haystack: of the noise, or of other needles of the same kind."""

    def draw_sample(draw: random.Random, room: int, depth: float | None, count: Count) -> Sample:
        needle = Needle(draw_key(draw), draw_value(draw), noun)
        place = draw.random() if depth is None else depth
        lines: list[str] = []

        def draw_line() -> str:
            while among_needles:
                other = Needle(draw_key(draw), draw_value(draw), noun)
                if other.key != needle.key and other.value != needle.value:
                    return other.sentence
            return _NOISE

        def build(entries: int) -> Sample:
            while len(lines) < entries:
                lines.append(draw_line())
            split = round(place * entries)
            context = [*lines[:split], needle.sentence, *lines[split:entries]]
            return needle.ask("\n".join(context), place)

        return fill(build, room, count)

    return draw_sample


_TASKS = (
    Task("niah_single_1", 128, _draw_needle(draw_pair, draw_number, "number", False)),
    Task("niah_multikey_2", 128, _draw_needle(draw_pair, draw_number, "number", True)),
    Task("niah_multikey_3", 128, _draw_needle(_draw_uuid, _draw_uuid, "uuid", True)),
    Task("vt", 30, draw_trace),
    Task("cwe", 120, draw_common_words),
    Task("fwe", 50, draw_frequent_words),
)
TASKS = {task.name: task for task in _TASKS}


def choose_tasks(names: tuple[str, ...]) -> tuple[Task, ...]:
    """The tasks of these names.

    Raises `ValueError` for an unknown one, for one that is named twice, and for none.
    """
    if not names:
        raise ValueError(f"--tasks is empty; choose from {', '.join(TASKS)}.")
    for name in names:
        if name not in TASKS:
            raise ValueError(f"The task {name!r} is not known; choose from {', '.join(TASKS)}.")
        if names.count(name) > 1:
            raise ValueError(f"The task {name!r} is named twice.")
    return tuple(TASKS[name] for name in names)
