"""Measures with which sizes the kernels are fastest on this GPU.

    python bench/tune.py [--out DIR] [--keep] [--ops attention,scoring,voting,decoding]

Compiles the candidates in many processes, checks each against its definition, and times it by graph
replay over several inputs. Attention is timed beside PyTorch's flash and cuDNN. Writes
DIR/tiles-CHIP.csv (attention) and DIR/sizes-CHIP.csv. The winners have the smallest geometric mean
over the cases; they go to kernels/tiles.json, or are only printed with --keep. Takes two minutes on
sixteen cores.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import measure  # noqa: E402
import torch  # noqa: E402
from op_cases import BACKENDS, random, sdpa, some_rows  # noqa: E402
from torch import Tensor  # noqa: E402
from tune_sizes import best, compile_sizes, sizes_jobs, sweep_sizes  # noqa: E402

from homer_triton.kernels import attention, reference, tiles  # noqa: E402
from homer_triton.kernels.attention import Tile  # noqa: E402
from homer_triton.kernels.devices import architecture  # noqa: E402

CANDIDATES: dict[int, list[Tile]] = {
    64: [
        *(Tile(64, n, 4, stages) for n in (64, 128) for stages in (2, 3)),
        *(Tile(128, n, 8, stages) for n in (64, 128) for stages in (2, 3)),
        Tile(128, 64, 4, 3),
        Tile(256, 64, 8, 3),
    ],
    128: [
        *(Tile(64, 64, 4, stages) for stages in (2, 3, 4)),
        *(Tile(128, 64, 8, stages) for stages in (2, 3, 4)),
        *(Tile(128, 128, 8, stages) for stages in (1, 2)),
        Tile(64, 128, 4, 2),
        Tile(128, 32, 8, 4),
    ],
    256: [
        *(Tile(64, 32, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
        *(Tile(128, n, 8, 2) for n in (32, 64)),
    ],
}
FIRST_WITH_DESCRIPTORS = 90
KEY_HEADS, QUERY_HEADS, ROWS, KEPT = 8, 32, 2048, 1074
# Inputs take turns, so that none is still in the cache when its turn comes again.
INPUTS = 8


@dataclass(frozen=True)
class Shape:
    """A call: chunks side by side, the prefix before them; kept: half the rows are queries."""

    name: str
    batch: int
    prefix: int
    kept: bool


SHAPES = (
    Shape("one chunk", 1, 0, False),
    Shape("eight chunks", 8, 0, False),
    Shape("after one token", 1, 1, False),
    Shape("after 100 tokens", 4, 100, False),
    Shape("kept rows after 100", 4, 100, True),
)


@dataclass(frozen=True)
class Timing:
    """A tile, or another system, at a shape: microseconds of a call, and the rate in TFLOP/s.

    Both are nan if it was wrong or could not run.
    """

    chip: str
    dim: int
    shape: str
    system: str
    microseconds: float
    tflops: float
    problem: str
    device: str
    versions: str
    commit: str
    command: str


Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def candidates_on(chip: str) -> list[tuple[int, Tile]]:
    """(head dim, tile) of all candidates for a chip."""
    found = [(dim, tile) for dim, own in CANDIDATES.items() for tile in own]
    if chip.startswith("sm_") and int(chip.removeprefix("sm_")) >= FIRST_WITH_DESCRIPTORS:
        # Small blocks do not help: every copy by a descriptor needs its own wait.
        large = [(dim, t) for dim, t in found if t.block_n >= 64 and t.stages > 1]
        found += [(dim, tile._replace(descriptors=True)) for dim, tile in large]
    return found


def draw(shape: Shape, dim: int) -> Inputs:
    """q, k, v, the prefix's keys and values, and the rows that are queries."""
    q = random(shape.batch, KEPT if shape.kept else ROWS, QUERY_HEADS, dim)
    k, v = (random(shape.batch, ROWS, KEY_HEADS, dim) for _ in range(2))
    before = [random(shape.prefix, KEY_HEADS, dim) if shape.prefix else None for _ in range(2)]
    return q, k, v, before[0], before[1], some_rows(shape.batch, ROWS, KEPT) if shape.kept else None


def use(tile: Tile) -> None:
    """Let every call of this process use a tile."""
    attention.attention_tile = lambda *_: tile


def compile_tile(job: tuple[int, Tile]) -> str:
    """Compile a tile for all shapes; returns the problem, or nothing."""
    dim, tile = job
    use(tile)
    try:
        for shape in SHAPES:
            attention.causal_attention(*draw(shape, dim))
    except Exception as error:  # shared memory, registers: whatever a compiler says
        return measure.describe(error)
    return ""


def time_us(call: Callable[[int], object]) -> float:
    """The median time of a call, over all inputs."""
    return 1e3 * measure.time_calls([partial(call, index) for index in range(INPUTS)]).median_ms


def flops(shape: Shape, dim: int, rows: Tensor | None) -> int:
    """The operations of two products of every query with the keys that it sees."""
    pairs = shape.batch * (ROWS * (ROWS + 1) // 2 + ROWS * shape.prefix)
    if rows is not None:
        pairs = int((rows + 1 + shape.prefix).sum())
    return 4 * pairs * QUERY_HEADS * dim


def measured(inputs: list[Inputs], tiles: list[Tile]) -> Iterator[tuple[str, float, str]]:
    """(system, microseconds, problem) of every tile, and of PyTorch where it can run the call."""
    first = tuple(x[:1] if x is not None and x.dim() != 3 else x for x in inputs[0])
    own = reference.causal_attention(*first)
    wide = (x.float() if x is not None and x.is_floating_point() else x for x in first)
    exact = reference.causal_attention(*wide)  # type: ignore[arg-type]
    for tile in tiles:
        use(tile)
        name = json.dumps(tile)
        try:
            measure.require_as_exact(attention.causal_attention(*inputs[0])[:1], own, exact)
            yield name, time_us(lambda i: attention.causal_attention(*inputs[i])), ""
        except (ArithmeticError, RuntimeError) as error:
            yield name, math.nan, measure.describe(error)
    if inputs[0][3] is None:
        for name, backend in BACKENDS.items():
            try:
                yield name, time_us(lambda i, b=backend: sdpa(*inputs[i][:3], b)), ""
            except RuntimeError as error:
                yield name, math.nan, measure.describe(error)


def best_tile(timings: list[Timing], dim: int) -> Tile:
    """The tile that is closest to the fastest over all shapes."""
    times: dict[str, dict[str, float]] = {shape.name: {} for shape in SHAPES}
    for timing in timings:
        if timing.dim == dim and timing.system not in BACKENDS:
            times[timing.shape][timing.system] = timing.microseconds
    return Tile(*json.loads(best(times)))


def sweep_attention(
    chip: str, problems: dict[tuple[int, Tile], str], out: Path, about: tuple[str, ...]
) -> dict[str, Tile]:
    """Time every tile that compiles; returns the winners by head dim."""
    timings: list[Timing] = []
    for dim in CANDIDATES:
        runs = [tile for (of, tile), problem in problems.items() if of == dim and not problem]
        for shape in SHAPES:
            inputs = [draw(shape, dim) for _ in range(INPUTS)]
            work = flops(shape, dim, inputs[0][5])
            for system, microseconds, problem in measured(inputs, runs):
                rate = work / microseconds / 1e6
                line = Timing(chip, dim, shape.name, system, microseconds, rate, problem, *about)
                timings.append(line)
                print(
                    f"D {dim:3} {shape.name:20} {system:12} {microseconds:8.1f} us {rate:5.0f}"
                    f" TFLOP/s {problem}",
                    flush=True,
                )
        measure.write_csv(out / f"tiles-{chip}.csv", timings)
    return {str(dim): best_tile(timings, dim) for dim in CANDIDATES}


def write_winners(family: str, winners: dict[str, Any]) -> None:
    """Write a chip family's winners to the table, one line for each family of an op."""
    parts = []
    # Read from the file, since the table in memory has the sizes that were tried last.
    for op, families in json.loads(tiles.FILE.read_text(encoding="utf-8")).items():
        own = {**families, **({family: winners[op]} if op in winners else {})}
        lines = ",\n".join(f'    "{name}": {json.dumps(of)}' for name, of in own.items())
        parts.append(f'  "{op}": {{\n{lines}\n  }}')
    temporary = tiles.FILE.with_suffix(".tmp")
    temporary.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    os.replace(temporary, tiles.FILE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--keep", action="store_true", help="do not change kernels/tiles.json")
    parser.add_argument("--ops", default=",".join(tiles.TABLE), help="only these")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: PyTorch finds no CUDA device", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    ops = args.ops.split(",")
    chip = architecture(torch.device("cuda", 0))
    about = measure.about()
    whole = candidates_on(chip) if "attention" in ops else []
    jobs = sizes_jobs(ops)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), spawn) as pool:
        of_sizes = pool.map(compile_sizes, jobs)
        problems = dict(zip(whole, pool.map(compile_tile, whole), strict=True))
        fit = [job for job, problem in zip(jobs, of_sizes, strict=True) if not problem]
    for (dim, tile), problem in problems.items():
        if problem:
            print(f"D {dim} {tile}: {problem}", flush=True)
    winners: dict[str, Any] = dict(sweep_sizes(chip, fit, args.out, about))
    if whole:
        winners["attention"] = sweep_attention(chip, problems, args.out, about)
    print(f"{chip}: {winners}")
    if not args.keep:
        write_winners(chip, winners)
    return 0


if __name__ == "__main__":
    sys.exit(main())
