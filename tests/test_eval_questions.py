"""Questions of any task: which are asked, what fills a length, records and figures."""

import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from eval_model import LIMIT, save_model
from transformers import AutoTokenizer

import homer_triton as ht
from homer_triton.cli.eval_runs import layout_of
from homer_triton.demo import CHECKPOINT
from homer_triton.evaluation.methods import Reader, make_readers
from homer_triton.evaluation.passkey import PASSKEY
from homer_triton.evaluation.questions import (
    Cell,
    Layout,
    Questions,
    ask,
    check_lengths,
    draw_sample,
)
from homer_triton.evaluation.ruler import TASKS
from homer_triton.evaluation.runs import RunFolder
from homer_triton.evaluation.samples import Count, Sample, Task, fill
from homer_triton.text.tokens import split_input

RESULTS = Path(__file__).parents[1] / "bench" / "results"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ht.Llama:
    return ht.load(save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def layout(model: ht.Llama) -> Layout:
    return layout_of(model.tokenizer, False)


def draw_filler(draw: random.Random, room: int, depth: float | None, count: Count) -> Sample:
    word = draw.choice(["river", "stone"])

    def build(entries: int) -> Sample:
        return Sample("the grass " * entries, f"What of the {word}?", ("a", "b"), depth, "Read:\n")

    return fill(build, room, count, least=1)


def half_right(text: str, sample: Sample) -> float:
    return 0.5


HALF = Task("half", 5, draw_filler, half_right)
RIGHT = Task("right", 3, draw_filler, lambda text, sample: 1.0)


def run(
    model: ht.Llama,
    layout: Layout,
    path: Path,
    questions: Questions,
    readers: dict[str, Reader] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """Figures, records, and how many answers were heard of."""
    heard: list[None] = []
    readers = readers or dict(make_readers(("plain", "window"), model, ht.HomerConfig()))
    folder = RunFolder(path, {}, {})
    metrics = ask(model, readers, questions, layout, folder, lambda: heard.append(None))
    lines = (path / "predictions.jsonl").read_text().splitlines()
    return metrics, [json.loads(line) for line in lines], len(heard)


def test_every_length_has_its_number_of_questions(
    model: ht.Llama, layout: Layout, tmp_path: Path
) -> None:
    questions = Questions("both", (HALF, RIGHT), {96: 1, 64: 2}, 0)
    metrics, records, heard = run(model, layout, tmp_path, questions)
    assert len(records) == heard == 2 * len(questions) == 12
    assert [record["id"] for record in records] == [
        *(f"{m}/half/64/{n}" for n in (0, 1) for m in ("plain", "window")),
        *(f"{m}/right/64/{n}" for n in (0, 1) for m in ("plain", "window")),
        *(f"{m}/{task}/96/0" for task in ("half", "right") for m in ("plain", "window")),
    ]
    assert all(record["answers"] == ["a", "b"] for record in records)
    assert not any("depth" in record or "key" in record for record in records)
    rows = [(row["method"], row["length"], row["task"]) for row in metrics["by_task"]]
    assert rows == [
        (method, length, task)
        for method in ("plain", "window")
        for length in (64, 96)
        for task in ("half", "right")
    ]
    assert [row["accuracy"] for row in metrics["by_task"]] == [0.5, 1.0] * 4
    assert [(row["right"], row["total"]) for row in metrics["by_length"]] == [(3, 4), (1.5, 2)] * 2
    assert all(row["accuracy"] == 0.75 for row in metrics["by_length"])
    assert all(row["low"] < 0.75 < row["high"] for row in metrics["by_length"])
    assert "by_depth" not in metrics


def test_a_text_fills_its_length_and_every_token_counts(model: ht.Llama, layout: Layout) -> None:
    for task in (HALF, RIGHT):
        for length in range(40, 90):
            sample = draw_sample(model, Cell(task, length, None, 0), 0, layout)
            affixes = layout(sample.prompt, sample.instruction, sample.reply)
            prefix, context, suffix = split_input(model, sample.context, *affixes, 0)
            used = len(prefix) + len(context) + len(suffix) + task.new_tokens
            assert length - 2 < used <= length
            assert len(prefix) == 3
            assert prefix[0] == model.tokenizer.bos_token_id


@pytest.mark.parametrize("name", TASKS)
def test_rulers_texts_never_exceed_their_length(model: ht.Llama, layout: Layout, name: str) -> None:
    for number in range(2):
        cell = Cell(TASKS[name], 1500, None, number)
        sample = draw_sample(model, cell, 0, layout)
        affixes = layout(sample.prompt, sample.instruction, sample.reply)
        parts = split_input(model, sample.context, *affixes, 0)
        assert 1400 < sum(map(len, parts)) + cell.task.new_tokens <= 1500


def test_a_chat_model_begins_its_turn_with_the_reply(model: ht.Llama) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model.tokenizer.name_or_path)
    tokenizer.chat_template = "{{ bos_token }}[ {{ messages[0]['content'] }} ]"
    parts = ("Where?", "Read.\n", " It is")
    assert layout_of(tokenizer, True)(*parts) == ("<s>[ Read.\n", "\nWhere? ] It is")
    assert layout_of(tokenizer, False)(*parts) == ("<s>Read.\n", "\nWhere? It is")


def test_each_answer_says_what_it_cost(model: ht.Llama, layout: Layout, tmp_path: Path) -> None:
    questions = Questions("half", (HALF,), {64: 3, 96: 1}, 0)
    began = time.perf_counter()
    metrics, records, _ = run(model, layout, tmp_path, questions)
    assert 0 < sum(record["seconds"] for record in records) < time.perf_counter() - began
    assert all(0 <= record["peak_bytes"] < 2**30 for record in records)
    for row in metrics["by_length"]:
        own = [r for r in records if (r["method"], r["length"]) == (row["method"], row["length"])]
        assert row["seconds"] == pytest.approx(sum(r["seconds"] for r in own) / len(own))
        assert row["peak_bytes"] == max(r["peak_bytes"] for r in own)
    assert "by_task" not in metrics


def test_each_answer_says_what_was_kept_of_it(
    model: ht.Llama, layout: Layout, tmp_path: Path
) -> None:
    """All of it in the plain model's cache, nothing in a window that begins after it."""
    questions = Questions("passkey", (PASSKEY,), {600: 1}, 0, (0.1,))
    readers = make_readers(("plain", "window"), model, ht.HomerConfig())
    metrics, records, _ = run(model, layout, tmp_path, questions, dict(readers))
    assert [(r["method"], r["held"]) for r in records] == [("plain", 1), ("window", 0)]
    assert [row["held"] for row in metrics["by_length"]] == [1, 0]


def test_a_method_warms_up_on_a_short_text_before_it_is_timed(
    model: ht.Llama, layout: Layout, tmp_path: Path
) -> None:
    read: list[tuple[int, int]] = []
    (plain,) = make_readers(("plain",), model, ht.HomerConfig()).values()

    def spy(prefix: Any, context: Any, suffix: Any, new_tokens: int) -> Any:
        read.append((len(context), new_tokens))
        return plain(prefix, context, suffix, new_tokens)

    run(model, layout, tmp_path, Questions("half", (HALF,), {400: 2}, 0), {"spy": spy})
    assert read[0] == (LIMIT, 1)
    assert [new_tokens for _, new_tokens in read[1:]] == [5, 5]
    assert all(context > LIMIT for context, _ in read[1:])


def test_what_failed_is_wrong_and_has_no_cost(
    model: ht.Llama, layout: Layout, tmp_path: Path
) -> None:
    def fail(*_: Any) -> Any:
        raise ValueError("no room")

    metrics, records, _ = run(
        model, layout, tmp_path, Questions("right", (RIGHT,), {64: 2}, 0), {"fail": fail}
    )
    assert all(record["error"] == "ValueError: no room" for record in records)
    (row,) = metrics["by_length"]
    assert (row["right"], row["total"], row["errors"]) == (0, 2, 2)
    assert (row["seconds"], row["peak_bytes"]) == (None, None)


def test_records_of_before_there_were_costs_count(
    model: ht.Llama, layout: Layout, tmp_path: Path
) -> None:
    old = {"id": "plain/64/0.5/0", "method": "plain", "length": 64, "depth": 0.5, "right": True}
    tmp_path.joinpath("config.json").write_text('{"settings": {}}')
    tmp_path.joinpath("predictions.jsonl").write_text(json.dumps(old) + "\n")
    questions = Questions("passkey", (PASSKEY,), {64: 1}, 0, (0.5,))
    readers = dict(make_readers(("plain",), model, ht.HomerConfig()))
    metrics, records, heard = run(model, layout, tmp_path, questions, readers)
    assert (len(records), heard) == (1, 1)
    assert [metrics["by_length"][0][name] for name in ("right", "held", "seconds")] == [
        1,
        None,
        None,
    ]


def test_passkeys_are_those_of_the_committed_runs() -> None:
    model = ht.load(CHECKPOINT, dtype="float32", ops="torch")
    layout = layout_of(model.tokenizer, True)
    lines = (RESULTS / "passkey-merged" / "predictions.jsonl").read_text().splitlines()
    for line in lines[:: len(lines) // 15]:
        record = json.loads(line)
        cell = Cell(PASSKEY, record["length"], record["depth"], int(record["id"].split("/")[-1]))
        questions = Questions("passkey", (PASSKEY,), {record["length"]: 40}, 0, (record["depth"],))
        described = questions.describe("homer", cell)
        assert described == {name: record[name] for name in ("id", "method", "length", "depth")}
        sample = draw_sample(model, cell, 0, layout)
        parts = split_input(model, sample.context, *layout(sample.prompt), 0)
        assert sample.answer == record["key"]
        assert sum(map(len, parts)) == record["tokens"]
        assert PASSKEY.score(record["text"], sample) is record["right"]


@pytest.mark.parametrize(
    ("length", "depth", "reason"),
    [
        (9, None, "half, 9 tokens: the shortest text takes"),
        (64, 2.0, "passkey, 64 tokens: depth is 2"),
    ],
)
def test_what_cannot_be_asked_is_refused_first(
    model: ht.Llama, layout: Layout, length: int, depth: float | None, reason: str
) -> None:
    task = HALF if depth is None else PASSKEY
    questions = Questions(task.name, (task,), {length: 1}, 0, (depth,))
    with pytest.raises(ValueError, match=reason):
        check_lengths(model, questions, layout)
    check_lengths(model, replace(questions, samples={96: 1}, depths=(None,)), layout)


def test_every_depth_has_records_of_its_own() -> None:
    depths = (0.0, 0.1, 1 / 3, 0.333333, 0.3333333, 1e-7, 1.0)
    questions = Questions("passkey", (PASSKEY,), {64: 2}, 0, depths)
    ids = [str(questions.describe("plain", cell)["id"]) for cell in questions.cells()]
    assert len(set(ids)) == len(questions) == 14
    # As runs of earlier versions have them.
    assert {"plain/64/0/0", "plain/64/0.1/1", "plain/64/1/0", "plain/64/1e-07/0"} < set(ids)


def test_texts_differ_by_seed_length_depth_and_number(model: ht.Llama, layout: Layout) -> None:
    def key(length: int, depth: float, number: int, seed: int) -> str:
        return draw_sample(model, Cell(PASSKEY, length, depth, number), seed, layout).answer

    cells: list[Callable[[], str]] = [
        lambda: key(64, 0.5, 0, 0),
        lambda: key(65, 0.5, 0, 0),
        lambda: key(64, 0.6, 0, 0),
        lambda: key(64, 0.5, 1, 0),
        lambda: key(64, 0.5, 0, 1),
    ]
    assert len({cell() for cell in cells}) == 5
