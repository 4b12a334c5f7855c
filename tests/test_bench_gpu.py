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
    assert sum(part.limit_s for part in gpu.parts(tmp_path)) < 8 * 60


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
