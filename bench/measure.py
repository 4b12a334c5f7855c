"""Shared by the benchmarks: timing, checking, and writing a CSV with a line per measurement."""

import csv
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from homer_triton import quiet as quiet
from homer_triton.evaluation.environment import describe_environment

ON_GPU = torch.cuda.is_available()
# A sample lasts about this long, so that its start does not count.
SAMPLE_MS, MOST_ROUNDS = 2.0, 20
SAMPLES_MS, FEWEST_SAMPLES, MOST_SAMPLES = 100.0, 3, 25


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call: the median, the 20 % and the 80 % quantile.

    by: "graph" if a CUDA graph was replayed; "events" if the host launched every call, whose time
    counts where it is slower than the GPU; "host" for a clock on a CPU.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    by: str


@dataclass(frozen=True)
class Measurement:
    """One system's time for one case, in milliseconds.

    bytes, flops: what the operation must move and compute; fraction: of the limit that was measured
    in the same run, copy bandwidth or matrix rate; launches: GPU kernels, 0 where not counted;
    timed_by: `Timing.by`; checked: whether the result was right.
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
    timed_by: str
    checked: bool
    device: str
    versions: str
    commit: str
    command: str


def about() -> tuple[str, str, str, str]:
    """The last four fields of a line: device, versions, commit and command."""
    found = describe_environment("cuda" if ON_GPU else "cpu")
    names = ("python", "torch", "triton", "transformers")
    versions = ", ".join(f"{name} {found[name]}" for name in names)
    return found["device"], versions, found["commit"] or "unknown", shlex.join(sys.argv)


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def time_calls(calls: Sequence[Callable[[], object]]) -> Timing:
    """The time of one of these calls, which take turns.

    They are one operation over several inputs. Together these exceed the cache, so that none is
    still in it when its turn comes again.
    """
    if not ON_GPU:
        times = sorted(clock_ms(call) for call in calls)
        return Timing(times[len(times) // 2], times[0], times[-1], "host")
    for call in calls:
        call()  # compiles, and sets libraries up
    every = clock_ms(lambda: [call() for call in calls])
    turns = list(calls) * between(1, int(SAMPLE_MS / every), MOST_ROUNDS)
    replay = capture(turns)
    run = replay or (lambda: [call() for call in turns])
    once = min(clock_ms(run) for _ in range(2))
    samples = between(FEWEST_SAMPLES, int(SAMPLES_MS / once), MOST_SAMPLES)
    times = sorted(clock_ms(run) / len(turns) for _ in range(samples))
    low, median, high = (times[round(part * (samples - 1))] for part in (0.2, 0.5, 0.8))
    return Timing(median, low, high, "graph" if replay else "events")


def between(least: int, value: int, most: int) -> int:
    return max(least, min(value, most))


def clock_ms(run: Callable[[], object]) -> float:
    """Milliseconds that a function takes, on the GPU where there is one."""
    if not ON_GPU:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def capture(calls: Sequence[Callable[[], object]]) -> Callable[[], object] | None:
    """Return the replay of a CUDA graph of these calls, or None if they cannot be captured."""
    if waits(calls[0]):
        return None
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError:
        return None
    return graph.replay


def waits(call: Callable[[], object]) -> bool:
    """Whether a call waits for the GPU.

    Call this before a capture: a capture that breaks off leaves PyTorch's allocator and random
    numbers in disorder.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def count_launches(call: Callable[[], object]) -> int:
    """The kernels and copies that a call launches on a GPU, or PyTorch's operations on a CPU."""
    kind = "CUDA" if ON_GPU else "CPU"
    call()
    synchronize()
    activity = getattr(torch.profiler.ProfilerActivity, kind)
    with torch.profiler.profile(activities=[activity]) as profile:
        call()
        synchronize()
    return sum(event.device_type.name == kind for event in profile.events())


def describe(error: Exception) -> str:
    """An exception as one line of text."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def require_as_exact(actual: Tensor, own: Tensor, exact: Tensor) -> None:
    """Raise `ArithmeticError` if the error is more than twice PyTorch's in the same dtype.

    own: PyTorch's result in the dtype of `actual`; exact: its result in float32.
    """
    error = (actual.float() - exact).abs().max().item()
    allowed = 2 * (own.float() - exact).abs().max().item()
    floor = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    if not error <= max(allowed, floor):
        raise ArithmeticError(f"the error is {error:.3e}, at most {max(allowed, floor):.3e} may be")


def write_csv(path: Path, lines: Sequence[Any]) -> None:
    """Write at least one record of a dataclass; the file is replaced as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(lines[0])])
        writer.writeheader()
        writer.writerows(asdict(line) for line in lines)
    os.replace(temporary, path)
