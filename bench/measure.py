"""How the benchmarks time, check and record: one `Measurement` per line of a CSV."""

import csv
import os
import shlex
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


def time_ms(call: Callable[[], object]) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile of a call's time on the GPU, caches flushed before each."""
    median, low, high = triton.testing.do_bench(call, rep=100, quantiles=[0.5, 0.2, 0.8])
    return median, low, high


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
