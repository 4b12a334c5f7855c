"""Questions about long texts, whose answers are looked up in what a model generates: any tasks, at
many lengths and depths, by many methods.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import product
from time import perf_counter
from typing import Protocol

import torch

from ..generation import generate
from ..model.llama import Llama
from ..text.tokens import split_input, tokenize
from .memory import watch_peak
from .methods import Reader, Reading
from .runs import Record, RunFolder
from .samples import Sample, Task, match_all
from .statistics import wilson_interval

_STAND_IN = Sample("x", "What is it?", ("",))


class Layout(Protocol):
    """What surrounds a text that ends in a question: the prefix (None for the default) and the
    suffix, from the question, what is said before the text, and how the answer begins.
    """

    def __call__(
        self, question: str, instruction: str = "", reply: str = ""
    ) -> tuple[str | None, str]: ...


@dataclass(frozen=True)
class Cell:
    """One question's place: the task, the text's length in tokens, the depth, and a number."""

    task: Task
    length: int
    depth: float | None
    number: int


@dataclass(frozen=True)
class Questions:
    """Which questions to ask: of every task at every length and depth.

    name: the evaluation's, which its only task may share; samples: how many at each depth of each
    length, by the length in tokens, all that surrounds the text and the answer included; seed:
    draws the texts; depths: from 0, the text's beginning, to 1, None for anywhere.
    """

    name: str
    tasks: tuple[Task, ...]
    samples: Mapping[int, int]
    seed: int
    depths: tuple[float | None, ...] = (None,)

    def __len__(self) -> int:
        return len(self.tasks) * len(self.depths) * sum(self.samples.values())

    @property
    def many_tasks(self) -> bool:
        """Whether records and figures name their task."""
        return any(task.name != self.name for task in self.tasks)

    @property
    def has_depths(self) -> bool:
        """Whether records and figures name a depth."""
        return self.depths != (None,)

    def cells(self) -> Iterator[Cell]:
        """Every question, those of the shortest texts first."""
        for length, samples in sorted(self.samples.items()):
            for task, depth, number in product(self.tasks, self.depths, range(samples)):
                yield Cell(task, length, depth, number)

    def describe(self, method: str, cell: Cell) -> Record:
        """What a record says of its place; its "id" is the only one of the run."""
        parts = [method, cell.length, cell.number]
        named: Record = {"method": method}
        if self.many_tasks:
            parts.insert(1, cell.task.name)
            named["task"] = cell.task.name
        named["length"] = cell.length
        if cell.depth is not None:
            parts.insert(-1, str(cell.depth).removesuffix(".0"))  # all digits: no two share an id
            named["depth"] = cell.depth
        return {"id": "/".join(map(str, parts)), **named}


def check_lengths(model: Llama, questions: Questions, layout: Layout) -> None:
    """Raise `ValueError` where a length has no room for a task's text, or a depth is none."""
    for cell in questions.cells():
        if cell.number == 0:
            try:
                draw_sample(model, cell, questions.seed, layout)
            except ValueError as error:
                raise ValueError(f"{cell.task.name}, {cell.length:,} tokens: {error}") from error


def draw_sample(model: Llama, cell: Cell, seed: int, layout: Layout) -> Sample:
    """A question whose text, with all that surrounds it and the answer, fills its length.

    Raises `ValueError` where there is no room for it.
    """

    def count(text: str) -> int:
        return len(tokenize(model, text, "the text of a question"))

    def room_beside(question: Sample) -> int:
        before, _, after = split_input(model, "x", *_affixes(layout, question), 0)
        around = len(before) + len(after) - question.affix_size(count)
        return cell.length - cell.task.new_tokens - around

    def draw(room: int) -> Sample:
        depth = "" if cell.depth is None else f"/{cell.depth}"
        own = random.Random(f"{seed}/{cell.length}{depth}/{cell.number}")
        return cell.task.draw(own, room, cell.depth, count)

    room = room_beside(_STAND_IN)
    sample = draw(room)
    exact = room_beside(sample)
    return sample if exact == room else draw(exact)


def ask(
    model: Llama,
    readers: Mapping[str, Reader],
    questions: Questions,
    layout: Layout,
    folder: RunFolder,
    on_answer: Callable[[], None],
) -> Record:
    """Ask every method every question, write all answers to the folder, and return the figures.

    The texts are the same for all methods. `on_answer` hears of each answer.
    """
    warm: set[str] = set()
    for cell in questions.cells():
        places = {name: questions.describe(name, cell) for name in readers}
        missing = folder.mine([place["id"] for place in places.values()])
        if missing:
            sample = draw_sample(model, cell, questions.seed, layout)
            expected = {"answers": sample.answers} if cell.depth is None else {"key": sample.answer}
            for name in (name for name in readers if places[name]["id"] in missing):
                question = partial(_answer, model, readers[name], cell.task, sample, layout)
                if name not in warm:
                    _warm_up(model, readers[name], sample, layout)
                    warm.add(name)
                folder.complete({**places[name], **expected}, question)
                on_answer()
        for _ in range(len(readers) - len(missing)):
            on_answer()
    folder.gather()
    return make_metrics(folder, tuple(readers), questions)


def make_metrics(folder: RunFolder, names: tuple[str, ...], questions: Questions) -> Record:
    """The accuracy by method and length with its Wilson interval, the mean share of the answers
    that the kept tokens hold, and the cost of an answer; by depth and by task too where there are
    several.

    By length it is the mean over all tasks, which have as many questions each. A question that
    failed counts as wrong.
    """
    cells = list(questions.cells())

    def figures(name: str, length: int, **where: object) -> Record:
        chosen = [
            folder.records[questions.describe(name, cell)["id"]]
            for cell in cells
            if cell.length == length
            and where.get("task", cell.task.name) == cell.task.name
            and where.get("depth", cell.depth) == cell.depth
        ]
        costs = {} if "depth" in where else mean_costs(chosen)
        held = mean_of(chosen, "held")
        shares = {**accuracy(chosen), "held": held}
        return {"method": name, "length": length, **where, **shares, **costs}

    places = list(product(names, sorted(questions.samples)))
    metrics: Record = {
        "task": questions.name,
        "by_length": [figures(*place) for place in places],
    }
    if questions.has_depths:
        metrics["by_depth"] = [
            figures(*place, depth=depth) for place in places for depth in questions.depths
        ]
    if questions.many_tasks:
        metrics["by_task"] = [
            figures(*place, task=task.name) for place in places for task in questions.tasks
        ]
    return metrics


def accuracy(records: list[Record]) -> Record:
    """How many records are right, in sum where some are right in part, and the 95 % interval of
    that share.
    """
    right = sum(record.get("right", False) for record in records)
    low, high = wilson_interval(right, len(records))
    return {
        "right": right,
        "total": len(records),
        "errors": sum("error" in record for record in records),
        "accuracy": right / len(records),
        "low": low,
        "high": high,
    }


def mean_costs(records: list[Record]) -> Record:
    """The mean time of an answer in seconds, and the most memory that one took, in bytes; None
    where no record knows.
    """
    peaks = [record["peak_bytes"] for record in records if record.get("peak_bytes") is not None]
    return {"seconds": mean_of(records, "seconds"), "peak_bytes": max(peaks, default=None)}


def mean_of(records: list[Record], name: str) -> float | None:
    """The mean of what the records that know it say, None where none does."""
    known = [record[name] for record in records if record.get(name) is not None]
    return sum(known) / len(known) if known else None


def _affixes(layout: Layout, sample: Sample) -> tuple[str | None, str]:
    return layout(sample.prompt, sample.instruction, sample.reply)


@torch.no_grad()
def _answer(model: Llama, reader: Reader, task: Task, sample: Sample, layout: Layout) -> Record:
    """What a method says, what that is worth, how much of the answer it had before it, and what it
    cost: seconds of reading and answering, and the most memory above what was in use before, in
    bytes.
    """
    affixes = _affixes(layout, sample)
    peak_above = watch_peak(model.device)
    start = perf_counter()
    reading = reader(*split_input(model, sample.context, *affixes, 0), task.new_tokens)
    text, score = _generate(reading, task, sample)
    seconds = round(perf_counter() - start, 4)
    return {
        "text": text,
        "right": score,
        "held": _held(reading, sample),
        "tokens": len(reading.encoded.token_ids),
        "rows": len(reading.encoded),
        "seconds": seconds,
        "peak_bytes": peak_above(),
    }


def _held(reading: Reading, sample: Sample) -> float:
    """The share of the answers that stand in the tokens which a method keeps, question left out:
    where it is more than what is right, the model does not make use of what it has.
    """
    encoded, tokenizer = reading.encoded, reading.model.tokenizer
    assert tokenizer is not None
    kept = encoded.source_indices
    kept = kept[kept < encoded.plan.input_len - encoded.plan.suffix_len]
    return match_all(str(tokenizer.decode(encoded.token_ids[kept])), sample)


def _generate(reading: Reading, task: Task, sample: Sample) -> tuple[str, float]:
    """The answer and its score. Where the score only asks what is in the answer, one that has it
    all early is not told to its end.
    """
    lengths = [task.new_tokens]
    if task.score is match_all:
        lengths.insert(0, -(-task.new_tokens // 4))
    text, score = "", 0.0
    for length in lengths:
        text = generate(reading.model, reading.encoded, max_new_tokens=length).text
        score = task.score(text, sample)
        if score == 1:
            break
    return text, score


@torch.no_grad()
def _warm_up(model: Llama, reader: Reader, sample: Sample, layout: Layout) -> None:
    """Read the first of a text and forget it: what libraries take to set themselves up is no part
    of a method's cost.
    """
    prefix, context, suffix = split_input(model, sample.context, *_affixes(layout, sample), 0)
    # A method that fails will say so when it is asked.
    with suppress(Exception):
        reading = reader(prefix, context[: model.config.context_limit], suffix, 1)
        generate(reading.model, reading.encoded, max_new_tokens=1)
