"""Passkeys at many lengths and depths, by many methods (HOMER, section 4.1)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from time import perf_counter

import torch

from ..generation import generate
from ..model.llama import Llama
from ..tokens import split_input, tokenize
from .methods import Reader
from .passkey import PasskeySample, find_answer, make_sample
from .runs import Record, RunFolder
from .statistics import wilson_interval

NEW_TOKENS = 20

# What surrounds a text that ends in a question: the prefix (None for the default) and the suffix.
Layout = Callable[[str], tuple[str | None, str]]


@dataclass(frozen=True)
class PasskeyTask:
    """Which questions to ask: `samples` at each depth of each length.

    lengths: in tokens, the question and the answer included; depths: from 0, the text's beginning,
    to 1; seed: draws keys and texts.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    seed: int

    def __len__(self) -> int:
        return len(self.lengths) * len(self.depths) * self.samples

    def cells(self) -> Iterator[tuple[int, float, int]]:
        """Length, depth and number of every question."""
        yield from product(self.lengths, self.depths, range(self.samples))


def check_lengths(model: Llama, task: PasskeyTask, layout: Layout) -> None:
    """Raise `ValueError` where a length has no room for a key, or a depth is none."""
    for length, depth in product(task.lengths, task.depths):
        _draw(model, length, depth, 0, task.seed, layout)


def run_passkeys(
    model: Llama,
    readers: Mapping[str, Reader],
    task: PasskeyTask,
    layout: Layout,
    folder: RunFolder,
    on_answer: Callable[[], None],
) -> Record:
    """Ask every method every question, write all answers to the folder, and return the figures.

    The texts are the same for all methods. `on_answer` hears of each answer.
    """
    for length, depth, number in task.cells():
        sample = _draw(model, length, depth, number, task.seed, layout)
        for name, reader in readers.items():
            cell = {
                "id": _record_id(name, length, depth, number),
                "method": name,
                "length": length,
                "depth": depth,
                "key": sample.answer,
            }
            folder.complete(cell, partial(_answer, model, reader, sample, layout))
            on_answer()
    return passkey_metrics(folder, tuple(readers), task)


def passkey_metrics(folder: RunFolder, names: tuple[str, ...], task: PasskeyTask) -> Record:
    """Accuracy with its Wilson interval, by method and length, and by depth too.

    A question that failed counts as wrong.
    """
    by_length: list[Record] = []
    by_depth: list[Record] = []
    for name, length in product(names, task.lengths):
        cells = {
            depth: [
                folder.records[_record_id(name, length, depth, number)]
                for number in range(task.samples)
            ]
            for depth in task.depths
        }
        where = {"method": name, "length": length}
        by_length.append(where | accuracy(list(chain(*cells.values()))))
        by_depth += [
            where | {"depth": depth} | accuracy(records) for depth, records in cells.items()
        ]
    return {"task": "passkey", "by_length": by_length, "by_depth": by_depth}


def accuracy(records: list[Record]) -> Record:
    """How many records are right, and the 95 % interval of that share."""
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


def _draw(
    model: Llama, length: int, depth: float, number: int, seed: int, layout: Layout
) -> PasskeySample:
    """A question whose text, with all that surrounds it and the answer, fills its length."""

    def count(text: str) -> int:
        return len(tokenize(model, text, "the passkey text"))

    def draw(room: int) -> PasskeySample:
        own_seed = random.Random(f"{seed}/{length}/{depth}/{number}").getrandbits(32)
        return make_sample(room, depth, own_seed, count)

    question = draw(length).prompt
    prefix, suffix = layout(question)
    before, _, after = split_input(model, "x", prefix, suffix, 0)
    around = len(before) + len(after) - count(question)
    return draw(length - around - NEW_TOKENS)


@torch.no_grad()
def _answer(model: Llama, reader: Reader, sample: PasskeySample, layout: Layout) -> Record:
    prefix, suffix = layout(sample.prompt)
    start = perf_counter()
    reading = reader(*split_input(model, sample.context, prefix, suffix, 0), NEW_TOKENS)
    answer = generate(reading.model, reading.encoded, max_new_tokens=NEW_TOKENS)
    return {
        "text": answer.text,
        "right": find_answer(answer.text) == sample.answer,
        "tokens": len(reading.encoded.token_ids),
        "rows": len(reading.encoded),
        "seconds": round(perf_counter() - start, 4),
    }


def _record_id(name: str, length: int, depth: float, number: int) -> str:
    return f"{name}/{length}/{depth:g}/{number}"
