"""The sweep of the kernels' sizes, tiny ones in the interpreter, and the table that it writes."""

import json
import sys
from pathlib import Path

import pytest
from kernel_cases import DEVICE

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

import op_cases
import tune
import tune_sizes

from homer_triton.kernels import attention, tiles
from homer_triton.kernels.attention import Tile

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="a rehearsal")
CANDIDATES = {
    "scoring": {"programs": [4], "least_rows": [8, 16], "elements": [8192], "threads": [128]},
    "voting": {"rows": [16], "query_heads": [1], "threads": [128]},
    "decoding": {"elements": [1024], "programs": [4], "threads": [128], "stages": [2]},
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tiny cases, and a table of their own, in memory and as a file."""
    monkeypatch.setattr(tune_sizes, "MODELS", op_cases.TINY)
    monkeypatch.setattr(tune_sizes, "BATCHES", (1,))
    monkeypatch.setattr(tune_sizes, "CANDIDATES", CANDIDATES)
    copy = tmp_path / "tiles.json"
    copy.write_text(tiles.FILE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(tiles, "FILE", copy)
    for op, families in list(tiles.TABLE.items()):
        monkeypatch.setitem(tiles.TABLE, op, families)


@pytest.mark.interpreter
def test_a_sweep_checks_and_times_every_candidate(tmp_path: Path) -> None:
    jobs = tune_sizes.sizes_jobs(["scoring", "voting", "decoding"])
    assert len(jobs) == 4
    assert [tune_sizes.compile_sizes(job) for job in jobs] == [""] * 4
    winners = dict(tune_sizes.sweep_sizes("sm_123", jobs, tmp_path, ("a", "b", "c", "d")))
    assert winners["scoring"]["least_rows"] in (8, 16)
    assert winners["decoding"] == json.loads(jobs[-1][1])
    lines = (tmp_path / "sizes-sm_123.csv").read_text().splitlines()
    assert len(lines) == 1 + 4
    assert "nan" not in "".join(lines)


def test_a_candidate_that_cannot_run_is_told_and_loses() -> None:
    wrong = json.dumps({"rows": 3, "query_heads": 1, "threads": 128})
    drawn = op_cases.copies(lambda: op_cases.voting_case(op_cases.TINY[0], 1))
    microseconds, problem = tune_sizes.time_sizes("voting", wrong, drawn)
    assert microseconds != microseconds
    assert problem
    times = {"one": {"a": 1.0, "b": microseconds}, "two": {"a": 9.0, "b": 1.0}}
    assert tune_sizes.best(times) == "a"
    assert tune_sizes.best({"one": {"a": 2.0, "b": 1.0}, "two": {"a": 1.0, "b": 1.5}}) == "b"


@pytest.mark.interpreter
def test_attention_is_swept_by_pointers_and_by_descriptors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert not any(tile.descriptors for _, tile in tune.candidates_on("sm_80"))
    assert not any(tile.descriptors for _, tile in tune.candidates_on("gfx942"))
    both = tune.candidates_on("sm_90")
    assert {tile.descriptors for dim, tile in both if dim == 128} == {False, True}
    assert len(set(both)) == len(both)

    monkeypatch.setattr(attention, "attention_tile", attention.attention_tile)  # put back after
    monkeypatch.setattr(tune, "CANDIDATES", {16: []})
    monkeypatch.setattr(tune, "SHAPES", (tune.Shape("tiny", 1, 3, True), tune.SHAPES[0]))
    for name, value in {"KEY_HEADS": 1, "QUERY_HEADS": 2, "ROWS": 32, "KEPT": 20}.items():
        monkeypatch.setattr(tune, name, value)
    tiles_ = [Tile(16, 16, 4, 2), Tile(16, 16, 4, 2, descriptors=True)]
    assert [tune.compile_tile((16, tile)) for tile in tiles_] == ["", ""]
    problems = {(16, tile): "" for tile in tiles_} | {(16, Tile(16, 16, 4, 9)): "too many"}
    winners = tune.sweep_attention("sm_123", problems, tmp_path, ("a", "b", "c", "d"))
    assert winners["16"] in tiles_
    text = (tmp_path / "tiles-sm_123.csv").read_text()
    assert text.count("[16, 16, 4, 2, true]") == 2
    tune.write_winners("sm_123", {"attention": winners})
    written = json.loads(tiles.FILE.read_text(encoding="utf-8"))["attention"]["sm_123"]
    assert Tile(*written["16"]) == winners["16"]


def test_winners_take_their_own_chips_place_alone() -> None:
    before = json.loads(tiles.FILE.read_text(encoding="utf-8"))
    tiles.TABLE["voting"] = {"sm_80": {"rows": 1}}  # as a sweep leaves it
    won = {"rows": 16, "query_heads": 1, "threads": 128}
    tune.write_winners("sm_123", {"voting": won})
    after = json.loads(tiles.FILE.read_text(encoding="utf-8"))
    assert after.pop("voting") == {**before.pop("voting"), "sm_123": won}
    assert after == before
