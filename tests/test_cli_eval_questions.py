"""`homer eval needles` and `homer eval ruler` from the command line to the folder."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from eval_model import save_model

from homer_triton.cli.eval_options import describe_samples, parse_samples
from homer_triton.evaluation.ruler import TASKS

LIMIT = 1024


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), max_position_embeddings=LIMIT)


def read(folder: Path, name: str = "metrics.json") -> Any:
    return json.loads((folder / name).read_text())


def predictions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def novel(sentences: int) -> str:
    return " ".join(f"The river number {i} runs over the old stone." for i in range(sentences))


@pytest.mark.slow
def test_needles_run_from_texts_to_plots(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(novel(60))
    (tmp_path / "b.txt").write_text(novel(60))
    output = tmp_path / "run"
    texts = ("--text", tmp_path / "a.txt", "--text", tmp_path / "b.txt")
    arguments = ("--methods", "window,homer", "--lengths", "0.25x,1x", "--depths", "0,0.5")
    result = run(
        *("eval", "needles", "--model", model, *texts, *arguments, "--layers-warmup", 0),
        *("--samples", "0.25x:2,1x:1", "-o", output),
    )
    assert result.exit_code == 0, result.output
    answers, metrics, config = predictions(output), read(output), read(output, "config.json")
    assert [answer["id"] for answer in answers] == [
        *(f"{m}/256/{d}/{n}" for d in ("0", "0.5") for n in (0, 1) for m in ("window", "homer")),
        *(f"{m}/1024/{d}/0" for d in ("0", "0.5") for m in ("window", "homer")),
    ]
    assert not any("error" in answer for answer in answers)
    assert all(len(answer["key"]) == 7 for answer in answers)
    assert all(answer["tokens"] + 32 <= answer["length"] for answer in answers)
    assert [row["total"] for row in metrics["by_length"]] == [4, 2, 4, 2]
    for row in metrics["by_length"]:
        own = [a for a in answers if (a["method"], a["length"]) == (row["method"], row["length"])]
        assert row["seconds"] == pytest.approx(sum(a["seconds"] for a in own) / len(own))
        assert row["peak_bytes"] == max(a["peak_bytes"] for a in own)
    assert len(metrics["by_depth"]) == 8
    assert config["settings"]["samples"] == {"256": 2, "1024": 1}
    assert config["settings"]["texts"] == [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert "per question" in result.stdout
    assert "peak memory" in result.stdout
    for name in ("accuracy_by_length.png", "depth_by_length.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_ruler_runs_all_its_tasks(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    result = run(
        *("eval", "ruler", "--model", model, "--methods", "plain,homer", "--lengths", "1200"),
        *("--samples", 1, "--layers-warmup", 0, "-o", output),
    )
    assert result.exit_code == 0, result.output
    answers, metrics = predictions(output), read(output)
    assert [answer["id"] for answer in answers] == [
        f"{method}/{task}/1200/0" for task in TASKS for method in ("plain", "homer")
    ]
    assert not any("error" in answer for answer in answers)
    for answer in answers:
        new_tokens = TASKS[answer["task"]].new_tokens
        assert 1200 - 100 < answer["tokens"] + new_tokens <= 1200
    assert {answer["task"]: len(answer["answers"]) for answer in answers} == {
        **dict.fromkeys(("niah_single_1", "niah_multikey_2", "niah_multikey_3"), 1),
        **{"vt": 5, "cwe": 10, "fwe": 3},
    }
    assert [(row["task"], row["total"]) for row in metrics["by_task"]] == [
        *((task, 1) for task in TASKS),
        *((task, 1) for task in TASKS),
    ]
    for row in metrics["by_length"]:
        own = [task for task in metrics["by_task"] if task["method"] == row["method"]]
        assert row["total"] == 6
        assert row["accuracy"] == pytest.approx(sum(task["accuracy"] for task in own) / 6)
    assert all(task in result.stdout for task in TASKS)
    assert (output / "accuracy_by_length.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_some_of_rulers_tasks_go_on_where_they_stopped(model: Path, tmp_path: Path) -> None:
    command = (
        *("eval", "ruler", "--model", model, "--methods", "window", "--lengths", "700"),
        *("--tasks", "fwe, niah_single_1", "--samples", 2, "--no-plots", "--json"),
        *("-o", tmp_path / "run"),
    )
    first = json.loads(run(*command).stdout)
    file = tmp_path / "run" / "predictions.jsonl"
    whole = file.read_text()
    file.write_text("".join(whole.splitlines(keepends=True)[:3]))
    again = json.loads(run(*command).stdout)
    assert [row["task"] for row in again["by_task"]] == ["fwe", "niah_single_1"]
    assert [row["accuracy"] for row in again["by_task"]] == [
        row["accuracy"] for row in first["by_task"]
    ]
    texts = [json.loads(line)["text"] for line in whole.splitlines()]
    assert [answer["text"] for answer in predictions(tmp_path / "run")] == texts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("ruler", "--tasks", "vt,qa_1"), "'qa_1' is not known; choose from niah_single_1"),
        (("ruler", "--tasks", "vt,vt"), "'vt' is named twice"),
        (("ruler", "--tasks", ","), "--tasks is empty"),
        (("ruler", "--lengths", "150"), "niah_single_1, 150 tokens: the shortest text takes"),
        (("ruler", "--lengths", "600"), "cwe, 600 tokens: the shortest text takes"),
        (("ruler", "--samples", "0"), "--samples '0' must be a number from 1 on"),
        (("needles", "--text", "NOVEL", "--samples", "many"), "'many' must be a number from 1 on"),
        (("needles", "--text", "MISSING"), "There is no file"),
        (("needles", "--text", "NOVEL"), "are needed; give more"),
        (("needles", "--text", "NOVEL", "--text", "SHORT"), "are needed; give more"),
        (("needles", "--text", "EMPTY"), "the texts hold 0 tokens"),
        (("passkey", "--samples", "1x:2"), "has no number for 4,096 tokens"),
        (("ablation", "--samples", "-1"), "must be a number from 1 on"),
        (("ablation", "--parts", ""), "No part is named"),
        (("passkey", "--methods", ""), "No method is named; choose from plain"),
        (("needles", "--text", "NOVEL", "--methods", " , "), "No method is named"),
        (("passkey", "--lengths", "1e400x"), "'1e400x' must be at most"),
        (("passkey", "--lengths", "1e999999999"), "'1e999999999' is neither"),
        (("passkey", "--lengths", "1e-999999999x"), "must be at least one token"),
        (("passkey", "--lengths", "nan"), "The length 'nan' is neither"),
        (("passkey", "--lengths", "inf"), "'inf' must be at most"),
        (("passkey", "--samples", "9" * 30), "must be a number from 1 on"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_folder(
    model: Path, tmp_path: Path, arguments: tuple[str, ...], reason: str
) -> None:
    (tmp_path / "NOVEL").write_text(novel(200))
    (tmp_path / "SHORT").write_text(novel(20))
    (tmp_path / "EMPTY").write_text("\n")
    places = [str(tmp_path / a) if a.isupper() else a for a in arguments]
    result = run("eval", *places, "--model", model, "-o", tmp_path / "run")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert reason in result.stderr
    assert not (tmp_path / "run").exists()


def test_samples_are_one_number_or_one_for_each_length() -> None:
    lengths = (256, 512, 1000)
    assert parse_samples("12", lengths, 128) == {256: 12, 512: 12, 1000: 12}
    each = parse_samples("2x:12, 1000:3, 512:6", lengths, 128)
    assert each == {256: 12, 512: 6, 1000: 3}
    assert describe_samples(each) == {"256": 12, "512": 6, "1000": 3}
    assert describe_samples({256: 4, 512: 4}) == 4


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "must be a number from 1 on"),
        ("2x:0,4x:1", "must be a number from 1 on"),
        ("2x:,4x:1", "must be a number from 1 on"),
        ("1.5", "must be a number from 1 on"),
        ("2x:3", "has no number for 512 tokens"),
        ("2x:3,4x:2,8x:1", "must name each of --lengths once, which 8x is not"),
        ("2x:3,256:2,4x:1", "must name each of --lengths once, which 256 is not"),
        ("3,4", "must be a number from 1 on"),
        ("3,4x:2", "must name each of --lengths once, which 3 is not"),
        ("2y:3", "The length '2y' is neither"),
    ],
)
def test_other_samples_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_samples(text, (256, 512), 128)
