"""Several questions to one text that is read once: the second half of `homer demo`."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

from ..document import read
from ..encoding import encode
from ..model.llama import Llama
from ..text.controls import plain_ids
from .needles import Needle, draw_number, hide, split_sentences
from .samples import Sample, fill
from .words import draw_pair

NEW_TOKENS = 32


@dataclass(frozen=True)
class Asked:
    """One question to the text.

    Attributes:
        question: The question.
        expected: The number that was hidden.
        depth: Where its sentence stands in the text, from 0 to 1.
        text: The answer.
        right: Whether the answer holds the number.
        held: Whether the places that were read for the question hold it.
        place: The first of the answer's sources.
        found: Whether that is the hidden sentence.
        seconds: From the question to the end of its answer.
        seconds_to_first: From the question to the answer's first token.
    """

    question: str
    expected: str
    depth: float
    text: str
    right: bool
    held: bool
    place: str
    found: bool
    seconds: float
    seconds_to_first: float


@dataclass(frozen=True)
class BookResult:
    """What one reading took, what `encode` takes for one question, and all answers.

    Attributes:
        tokens: The text's.
        read_seconds: What reading once took.
        encode_seconds: What `encode` took for the first question.
        bytes_per_token: How much the document keeps.
        asked: The questions, in the order in which they were asked.
    """

    tokens: int
    read_seconds: float
    encode_seconds: float
    bytes_per_token: float
    asked: tuple[Asked, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)


def ask_book(
    model: Llama,
    text: str,
    tokens: int,
    questions: int = 5,
    seed: int = 0,
    chat_template: bool = True,
    on_step: Callable[[], None] = lambda: None,
) -> BookResult:
    """Hide sentences in a text, read it once, and ask for each of them in random order.

    Args:
        model: The model, with its tokenizer.
        text: A long text, a novel say, whose beginning is used.
        tokens: How long the text becomes, hidden sentences included.
        questions: How many sentences are hidden, at equal distances.
        seed: Of the sentences and the order.
        chat_template: As in `Document.ask`.
        on_step: Called after the reading, each answer, and the encoding: `questions + 2` times.

    Raises:
        ValueError: The model has no tokenizer, or the text has fewer tokens.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError("The model has no tokenizer, which questions need.")

    def count(part: str) -> int:
        return len(plain_ids(tokenizer, part))

    draw = random.Random(f"book/{seed}")
    keys: list[str] = []
    while len(keys) < questions:
        key = draw_pair(draw)
        if key not in keys:
            keys.append(key)
    needles = [Needle(key, draw_number(draw)) for key in keys]
    sentences = list(split_sentences(text))

    def build(entries: int) -> Sample:
        hidden = [needle.sentence for needle in needles]
        return Sample(hide(hidden, sentences[:entries]), "", ("",))

    book = fill(build, tokens, count, most=len(sentences)).context
    size = count(book)
    if size < 0.9 * tokens:
        raise ValueError(f"The text has {size:,} tokens and {tokens:,} are needed; give more.")
    # Looks for the heads, and lets libraries set themselves up.
    warm = read(model, book[: len(book) // 8])
    warm.ask("What is this?", chat_template=chat_template, max_new_tokens=1)
    templated = chat_template and bool(tokenizer.chat_template)
    start = perf_counter()
    document = read(model, book)
    read_seconds = perf_counter() - start
    on_step()
    asked: list[Asked] = []
    order = draw.sample(range(questions), questions)
    for number in order:
        needle = needles[number]
        sample = needle.ask(book, 0)
        # Without a template, the answer's beginning tells the model that it is to answer.
        question = sample.prompt if templated else sample.prompt + sample.reply
        start = perf_counter()
        answer = document.ask(question, chat_template=chat_template, max_new_tokens=NEW_TOKENS)
        seconds = perf_counter() - start
        places = [book[source.start : source.end] for source in answer.sources]
        told = Asked(
            question,
            needle.value,
            round(book.index(needle.sentence) / len(book), 3),
            answer.text,
            needle.value in answer.text,
            any(needle.value in place for place in places),
            places[0],
            needle.value in places[0],
            round(seconds, 3),
            round(seconds - answer.seconds + answer.seconds_to_first, 3),
        )
        asked.append(told)
        on_step()
    prefix, suffix = document.affixes(asked[0].question, chat_template=chat_template)
    start = perf_counter()
    encode(model, book, prefix, suffix)
    encode_seconds = perf_counter() - start
    on_step()
    return BookResult(
        size,
        round(read_seconds, 3),
        round(encode_seconds, 3),
        round(document.bytes_per_token, 1),
        tuple(asked),
    )
