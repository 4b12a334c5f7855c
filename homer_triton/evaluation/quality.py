"""QuALITY: multiple-choice questions about long articles (Pang et al. 2022; HOMER, section 4.2)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..model.errors import shorten
from ..model.llama import Llama
from ..text.controls import words
from ..text.tokens import split_input, tokenize
from .methods import Reader, token_losses
from .questions import Layout, accuracy
from .runs import Record, RunFolder

_QUESTION = "Question: {question}\nAnswer:"


@dataclass(frozen=True)
class Question:
    """One question: its article's number in the data, the options, and which of them is right."""

    article: int
    number: int
    text: str
    options: tuple[str, ...]
    right: int
    hard: bool


@dataclass(frozen=True)
class QualityData:
    """Articles, and the questions about them."""

    articles: tuple[str, ...]
    questions: tuple[Question, ...]


def read_quality(path: str | Path) -> QualityData:
    """Read a file in QuALITY's own format: a JSON object with an article and questions a line.

    Raises `FileNotFoundError`, or `ValueError` that names the first line that cannot be used.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    articles: list[str] = []
    questions: list[Question] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            article = _text(entry, "article")
            questions += _questions(entry, len(articles))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"Line {number} of {path} cannot be used: {shorten(error)}") from error
        articles.append(article)
    if not questions:
        raise ValueError(f"{path} holds no questions.")
    return QualityData(tuple(articles), tuple(questions))


def run_quality(
    model: Llama,
    readers: Mapping[str, Reader],
    data: QualityData,
    layout: Layout,
    folder: RunFolder,
    on_answer: Callable[[], None],
) -> Record:
    """Let every method choose the likeliest option of every question, write all choices to the
    folder, and return the accuracies.

    An option's likelihood is the mean over its tokens, so that long options are not at a loss.
    `on_answer` hears of each choice.
    """
    for question in data.questions:
        ids = {name: _record_id(name, question) for name in readers}
        mine = folder.mine(list(ids.values()))
        article = data.articles[question.article]
        for name, reader in readers.items():
            if ids[name] in mine:
                cell: Record = {"id": ids[name], "method": name}
                cell |= {"article": question.article, "question": question.number}
                folder.complete(cell, partial(_choose, model, reader, article, question, layout))
            on_answer()
    folder.gather()
    by_method: list[Record] = []
    for name in readers:
        for subset in ("all", "hard"):
            chosen = [q for q in data.questions if q.hard or subset == "all"]
            if chosen:
                records = [folder.records[_record_id(name, question)] for question in chosen]
                by_method.append({"method": name, "subset": subset, **accuracy(records)})
    return {"task": "quality", "by_method": by_method}


@torch.no_grad()
def _choose(
    model: Llama, reader: Reader, article: str, question: Question, layout: Layout
) -> Record:
    """The losses of a question's options after its article, and whether the right one is least."""
    prefix, suffix = layout(_QUESTION.format(question=question.text))
    answers = [_option_ids(model, suffix, option) for option in question.options]
    parts = split_input(model, article, prefix, suffix, 0)
    reading = reader(*parts, max(map(len, answers)))
    losses = []
    for ids in answers:
        of_tokens = token_losses(reading, ids)
        losses.append(sum(of_tokens) / len(of_tokens))
    choice = losses.index(min(losses))
    return {
        "losses": losses,
        "choice": choice,
        "gold": question.right,
        "right": choice == question.right,
        "tokens": sum(map(len, parts)),
    }


def _option_ids(model: Llama, suffix: str, option: str) -> torch.Tensor:
    """An option's token ids where it follows the suffix; tokenizers may mark a word's beginning."""
    joined = suffix + ("" if suffix[-1:].isspace() else " ") + words(option)
    before, whole = (
        tokenize(model, text, name, special_tokens=True)
        for text, name in ((suffix, "suffix"), (joined, "option"))
    )
    if len(whole) > len(before) and torch.equal(whole[: len(before)], before):
        return whole[len(before) :]
    return tokenize(model, option, "option")


def _questions(entry: dict[str, Any], article: int) -> Iterator[Question]:
    """The questions of one line; raises `ValueError` for what is missing or misshapen."""
    listed = entry.get("questions")
    if not isinstance(listed, list):
        raise ValueError("it has no list of questions.")
    for number, item in enumerate(listed):
        if not isinstance(item, dict):
            raise ValueError(f"question {number + 1} is not an object.")
        options, gold = item.get("options"), item.get("gold_label")
        if (
            not isinstance(options, list)
            or len(options) < 2
            or not all(isinstance(option, str) and option.strip() for option in options)
        ):
            raise ValueError(f"question {number + 1} has no list of two or more options.")
        if type(gold) is not int or not 1 <= gold <= len(options):
            raise ValueError(
                f"question {number + 1} has gold_label {gold!r}, not a number from 1 to "
                f"{len(options)} (the test set is published without)."
            )
        hard = item.get("difficult") == 1
        yield Question(article, number, _text(item, "question"), tuple(options), gold - 1, hard)


def _text(entry: Any, name: str) -> str:
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"it has no {name}.")
    return value


def _record_id(name: str, question: Question) -> str:
    return f"{name}/{question.article}/{question.number}"
