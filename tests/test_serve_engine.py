"""The thread that owns the model: who runs beside whom, and who waits for whom."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from serving import CONFIG, MiB, load_demo, story, wait_for

import homer_triton as ht
from homer_triton.answering import Question
from homer_triton.serving.engine import BusyError, ClosingError, Engine
from homer_triton.serving.events import Ended, Event, Failed, Read, Walked
from homer_triton.serving.groups import Group
from homer_triton.serving.jobs import Job, Reading
from homer_triton.serving.memory import Memory
from homer_triton.text.tokens import split_input

Heard = list[tuple[str, Event]]


@pytest.fixture(scope="module")
def model() -> ht.Llama:
    return load_demo()


@pytest.fixture(scope="module")
def short(model: ht.Llama) -> ht.EncodedContext:
    return ht.encode(model, "The grass is green. The sky is", config=CONFIG)


@contextmanager
def engine_of(model: ht.Llama, running: int = 16, waiting: int = 64) -> Iterator[Engine]:
    engine = Engine(model, CONFIG, running, waiting, Memory(64 * MiB))
    yield engine
    if engine.is_alive:
        engine.close()


def long_reading(model: ht.Llama) -> Reading:
    parts = split_input(model, story(12121) * 4, None, "\nThe pass key is", 128)
    return Reading(*parts, CONFIG, False)


def job(
    heard: Heard,
    name: str,
    source: ht.EncodedContext | Reading,
    new: int = 3,
    answers: int = 1,
    tell: Callable[[Event], None] | None = None,
) -> Job:
    def note(event: Event) -> None:
        heard.append((name, event))
        if tell is not None:
            tell(event)

    decodings = (ht.Decoding(new),) * answers
    return Job(source, torch.tensor([], dtype=torch.int64), decodings, note)


def order(heard: Heard, kind: type) -> list[str]:
    return [name for name, event in heard if isinstance(event, kind)]


def test_who_is_ready_does_not_wait_until_a_long_text_is_read(
    model: ht.Llama, short: ht.EncodedContext
) -> None:
    heard: Heard = []
    with engine_of(model) as engine:
        engine.start()
        both = [job(heard, "short", short), job(heard, "long", long_reading(model))]
        engine.submit(both)
        wait_for(lambda: len(order(heard, Ended)) == 2)
    assert order(heard, Ended) == ["short", "long"]
    names = [(name, type(event)) for name, event in heard]
    assert names.index(("short", Ended)) < names.index(("long", Read))
    assert len(order(heard, Walked)) > 30


def test_one_that_comes_while_a_text_is_read_is_answered_before(
    model: ht.Llama, short: ht.EncodedContext
) -> None:
    heard: Heard = []
    with engine_of(model) as engine:
        engine.start()
        late = job(heard, "late", short, new=5)

        def walked(event: Event) -> None:
            if isinstance(event, Walked) and late not in submitted:
                submitted.append(late)
                engine.submit([late])

        submitted: list[Job] = []
        engine.submit([job(heard, "long", long_reading(model), tell=walked)])
        wait_for(lambda: len(order(heard, Ended)) == 2)
    assert order(heard, Ended) == ["late", "long"]


@pytest.mark.slow
def test_never_more_run_than_there_is_room_for(model: ht.Llama, short: ht.EncodedContext) -> None:
    heard: Heard = []
    most = 0
    with engine_of(model, running=4) as engine:

        def look(_: Event) -> None:
            nonlocal most
            most = max(most, engine.running)

        engine.start()
        reading = long_reading(model)
        jobs = [job(heard, "long", reading, new=9, tell=look)]
        jobs += [
            job(heard, f"{i}", short, new=6 + i, answers=1 + i % 3, tell=look) for i in range(9)
        ]
        engine.submit(jobs)
        wait_for(lambda: len(order(heard, Ended)) == 1 + 3 * 6)
    assert most == 4
    assert not order(heard, Failed)


@pytest.mark.slow
def test_one_that_comes_later_joins_those_that_run(
    model: ht.Llama, short: ht.EncodedContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    formed: list[int] = []

    class Counted(Group):
        def __init__(self, *args: Any) -> None:
            formed.append(1)
            super().__init__(*args)

    monkeypatch.setattr("homer_triton.serving.engine.Group", Counted)
    longer = ht.encode(model, "The sun is yellow. The grass is green. The sky is", config=CONFIG)
    much_longer = ht.encode(model, story(1), suffix="The pass key is", config=CONFIG)
    heard: Heard = []
    with engine_of(model) as engine:
        later = iter([longer, short, much_longer, longer])

        def next_one(event: Event) -> None:
            """Let another come whenever one has begun."""
            source = next(later, None) if isinstance(event, Read) else None
            if source is not None:
                engine.submit([job(heard, f"{len(source)}", source, new=40, tell=next_one)])

        engine.start()
        engine.submit([job(heard, "first", short, new=40, tell=next_one)])
        wait_for(lambda: len(order(heard, Ended)) == 5)
    assert not order(heard, Failed)
    assert len(formed) == 2  # for those of other lengths need other room
    answers = {name: event.answer.token_ids for name, event in heard if isinstance(event, Ended)}
    for source in (short, longer, much_longer):
        assert answers[f"{len(source)}"] == ht.generate(model, source, None, 40).token_ids


def test_who_is_gone_ends_a_reading(model: ht.Llama, short: ht.EncodedContext) -> None:
    heard: Heard = []
    with engine_of(model) as engine:
        engine.start()
        gone = job(heard, "gone", long_reading(model))
        engine.submit([gone])
        wait_for(lambda: len(order(heard, Walked)) > 2)
        engine.cancel([gone])
        engine.submit([job(heard, "next", short)])
        wait_for(lambda: len(order(heard, Ended)) == 1)
        assert not engine.is_reading
    assert order(heard, Ended) == ["next"]
    assert len(order(heard, Walked)) < 60
    assert order(heard, Read) == ["next"]


def test_a_queue_takes_all_of_a_request_or_none(model: ht.Llama, short: ht.EncodedContext) -> None:
    heard: Heard = []
    with engine_of(model, waiting=3) as engine:
        with pytest.raises(ClosingError):  # it has not begun
            engine.submit([job(heard, "early", short)])
        engine.start()
        with pytest.raises(BusyError):
            engine.submit([job(heard, "many", short) for _ in range(4)])
        engine.submit([job(heard, "few", short) for _ in range(3)])
        wait_for(lambda: len(order(heard, Ended)) == 3)
        engine.close()
        with pytest.raises(ClosingError):
            engine.submit([job(heard, "late", short)])
    assert {name for name, _ in heard} == {"few"}


def test_a_question_without_room_fails_alone(
    model: ht.Llama, short: ht.EncodedContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(question: Question, _: ht.Llama) -> None:
        if question.decoding.max_new_tokens == 7:
            raise ValueError("No room.")

    monkeypatch.setattr(Question, "check", check)
    heard: Heard = []
    with engine_of(model) as engine:
        engine.start()
        engine.submit([job(heard, str(new), short, new) for new in (5, 7, 6)])
        wait_for(lambda: len(order(heard, Ended) + order(heard, Failed)) == 3)
    assert (order(heard, Failed), sorted(order(heard, Ended))) == (["7"], ["5", "6"])
