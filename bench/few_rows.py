"""Times products of few rows, and attention of one query, on a CPU.

These are what a new token needs: the matrices of a 50M model, and a cache. They run in every way
that `kernels.products` and `model.llama` could choose.

    python bench/few_rows.py [--dtype float32] [--rows 1,2,4,8,16,32] [--out DIR]

The ways take turns. A line is the median of one way over all matrices, or over the caches of 800
tokens in 16 layers; together these are larger than a processor's caches. "sum" adds up the same
numbers. "by rows" and "by heads" are the two layouts of a cache. Writes DIR/few-rows-DTYPE.csv.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import measure  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from random_models import random_llama  # noqa: E402
from torch import Tensor  # noqa: E402

from homer_triton.kernels import products  # noqa: E402
from homer_triton.loading import DTYPES  # noqa: E402

LAYERS, CACHED, ROOM, HEADS, DIM = 16, 800, 840, 8, 64
WAYS: dict[str, products.Multiply] = {
    "linear": F.linear,
    "turned": products._turned,
    "in parts": products._in_parts,
}
Run = Callable[[], object]


@dataclass(frozen=True)
class Line:
    """One way of a case: the median milliseconds for everything, and the rate in GB/s."""

    dtype: str
    case: str
    way: str
    median_ms: float
    gigabytes_per_second: float
    device: str
    versions: str
    commit: str
    command: str


def matrices(dtype: str) -> list[Tensor]:
    """All matrices that a token of the 50M model is multiplied with."""
    weights = random_llama("50M", dtype, "torch").weights
    of_layers = [(*w.qkv, w.output, *w.gate_up, w.down) for w in weights.layers]
    return [matrix for own in of_layers for matrix in own] + [weights.lm_head]


def multiply(way: products.Multiply, x: list[Tensor], weights: list[Tensor]) -> None:
    for rows, weight in zip(x, weights, strict=True):
        way(rows, weight, None)


def without_onednn(run: Run) -> None:
    """Run without oneDNN. The switch is the whole process's, so no library should turn it."""
    torch.backends.mkldnn.set_flags(False)
    try:
        run()
    finally:
        torch.backends.mkldnn.set_flags(True)


def attend(q: Tensor, caches: list[tuple[Tensor, Tensor]]) -> None:
    for k, v in caches:
        F.scaled_dot_product_attention(q, k, v)


def product_cases(weights: list[Tensor], rows: int) -> dict[str, Run]:
    """The ways to multiply this many rows."""
    x = [weight.new_empty(rows, weight.shape[1]).normal_() for weight in weights]
    runs = {name: partial(multiply, way, x, weights) for name, way in WAYS.items()}
    if products.fuses(x[0], (weights[0].new_empty(products.LEAST_WORK, 1),)):
        runs["oneDNN"] = partial(multiply, products._plain, x, weights)
        runs["linear without oneDNN"] = partial(without_onednn, runs["linear"])
    return {**runs, "sum": lambda: [weight.sum() for weight in weights]}


def attention_cases(dtype: torch.dtype) -> tuple[dict[str, Run], int]:
    """The two layouts of a cache for one query, and in half precision for two; also returns the
    bytes that are read.
    """
    rows = torch.randn(LAYERS, 2, 1, ROOM, HEADS, DIM).to(dtype)
    by_heads = rows.transpose(3, 4).contiguous().transpose(3, 4)
    q, runs = torch.randn(1, HEADS, 1, DIM).to(dtype), {}
    for name, cache in (("by rows", rows), ("by heads", by_heads)):
        caches = [tuple(half[:, :CACHED].transpose(1, 2) for half in own) for own in cache]
        runs[name] = partial(attend, q, caches)
        if dtype != torch.float32:
            runs[f"{name}, two queries"] = partial(attend, F.pad(q, (0, 0, 0, 1)), caches)
    return runs, LAYERS * 2 * CACHED * HEADS * DIM * dtype.itemsize


def in_turn(runs: dict[str, Run], repeats: int) -> dict[str, float]:
    """The median milliseconds of each run, after two calls that do not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 2):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - begun))
    return {name: median(own[2:]) for name, own in times.items()}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rows", default="1,2,3,4,5,6,8,12,16,24,32", help="of the products")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    args = parser.parse_args()
    weights, about, lines = matrices(args.dtype), measure.about(), []
    of_weights = sum(weight.numel() * weight.element_size() for weight in weights)
    cases: dict[str, tuple[dict[str, Run], int]] = {
        f"rows {rows}": (product_cases(weights, int(rows)), of_weights)
        for rows in args.rows.split(",")
    }
    cases[f"attention over {CACHED}"] = attention_cases(DTYPES[args.dtype])
    for case, (runs, size) in cases.items():
        for way, milliseconds in in_turn(runs, args.repeats).items():
            rate = size / milliseconds / 1e6
            lines.append(Line(args.dtype, case, way, milliseconds, rate, *about))
            print(f"{case:20} {way:22} {milliseconds:8.2f} ms {rate:6.1f} GB/s", flush=True)
    measure.write_csv(args.out / f"few-rows-{args.dtype}.csv", lines)


if __name__ == "__main__":
    main()
