"""The GPU programme's frame, on a machine without one: limits, logs, what is left running."""

import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
spec = importlib.util.spec_from_file_location("bench_gpu", BENCH / "gpu.py")
gpu: Any = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = gpu  # its dataclasses look for their module there
spec.loader.exec_module(gpu)

SLEEPER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def test_the_limits_add_up_to_less_than_eight_minutes(tmp_path: Path) -> None:
    stages = gpu.stages(tmp_path, [["tests/test_ops.py"]] * 3)
    longest = (max(part.limit_s for part in stage) for stage in stages)
    assert gpu.COLLECTING_S + sum(longest) < 8 * 60
    logs = [part.name for stage in stages for part in stage]
    assert len(set(logs)) == len(logs)


def test_every_gpu_test_is_dealt_to_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    hands = gpu.deal_tests(processes=5)
    sizes = [len(hand) for hand in hands]
    assert len(hands) == 5
    assert max(sizes) - min(sizes) <= 1
    names = [name for hand in hands for name in hand]
    assert len(set(names)) == len(names)
    assert any("test_graphs.py::test_graphs_and_offload" in name for name in names)
    monkeypatch.setattr(gpu, "PYTHON", "false")
    assert len(gpu.deal_tests()) == 1, "where nothing can be collected"


def test_a_part_that_times_out_leaves_nothing_running(tmp_path: Path) -> None:
    outcome = gpu.run_part(gpu.Part("slow", [sys.executable, "-c", SLEEPER], 3), tmp_path)
    assert outcome.status == "timed out"
    child = int((tmp_path / "slow.log").read_text())
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "(python" not in stat(child):
            return
        if " Z " in stat(child):
            return
        time.sleep(0.05)
    pytest.fail(f"process {child} still runs")


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
    outcome = gpu.run_part(gpu.Part("part", command, 20), tmp_path)
    assert (outcome.status, outcome.log) == (status, "part.log")
    assert ("ZeroDivisionError" in (tmp_path / "part.log").read_text()) == (status == "failed")


def test_a_command_that_does_not_exist_fails_alone(tmp_path: Path) -> None:
    outcome = gpu.run_part(gpu.Part("none", [str(tmp_path / os.urandom(4).hex())], 5), tmp_path)
    assert outcome.status == "failed"
