"""`homer demo` on a tiny random model: nothing is retrieved, everything is measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import checkpoint, run

from homer_triton.cli.demo import in_words
from homer_triton.demo import CHECKPOINT
from homer_triton.evaluation.demo import SYSTEMS, TIMES, Answer, Measurement


@pytest.mark.process
def test_every_system_is_measured_at_every_length(tmp_path: Path) -> None:
    """And nothing is said beside the results, not even by libraries that its processes load."""
    model = checkpoint(tmp_path / "model", num_hidden_layers=8)
    command = [sys.executable, "-m", "homer_triton", "demo", "--model", str(model)]
    settings = ["--samples", "2", "--seed", "3", "--json"]
    ran = subprocess.run([*command, *settings], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    rows = json.loads(ran.stdout)["measurements"]
    assert [(row["times"], row["system"]) for row in rows] == [
        (times, system) for times in TIMES for system in SYSTEMS
    ]
    assert {row["tokens"] for row in rows} == {64 * times for times in TIMES}
    assert all(row["seconds"] > 0 and len(row["answers"]) == 2 for row in rows)
    keys = {tuple(answer["key"] for answer in row["answers"]) for row in rows if row["times"] == 4}
    assert len(keys) == 1  # every system is asked the same


@pytest.mark.process
def test_checkpoints_that_are_not_there_are_refused(tmp_path: Path) -> None:
    result = run("demo", "--model", tmp_path / "absent")
    assert result.exit_code == 2
    assert result.stderr.startswith("homer: ")
    assert result.stderr.count("\n") == 1


@pytest.fixture
def story(tmp_path: Path) -> Path:
    file = tmp_path / "story.txt"
    file.write_text("\n\n".join(f"The grass is green near house {i}." for i in range(400)))
    return file


def test_a_text_is_read_once_and_asked_for_all_that_is_hidden(story: Path) -> None:
    options = ("--model", CHECKPOINT, "--text", story, "--length", "4x", "--dtype", "float32")
    with pytest.warns(UserWarning, match="no retrieval heads"):
        report = json.loads(run("demo", *options, "--samples", 3, "--json").stdout)
    assert 0.97 * 1024 < report["tokens"] <= 1024
    assert report["read_seconds"] > 0
    assert report["encode_seconds"] > 0
    asked = report["asked"]
    assert sorted(round(one["depth"], 1) for one in asked) == [0.2, 0.5, 0.8]
    assert len({one["expected"] for one in asked}) == 3
    assert all(one["held"] for one in asked)
    assert sum(one["expected"] in one["place"] for one in asked) == sum(x["found"] for x in asked)
    again = run("demo", *options, "--samples", 3).stdout
    for one in asked:
        assert f"> {one['question']}\n  {' '.join(one['text'].split())}\n" in again


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--text", "story.txt"), "--text needs --model"),
        (("--text", "absent", "--model", CHECKPOINT), "There is no file absent."),
        (("--text", "story.txt", "--model", CHECKPOINT, "--length", "64x"), "16,384 are needed"),
        (("--text", "story.txt", "--model", CHECKPOINT, "--length", "y"), "The length 'y'"),
        (("--device", "cuda"), "--device needs --text"),
    ],
)
def test_what_a_text_cannot_be_asked_with(
    options: tuple[object, ...], sentence: str, story: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(story.parent)
    result = run("demo", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("homer: ")
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.fixture
def rows() -> list[Measurement]:
    right, wrong = (Answer("12345", "Key?", said) for said in ("1 2 3 4 5.", "no idea"))
    return [
        Measurement("plain model", 8, 2048, 0.25, 3 << 20, (wrong, right)),
        Measurement("HOMER", 8, 2048, 0.5, 1 << 20, (right, right)),
    ]


def test_accuracy_counts_right_answers(rows: list[Measurement]) -> None:
    assert [row.accuracy for row in rows] == [0.5, 1.0]


def test_words_show_an_example_before_the_table(rows: list[Measurement]) -> None:
    lines = in_words(rows, "some/model").splitlines()
    assert "The pass key 12345 is hidden in a text of 2,048 tokens" in lines[0]
    assert lines[2].split() == ["plain", "model:", "no", "idea", "(wrong)"]
    assert lines[3].endswith("1 2 3 4 5.  (right)")
    assert lines[7].split()[2:] == ["8×", "2,048", "1", "of", "2", "0.25", "s", "3.0", "MiB"]
    assert any("some/model" in line for line in lines)
    assert any(" at 16,384 tokens" in line for line in lines), "the real model's figures"
