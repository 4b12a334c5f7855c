"""The GPU programme on a machine without one: a rehearsal of all of it, and its frame (limits,
logs, what is left running, what is packed).
"""

import argparse
import csv
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.append(str(BENCH))


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look for their module there
    spec.loader.exec_module(module)
    return module


gpu = load("gpu")
encode = load("encode")
measure = load("measure")

SLEEPER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.process
def test_a_rehearsal_runs_every_stage_and_packs_it(tmp_path: Path) -> None:
    command = [sys.executable, "bench/gpu.py", "--rehearse", "--out", str(tmp_path)]
    ran = subprocess.run(command, cwd=BENCH.parent, capture_output=True, text=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.tar.gz", "summary.json"]
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        logs = {
            name: archive.extractfile(name).read().decode()  # type: ignore[union-attr]
            for name in archive.getnames()
            if name.endswith((".log", ".csv"))
        }
        names = archive.getnames()
    assert ran.returncode == 0, ran.stdout + ran.stderr + "".join(logs.values())
    summary = json.loads((tmp_path / "summary.json").read_text())
    parts = {part["name"] for part in summary["parts"]}
    assert parts > {*gpu.full().encodes, "device", "tests-0", "tests-1", "kernels", "decode"}
    assert summary["device"]["matrix_tflop_per_s"] < 100, "a CPU's"
    (file,) = gpu.rehearsal().test_files
    counted = summary["tests"]["passed"] + summary["tests"]["skipped"]
    assert counted >= (BENCH.parent / file).read_text().count("\ndef test_") > 0
    assert summary["tests"]["bad"] == []
    for name in ("kernels", "encode-tiny-float32", "decode-tiny-float32"):
        assert f"results/{name}.csv" in names
    assert "results/roofline.png" in names
    kernels = list(csv.DictReader(logs["results/kernels.csv"].splitlines()))
    assert {line["checked"] for line in kernels} == {"True"}
    assert {line["timed_by"] for line in kernels if line["op"] != "limit"} == {"host"}


def test_the_limits_add_up_to_less_than_eight_minutes(tmp_path: Path) -> None:
    stages = gpu.stages(gpu.full(), tmp_path, [["tests/test_ops.py"]] * 3)
    longest = (max(part.limit_s for part in stage) for stage in stages)
    assert gpu.COLLECTING_S + sum(longest) < 8 * 60
    logs = [part.name for stage in stages for part in stage]
    assert len(set(logs)) == len(logs)


@pytest.mark.process
def test_every_gpu_test_is_dealt_to_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["tests/test_graphs.py", "tests/test_kernels_norms.py"]
    scale = replace(gpu.full(), test_files=files, test_processes=5, patience=10)
    hands = gpu.deal_tests(scale, dict(os.environ))
    sizes = [len(hand) for hand in hands]
    assert len(hands) == 5
    assert max(sizes) - min(sizes) <= 1
    names = [name for hand in hands for name in hand]
    assert len(set(names)) == len(names)
    assert any("test_graphs.py::test_graphs_and_offload" in name for name in names)
    monkeypatch.setattr(gpu, "PYTEST", ["false"])
    assert gpu.deal_tests(scale, dict(os.environ)) == [scale.test_files], "nothing to collect"


@pytest.mark.process
def test_a_part_that_times_out_leaves_nothing_running(tmp_path: Path) -> None:
    outcome = run([sys.executable, "-c", SLEEPER], tmp_path, limit_s=3)
    assert outcome.status == "timed out"
    child = int((tmp_path / "part.log").read_text())
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "(python" not in stat(child):
            return
        if " Z " in stat(child):
            return
        time.sleep(0.05)
    pytest.fail(f"process {child} still runs")


def run(command: list[str], out: Path, limit_s: int = 20) -> Any:
    return gpu.run_part(gpu.Part("part", command, limit_s), out, dict(os.environ))


def stat(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""


@pytest.mark.parametrize(
    ("command", "status"),
    [([sys.executable, "-c", ""], "passed"), ([sys.executable, "-c", "1 / 0"], "failed")],
)
def test_how_a_part_ends_is_said(tmp_path: Path, command: list[str], status: str) -> None:
    outcome = run(command, tmp_path)
    assert (outcome.status, outcome.log) == (status, "part.log")
    assert ("ZeroDivisionError" in (tmp_path / "part.log").read_text()) == (status == "failed")


def test_a_command_that_does_not_exist_fails_alone(tmp_path: Path) -> None:
    assert run([str(tmp_path / os.urandom(4).hex())], tmp_path).status == "failed"


def test_tests_that_fail_or_hang_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tests-0.log").write_text(
        "tests/test_ops.py::test_one[a b] PASSED [ 20%]\n"
        "tests/test_kernels_attention.py::test_two FAILED [ 40%]\n"
        "tests/test_ops.py::test_three SKIPPED (needs a CUDA device) [ 60%]\n"
        "tests/test_ops.py::test_four "
    )
    summary = gpu.pack(tmp_path, tmp_path, [])
    assert (summary["tests"]["passed"], summary["tests"]["skipped"]) == (1, 1)
    bad = ["tests/test_kernels_attention.py::test_two", "tests/test_ops.py::test_four"]
    assert summary["tests"]["bad"] == bad
    gpu.report(summary)
    assert "DO NOT TRUST" in capsys.readouterr().out


class Inline:
    """A `Child` that works in this process, and whose checks fail."""

    def __call__(self, work: Any, *arguments: Any) -> tuple[Any, str]:
        if work is encode.check:
            return None, "ArithmeticError: the logits are off"
        return encode.attempt(work, arguments)


@pytest.mark.process
def test_what_fails_its_check_is_measured_in_the_order_given(tmp_path: Path) -> None:
    arguments = argparse.Namespace(
        shape="tiny",
        dtype="float32",
        lengths=[24, 16],
        plain_up_to=16,
        systems=["torch"],
        leaf_batch=[1, 2],
        repeats=1,
    )
    checked = encode.check_all(arguments, Inline())
    assert checked == {"torch": False}
    path = tmp_path / "encode.csv"
    lines, failed = encode.measure_all(arguments, checked, Inline(), path)
    assert failed == 0
    assert [line.tokens for line in lines] == [24, 24, 16, 16, 16]
    assert [line.checked for line in lines] == [False, False, True, False, False]
    assert [line["checked"] for line in csv.DictReader(path.open())] == [
        str(line.checked) for line in lines
    ]
    assert list(encode.curves(lines)) == [
        "transformers",
        *(f"torch, leaf batch {n}" for n in (1, 2)),
    ]


def die() -> None:
    os._exit(1)


def test_a_child_that_dies_is_replaced() -> None:
    child = encode.Child("fork")
    assert child(die) == (None, "the process died")
    assert child(int, "7") == (7, "")
    assert child(int, "x")[1].startswith("ValueError: invalid literal")


class Graph:
    """Stands in for a CUDA graph and for what captures it."""

    replayed = 0

    def replay(self) -> None:
        Graph.replayed += 1

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def test_calls_are_replayed_and_those_that_wait_are_launched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modes: list[str] = []
    monkeypatch.setattr(measure, "ON_GPU", True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    monkeypatch.setattr(measure, "clock_ms", lambda run: [run(), 0.5][1])
    calls: list[int] = []
    timing = measure.time_calls([lambda: calls.append(0), lambda: calls.append(1)])
    # Four rounds of two calls to a sample of 2 ms.
    assert timing == measure.Timing(0.0625, 0.0625, 0.0625, "graph")
    assert Graph.replayed == 2 + 25
    assert calls == [0, 1, 0, 1, 0, *[0, 1] * 4]

    def wait() -> None:
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    assert measure.time_calls([wait]).by == "events"
    assert modes[-1] == "default"
