"""The part of `bench/tune.py` for the ops with named sizes: scoring, voting, decoding."""

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import measure
import torch
from op_cases import MODELS, Case, copies, decoding_case, selection_case, voting_case

from homer_triton.kernels import tiles

CANDIDATES: dict[str, dict[str, list[int]]] = {
    "scoring": {
        "programs": [256],
        "least_rows": [4, 8, 16],
        "elements": [8192, 16384],
        "threads": [128, 256, 512],
    },
    "voting": {"rows": [32, 64, 128], "query_heads": [4, 8, 16], "threads": [128, 256]},
    "decoding": {
        "elements": [4096, 8192, 16384],
        "programs": [128, 256, 512],
        "threads": [128],
        "stages": [2, 3],
    },
}
CASES: dict[str, Callable[..., Case]] = {
    "scoring": selection_case,
    "voting": voting_case,
    "decoding": decoding_case,
}
BATCHES = (1, 8)
# An op's name, and its sizes as JSON.
Job = tuple[str, str]


@dataclass(frozen=True)
class Timing:
    """An op with some sizes: microseconds of a call, nan if it was wrong or could not run."""

    chip: str
    op: str
    case: str
    sizes: str
    microseconds: float
    problem: str
    device: str
    versions: str
    commit: str
    command: str


def sizes_jobs(ops: list[str]) -> list[Job]:
    """All candidates of some ops."""
    return [
        (op, json.dumps(dict(zip(names, values, strict=True))))
        for op, names in CANDIDATES.items()
        if op in ops
        for values in itertools.product(*names.values())
    ]


def use(op: str, sizes: str) -> None:
    """Let every call of this process use these sizes."""
    tiles.TABLE[op] = {tiles.ANY: json.loads(sizes)}


def drawers(op: str) -> Iterator[Callable[[], Case]]:
    """The op's cases; each call draws its own inputs."""
    for model in MODELS:
        for batch in BATCHES:
            yield partial(CASES[op], model, batch)


def compile_sizes(job: Job) -> str:
    """Compile a candidate for all cases; returns the problem, or nothing."""
    use(*job)
    try:
        for draw in drawers(job[0]):
            draw().systems["triton"]()
    except Exception as error:  # shared memory, registers: whatever a compiler says
        return measure.describe(error)
    return ""


def sweep_sizes(
    chip: str, jobs: list[Job], out: Path, about: tuple[str, ...]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Time the candidates, and yield each op's winner."""
    timings: list[Timing] = []
    for op in dict.fromkeys(op for op, _ in jobs):
        times: dict[str, dict[str, float]] = defaultdict(dict)
        for draw in drawers(op):
            torch.manual_seed(0)
            drawn = copies(draw)
            for _, sizes in (job for job in jobs if job[0] == op):
                microseconds, problem = time_sizes(op, sizes, drawn)
                case = drawn[0].name
                times[case][sizes] = microseconds
                timings.append(Timing(chip, op, case, sizes, microseconds, problem, *about))
            fastest = min(times[case], key=times[case].__getitem__)
            print(f"{op:10} {case:28} {times[case][fastest]:8.1f} us {fastest}", flush=True)
            measure.write_csv(out / f"sizes-{chip}.csv", timings)
        yield op, json.loads(best(times))


def time_sizes(op: str, sizes: str, drawn: list[Case]) -> tuple[float, str]:
    """(microseconds, problem) of a call, over all inputs."""
    use(op, sizes)
    try:
        drawn[0].check()
        return 1e3 * measure.time_calls([case.systems["triton"] for case in drawn]).median_ms, ""
    except Exception as error:
        return math.nan, measure.describe(error)


def best(times: dict[str, dict[str, float]]) -> str:
    """The candidate that is closest to the fastest over all cases.

    times: by case and candidate, nan where it could not run.
    """
    losses = defaultdict(list)
    for of_case in times.values():
        ran = {name: time for name, time in of_case.items() if not math.isnan(time)}
        for name, time in ran.items():
            losses[name].append(math.log(time / min(ran.values())))
    whole = {name: sum(of) for name, of in losses.items() if len(of) == len(times)}
    return min(whole, key=whole.__getitem__)
