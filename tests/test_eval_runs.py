"""Run folders and intervals."""

import json
import math
import os
import random
from pathlib import Path

import pytest
from rank_processes import run_ranks

from homer_triton.evaluation.runs import Record, RunFolder
from homer_triton.evaluation.statistics import bootstrap_interval, wilson_interval
from homer_triton.ranks import Ranks

SETTINGS = {"task": "passkey", "lengths": (64, 128), "homer": {"selection": "votes"}}


def open_run(path: Path, **changes: object) -> RunFolder:
    return RunFolder(path, {**SETTINGS, **changes}, {"python": "3"})


def answer(number: int) -> Record:
    return {"id": f"plain/{number}", "method": "plain"}


def lines(path: Path) -> list[Record]:
    return [json.loads(line) for line in (path / "predictions.jsonl").read_text().splitlines()]


def test_predictions_are_written_at_once_and_not_made_twice(tmp_path: Path) -> None:
    run = open_run(tmp_path / "deep" / "run")
    run.complete(answer(1), lambda: {"right": True})
    assert lines(run.path) == [{"id": "plain/1", "method": "plain", "right": True}]
    again = open_run(run.path)
    again.complete(answer(1), lambda: pytest.fail("made twice"))
    again.complete(answer(2), lambda: {"right": False})
    assert [record["id"] for record in lines(run.path)] == ["plain/1", "plain/2"]
    assert again.records["plain/1"]["right"]


@pytest.mark.parametrize("rest", [1, 5, 40])
def test_a_line_cut_short_is_dropped_and_made_again(tmp_path: Path, rest: int) -> None:
    run = open_run(tmp_path)
    for number in (1, 2):
        run.complete(answer(number), lambda: {"text": "Ü" * 20})
    file = tmp_path / "predictions.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-rest])
    again = open_run(tmp_path)
    assert list(again.records) == ["plain/1"]
    again.complete(answer(2), lambda: {"text": "Ü" * 20})
    assert file.read_bytes() == whole


def test_a_failing_prediction_is_recorded_with_its_error(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    run.complete(answer(1), lambda: {"right": 1 // 0})
    (record,) = lines(tmp_path)
    assert record["error"] == "ZeroDivisionError: integer division or modulo by zero"
    assert record["method"] == "plain"
    assert "right" not in record


def test_an_interrupt_is_no_failure(tmp_path: Path) -> None:
    def interrupt() -> Record:
        raise KeyboardInterrupt

    run = open_run(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run.complete(answer(1), interrupt)
    assert not (tmp_path / "predictions.jsonl").exists()


def test_other_settings_are_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    open_run(tmp_path).complete(answer(1), lambda: {"right": True})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"other settings \(homer, seed\)"):
        open_run(tmp_path, seed=1, homer={"selection": "paper"})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_run_may_grow(tmp_path: Path) -> None:
    open_run(tmp_path).complete(answer(1), lambda: {"right": True})
    more = open_run(tmp_path, lengths=(64, 128, 256), samples=3)
    more.complete(answer(1), lambda: pytest.fail("made twice"))
    settings = json.loads((tmp_path / "config.json").read_text())["settings"]
    assert (settings["lengths"], settings["samples"]) == ([64, 128, 256], 3)


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        open_run(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json is not a run's config"):
        open_run(tmp_path)


def test_what_a_killed_process_left_is_no_hindrance(tmp_path: Path) -> None:
    left = [f".{'0a' * 16}.tmp", f".config.json.{'f0' * 16}.tmp"]
    for name in left:
        (tmp_path / name).write_text("{")
    open_run(tmp_path).complete(answer(1), lambda: {})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "predictions.jsonl"]
    (tmp_path / left[0]).write_text("{")
    assert "plain/1" in open_run(tmp_path).records
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "predictions.jsonl"]


def test_a_folder_whose_files_cannot_be_written_is_refused_and_stays(tmp_path: Path) -> None:
    open_run(tmp_path)
    for name in ("predictions.jsonl", "metrics.json"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match="it is a pipe"):
            open_run(tmp_path, samples=9)
        (tmp_path / name).unlink()
    assert "samples" not in (tmp_path / "config.json").read_text()


def test_names_that_are_not_utf8_are_kept(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.txt")
    run = open_run(tmp_path, texts=[name])
    run.complete({"id": name}, lambda: {})
    assert list(open_run(tmp_path, texts=[name]).records) == [name]


def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Cannot write"):
        open_run(tmp_path / "file")
    with pytest.raises(ValueError, match="Cannot write"):
        open_run(tmp_path / "file" / "run")


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    for number in (1, 2, 3):
        run.complete(answer(number), lambda: {})
    file = tmp_path / "predictions.jsonl"
    whole = file.read_text()
    huge = "1" + "0" * 400
    for damage in (
        "plain/2",
        '"plain/2", "right": "yes"',
        '"plain/2", "right": ""',
        f'"plain/2", "right": {huge}',
        "[" * 9999,
    ):
        file.write_text(whole.replace('"plain/2"', damage))
        with pytest.raises(ValueError, match=r"Line 2 of .* is damaged"):
            open_run(tmp_path)


def test_wilson_intervals_are_the_published_ones() -> None:
    # Newcombe 1998, table I.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)


def test_wilson_intervals_take_fractions_of_right_answers() -> None:
    low, high = wilson_interval(81.5, 263)
    assert wilson_interval(81, 263)[0] < low < wilson_interval(82, 263)[0]
    assert wilson_interval(81, 263)[1] < high < wilson_interval(82, 263)[1]
    # Scores between 0 and 1 spread less than right and wrong of the same mean.
    draw = random.Random(0)
    for _ in range(200):
        scores = [draw.choice((0.2, 0.4, 0.6)) for _ in range(30)]
        low, high = wilson_interval(sum(scores), 30)
        assert low < 0.4 < high


def test_bootstrap_intervals_cover_the_mean_as_often_as_they_say() -> None:
    draw = random.Random(0)
    covered = 0
    for trial in range(200):
        losses = [draw.gauss(2.0, 0.5) for _ in range(40)]
        low, high = bootstrap_interval(losses, [64] * 40, seed=trial, resamples=400)
        covered += low < math.exp(2.0) < high
    assert 180 <= covered <= 199


def test_bootstrap_weighs_segments_by_their_tokens() -> None:
    assert bootstrap_interval([1.5], [10], seed=0) == pytest.approx((math.exp(1.5),) * 2)
    low, high = bootstrap_interval([1.0] * 50 + [3.0] * 50, [999] * 50 + [1] * 50, seed=0)
    assert math.exp(1.0) < low < high < math.exp(1.02)


GROUPS = [[f"{method}/{number}" for method in ("plain", "homer")] for number in range(7)]


def predict_groups(folder: Path, ranks: Ranks | None, stop_before: int = len(GROUPS)) -> RunFolder:
    run = RunFolder(folder, SETTINGS, {}, ranks)
    for group in GROUPS[:stop_before]:
        for name in run.mine(group):
            run.complete({"id": name}, lambda: {"made_by": 0 if ranks is None else ranks.rank})
    return run


def test_ranks_share_a_run_in_turns(tmp_path: Path) -> None:
    run = tmp_path / "run"

    def share(_: int) -> tuple[dict[str, Record], bool]:
        shared = predict_groups(run, Ranks())
        shared.gather()
        shared.finish({"n": 1})
        return shared.records, shared.is_first

    found = run_ranks(3, tmp_path, share)
    records, _ = found[0]
    assert found == [(records, True), (records, False), (records, False)]
    assert set(records) == {name for group in GROUPS for name in group}
    makers = [{records[name]["made_by"] for name in group} for group in GROUPS]
    assert makers == [{1}, {2}, {0}, {1}, {2}, {0}, {1}]
    assert {record["id"] for record in lines(run)} == set(records)
    assert sorted(os.listdir(run)) == ["config.json", "metrics.json", "predictions.jsonl"]


def test_a_shared_run_that_was_killed_goes_on_with_other_ranks_or_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (tmp_path / "before").mkdir()
    run_ranks(3, tmp_path / "before", lambda _: predict_groups(run, Ranks(), 4).path)
    assert (run / "predictions-1.jsonl").is_file()
    with (run / "predictions-2.jsonl").open("a") as file:
        file.write('{"id": "plain/6", "ma')  # killed in mid-line
    alone = predict_groups(run, None)
    made_by = {name: record["made_by"] for name, record in alone.records.items()}
    assert [made_by[f"homer/{n}"] for n in range(7)] == [1, 2, 0, 1, 0, 0, 0]
    assert {record["id"]: record["made_by"] for record in lines(run)} == made_by
    assert sorted(os.listdir(run)) == ["config.json", "predictions.jsonl"]


def test_ranks_with_other_settings_are_refused(tmp_path: Path) -> None:
    def share(rank: int) -> None:
        RunFolder(tmp_path / "run", {**SETTINGS, "seed": rank}, {}, Ranks())

    for error in run_ranks(2, tmp_path, share):
        assert isinstance(error, ValueError)
        assert "another seed than rank" in str(error)
    assert not (tmp_path / "run" / "predictions.jsonl").exists()
