"""Counts the launches and bytes of one layer, op by op, and times the layer.

    python bench/layer.py [--shape Llama-2-7B] [--dtype bfloat16] [--rows 2048] [--out DIR]

There are three kinds of layer: all rows go through, half of them are selected, and one token is
decoded after as many rows. Bytes are those of an op's tensors, each read or written once (twice for
ops in place), including the weights of a product. Launches are kernels and copies on a GPU, and
PyTorch's operations on a CPU. The time is a whole layer's, replayed from a graph. Writes
DIR/layer-SHAPE-DTYPE.csv.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, cast

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import measure  # noqa: E402
import torch  # noqa: E402
from measure import ON_GPU  # noqa: E402
from op_cases import nbytes  # noqa: E402
from random_models import SHAPES, random_llama  # noqa: E402
from torch import Tensor  # noqa: E402

from homer_triton.loading import DTYPES  # noqa: E402
from homer_triton.model.llama import Llama, Pass, Past  # noqa: E402

# How many of the suffix's rows vote, and how far a vote spreads, as in `HomerConfig`.
ASKING, REACH = 32, (15, 15)


@dataclass(frozen=True)
class Line:
    """An op of a kind of layer, or "whole layer": its launches, and the bytes that it must move."""

    shape: str
    dtype: str
    kind: str
    op: str
    rows: int
    launches: int
    bytes: int
    microseconds: float
    device: str
    versions: str
    commit: str
    command: str


class Recorded:
    """The ops; every call is noted, as its name, a function that repeats it, and its bytes."""

    def __init__(self, ops: ModuleType) -> None:
        self._ops = ops
        self.calls: list[tuple[str, Callable[[], object], int]] = []

    def __getattr__(self, name: str) -> Callable[..., object]:
        op = getattr(self._ops, name)

        def noted(*args: Any, **kwargs: Any) -> object:
            out = op(*args, **kwargs)
            again = partial(op, *args, **kwargs)
            self.calls.append((name, again, moved(name, (*args, *kwargs.values()), out)))
            return out

        return noted


def moved(name: str, args: tuple[Any, ...], out: object) -> int:
    """The bytes that a call must read and write."""
    if name == "rotary_and_store_":  # it touches only some rows of its tables and of the cache
        q, k, v = args[:3]
        heads = [x for x in (q, k) if x is not None]
        return 2 * nbytes(*heads) + nbytes(v) + nbytes(k, v)
    if name == "apply_rotary_":
        return 2 * nbytes(args[0])
    written = tensors_of(out) or tensors_of(args[0])
    return nbytes(*tensors_of(args), *written)


def tensors_of(value: object) -> list[Tensor]:
    """All tensors in nested tuples."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [x for part in value for x in tensors_of(part)]
    return []


def kinds(model: Llama, rows: int) -> dict[str, Callable[[], object]]:
    """A call of each kind of layer."""
    device = model.device
    hidden = torch.randn(1, rows, model.config.hidden_size, dtype=model.dtype, device=device)
    at = torch.arange(rows, device=device)[None]
    cache = model.new_cache(rows + 1, layers=1)[0].normal_()
    tables = model.rotary(rows + 1)

    asking = min(ASKING, rows // 4)

    def half() -> Tensor:
        run = Pass(model, at, [cache], at, rotary=tables)
        k, v = run.project_keys(0, hidden)
        ends = (rows // 2 - asking, 0, rows - asking)
        q = run.last_queries(0, hidden, asking)
        kept = model.ops.vote_and_select(q, k, None, None, *ends, reach=REACH)[0]
        chosen = run.attend_from(0, hidden, kept, k, v)
        run.feed_forward_(0, chosen)
        return chosen

    last = torch.full((1, 1), rows, device=device)
    past = Past(0, rows + 1, last[0], rows + 1)
    one = hidden[:, :1]
    return {
        "all rows": lambda: Pass(model, at, [cache], at, rotary=tables).layer(0, hidden),
        "half the rows": half,
        "one token": lambda: Pass(model, last, [cache], last, 0, tables, past).layer(0, one),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="Llama-2-7B" if ON_GPU else "50M")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16" if ON_GPU else "float32")
    parser.add_argument("--ops", choices=("auto", "triton", "torch"), default="auto")
    parser.add_argument("--rows", type=int, default=2048, help="tokens that the layer reads")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    args = parser.parse_args()
    model = random_llama(args.shape, args.dtype, args.ops, layers=1)
    ops, about, lines = model.ops, measure.about(), []
    for kind, run in kinds(model, args.rows).items():
        timing = measure.time_calls([run])
        launches = measure.count_launches(run)
        model.ops = recorded = cast(Any, Recorded(ops))
        run()
        model.ops = ops
        each = [
            (name, measure.count_launches(call), bytes_moved, 0.0)
            for name, call, bytes_moved in recorded.calls
        ]
        total = sum(bytes_moved for _, _, bytes_moved, _ in each)
        each.append(("whole layer", launches, total, 1e3 * timing.median_ms))
        for name, count, bytes_moved, microseconds in each:
            figures = (args.rows, count, bytes_moved, microseconds)
            lines.append(Line(args.shape, args.dtype, kind, name, *figures, *about))
            print(
                f"{kind:14} {name:18} {count:3} launches {bytes_moved / 1e6:9.2f} MB"
                + (f" {microseconds:9.1f} us" if microseconds else ""),
                flush=True,
            )
    measure.write_csv(args.out / f"layer-{args.shape}-{args.dtype}.csv", lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
