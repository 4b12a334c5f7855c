"""How the benchmarks time, check and record: one `Measurement` per line of a CSV."""

import csv
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from homer_triton.evaluation.environment import describe_environment


@dataclass(frozen=True)
class Measurement:
    """One system's time for one case, in milliseconds.

    bytes and flops are what the operation must move and compute; fraction is of the limit measured
    in the same run, copy bandwidth or matrix rate; launches are GPU kernels, 0 where not counted.
    """

    op: str
    case: str
    system: str
    median_ms: float
    low_ms: float
    high_ms: float
    bytes: int
    flops: int
    limit: str
    fraction: float
    launches: int
    device: str
    versions: str
    commit: str
    command: str


def about() -> tuple[str, str, str, str]:
    """The last four fields of every line: device, versions, commit and command."""
    found = describe_environment("cuda" if torch.cuda.is_available() else "cpu")
    names = ("python", "torch", "triton", "transformers")
    versions = ", ".join(f"{name} {found[name]}" for name in names)
    return found["device"], versions, found["commit"] or "unknown", shlex.join(sys.argv)


# Bytes that are written before each timed call: more than any second-level cache holds.
FLUSH_BYTES = 2**28
CALLS, REPLAYS = 10, 11


def time_ms(call: Callable[[], object]) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile of a call's time on the GPU, caches flushed before each.

    By graph replay, so that no host's time is in it: what replays of flushes and calls take beyond
    replays of the flushes alone. By events where a call cannot be captured.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    call()
    try:
        graphs = [_capture(work) for work in ((flush.zero_, call), (flush.zero_,))]
    except RuntimeError:
        torch.cuda.synchronize()
        return triton.testing.do_bench(call, rep=100, quantiles=[0.5, 0.2, 0.8])
    both, alone = ([_replay_ms(graph) for _ in range(REPLAYS)] for graph in graphs)
    flushing = statistics.median(alone)
    times = sorted((time - flushing) / CALLS for time in both)
    return times[REPLAYS // 2], times[REPLAYS // 5], times[-1 - REPLAYS // 5]


def _capture(work: tuple[Callable[[], object], ...]) -> torch.cuda.CUDAGraph:
    """A graph of some calls, one after another, `CALLS` times."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            for call in work:
                call()
    graph.replay()
    return graph


def _replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    """The time of one replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def count_launches(call: Callable[[], object]) -> int:
    """The kernels and copies that a call puts on the GPU."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profile.events())


def require_as_exact(actual: Tensor, own: Tensor, exact: Tensor) -> None:
    """Raise `ArithmeticError` unless the error is at most twice PyTorch's in the same dtype.

    own: PyTorch's result in the dtype of `actual`; exact: its result in float32.
    """
    error = (actual.float() - exact).abs().max().item()
    allowed = 2 * (own.float() - exact).abs().max().item()
    floor = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    if not error <= max(allowed, floor):
        raise ArithmeticError(f"the error is {error:.3e}, at most {max(allowed, floor):.3e} may be")


def write_csv(path: Path, lines: Sequence[Any]) -> None:
    """Write records of one dataclass, at least one, replacing the file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(lines[0])])
        writer.writeheader()
        writer.writerows(asdict(line) for line in lines)
    os.replace(temporary, path)
