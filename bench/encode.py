"""Measures `encode` by length, beside transformers' plain prefill on the same weights.

    python bench/encode.py [--shape 50M] [--dtype float32] [--lengths 4096,8192] [--out DIR]
                           [--systems torch,torch+paper,triton+graphs] [--leaf-batch 1,4]

Measures time and memory. Systems take turns at each length, and lengths run in the given order.
First, in the same run, a text from which nothing is pruned must give transformers' own logits. A
system that fails this check is reported and still measured; the column `checked` says so. Writes
DIR/encode-SHAPE-DTYPE.csv and two plots, and prints the crossover: the length below which the plain
prefill is faster. Exits with 1 if anything failed.

On a GPU, memory is what its allocator counts. On a CPU every measurement has its own process, and
memory is that process's peak under glibc's allocator, after a first call in which libraries set
themselves up. Long texts reach a quarter more than the plan: holes that the heap keeps between ever
more steps. With `MALLOC_MMAP_THRESHOLD_=131072` every tensor has pages of its own: the peak of the
50M model is then 33 MiB at each length, but reading takes a third longer.
"""

import argparse
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import measure  # noqa: E402
import torch  # noqa: E402
from measure import ON_GPU, describe, synchronize  # noqa: E402
from random_models import SHAPES, as_transformers, random_llama  # noqa: E402
from torch import Tensor  # noqa: E402

import homer_triton as ht  # noqa: E402
from homer_triton.evaluation import memory  # noqa: E402
from homer_triton.loading import DTYPES, OpsName  # noqa: E402
from homer_triton.model.llama import Llama  # noqa: E402

PLAIN = "transformers"
MATRIX_OPS = ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise")
ATTENTION_OPS = "scaled_dot_product"


@dataclass(frozen=True)
class Line:
    """One system at one length.

    peak_bytes, predicted_bytes: the peak memory above the weights, measured and planned;
    share_of_rate: share of the matrix rate that was measured in the same process; share_outside:
    share of the time outside matrix products and attention (nan on a GPU); checked: whether the
    system gives transformers' logits where nothing is pruned.
    """

    shape: str
    dtype: str
    system: str
    tokens: int
    leaf_batch: int
    seconds: float
    microseconds_per_token: float
    peak_bytes: int
    predicted_bytes: int
    flops: int
    share_of_rate: float
    share_outside: float
    checked: bool
    device: str
    versions: str
    commit: str
    command: str


@dataclass(frozen=True)
class Task:
    """What a child process measures.

    system: the ops, and how they run. "triton+paper" is the method as published instead of our
    defaults, "triton+graphs" replays steps of equal shape, "triton+offload" keeps waiting chunks in
    host memory.
    """

    shape: str
    dtype: str
    system: str
    tokens: int
    leaf_batch: int | None = None
    repeats: int = 1
    checked: bool = True

    @property
    def ops(self) -> OpsName:
        return "torch" if self.system == PLAIN else self.system.split("+")[0]  # type: ignore

    def runs_with(self, way: str) -> bool:
        return way in self.system.split("+")

    @property
    def profile(self) -> bool:
        alone = self.system != PLAIN and self.ops == "torch"
        return alone and not ON_GPU and self.tokens <= 16384


def make_call(model: Llama, task: Task) -> Callable[[], Tensor]:
    """Return a function that reads the whole input and returns the last token's logits [V]."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (task.tokens,), generator=generator)
    if task.system == PLAIN:
        peer, inputs = as_transformers(model), ids[None].to(model.device)

        def prefill() -> Tensor:
            with torch.no_grad():
                return peer(inputs, logits_to_keep=1).logits[0, -1].float()

        return prefill
    affix = SHAPES[task.shape].affix
    prefix, context, suffix = ids[:affix], ids[affix:-affix], ids[-affix:]
    config = homer_config(task)
    return lambda: ht.encode(model, context, prefix, suffix, config).logits


def measure_task(task: Task) -> Line:
    """Warm up with a first call, time the others, and measure the memory of all."""
    model = random_llama(task.shape, task.dtype, task.ops)
    rate, plain = matrix_rate(model), task.system == PLAIN
    call = make_call(model, task)
    # Not counted: libraries set themselves up, some of them for every shape.
    warm_up = min(task.tokens, model.config.max_position_embeddings) if plain else task.tokens
    if ON_GPU:  # kernels are not compiled again for a length
        warm_up = min(warm_up, 16 * model.config.max_position_embeddings)
    make_call(model, replace(task, tokens=warm_up))()
    before = reset_peak()
    seconds = sorted(timed(call) for _ in range(task.repeats))[task.repeats // 2]
    peak = peak_bytes() - before
    outside = profile_outside(call) if task.profile else math.nan
    size = model.dtype.itemsize
    affix = SHAPES[task.shape].affix
    context = task.tokens - 2 * affix
    tree = ht.plan(model.config, context, affix, affix, homer_config(task), size, on_gpu=ON_GPU)
    flops = tree.prefill_flops(model.config) if plain else tree.flops(model.config)
    predicted = (
        tree.prefill_memory(model.config, size)
        if plain
        else tree.memory(model.config, size, on_gpu=ON_GPU)
    )
    return Line(
        task.shape,
        task.dtype,
        task.system,
        task.tokens,
        tree.leaf_batch,
        seconds,
        seconds / task.tokens * 1e6,
        peak,
        predicted,
        flops,
        flops / seconds / rate,
        outside,
        task.checked,
        *measure.about(),
    )


def homer_config(task: Task) -> ht.HomerConfig:
    make = ht.HomerConfig.paper if task.runs_with("paper") else ht.HomerConfig
    return make(
        leaf_batch=task.leaf_batch,
        cuda_graphs=task.runs_with("graphs") and ON_GPU,
        offload="cpu" if task.runs_with("offload") else None,
    )


def timed(call: Callable[[], Tensor]) -> float:
    """Seconds of one call, which must give finite logits."""
    synchronize()
    start = time.perf_counter()
    logits = call()
    synchronize()
    seconds = time.perf_counter() - start
    if not logits.isfinite().all():
        raise ArithmeticError("the logits are not finite")
    return seconds


def matrix_rate(model: Llama) -> float:
    """FLOPs per second of this model's largest product over 4096 rows, the median of five."""
    matrix = model.weights.layers[0].gate_up[0]
    x = torch.randn(4096, matrix.shape[1], dtype=model.dtype, device=model.device)
    samples = sorted(timed(lambda: model.ops.linear(x, (matrix,))) for _ in range(6))
    return 2 * x.shape[0] * matrix.numel() / samples[2]


def profile_outside(call: Callable[[], Tensor]) -> float:
    """The share of a call's CPU time that is neither matrix products nor attention."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    inside = sum(t for key, t in times.items() if key in MATRIX_OPS or ATTENTION_OPS in key)
    return 1 - inside / sum(times.values())


def reset_peak() -> int:
    """Reset the peak; returns the memory in use, in bytes."""
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return memory.forget_peak()


def peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if ON_GPU else memory.peak()


def check(shape: str, dtype: str, system: str) -> None:
    """Raise `ArithmeticError` unless an input that is kept whole gives transformers' logits."""
    task = Task(shape, dtype, system, 0, leaf_batch=1)
    model = random_llama(shape, dtype, task.ops)
    tokens = homer_config(task).most_rows(model.config, 2 * SHAPES[shape].affix)
    task = replace(task, tokens=tokens)
    ours = make_call(model, task)()
    peer = as_transformers(model)
    plain = replace(task, system=PLAIN)
    own = make_call(model, plain)()
    if dtype == "float32":
        error = (ours - own).abs().max().item()
        if not error <= 1e-3:
            raise ArithmeticError(f"the logits of {system} are off by {error:.1e}")
        return
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (tokens,), generator=generator)
    with torch.no_grad():
        exact = peer.float()(ids[None].to(model.device), logits_to_keep=1).logits[0, -1]
    measure.require_as_exact(ours, own, exact)


def curves(lines: list[Line]) -> dict[str, list[Line]]:
    """The lines of each system, shortest text first.

    A system with several leaf batches at one length has a curve for each of them.
    """
    given: dict[tuple[str, int], int] = {}
    for line in lines:
        given[line.system, line.tokens] = given.get((line.system, line.tokens), 0) + 1
    several = {system for (system, _), count in given.items() if count > 1}
    found: dict[str, list[Line]] = {}
    for line in sorted(lines, key=lambda line: line.tokens):
        batch = f", leaf batch {line.leaf_batch}" if line.system in several else ""
        found.setdefault(line.system + batch, []).append(line)
    return found


def crossover(curve: list[Line], plain: list[Line]) -> float | None:
    """The length from which a system is faster than the plain prefill, interpolated."""
    seconds = {line.tokens: line.seconds for line in plain}
    ratios = [
        (line.tokens, math.log(line.seconds / seconds[line.tokens]))
        for line in curve
        if line.tokens in seconds
    ]
    for (short, above), (long, below) in pairwise(ratios):
        if above > 0 >= below:
            part = above / (above - below)
            return math.exp(math.log(short) * (1 - part) + math.log(long) * part)
    return None


def draw(lines: list[Line], path: Path, value: Callable[[Line], float], label: str) -> None:
    """Draw a curve for each system over the length, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, curve in curves(lines).items():
        points = [(line.tokens, value(line)) for line in curve]
        axes.loglog(*zip(*points, strict=True), "o-", base=2, label=name)
    axes.set_xlabel("input tokens")
    axes.set_ylabel(label)
    axes.set_title(f"{lines[0].shape}, {lines[0].dtype}, {lines[0].device}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def attempt(work: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, str]:
    """In a child: (the result, "") or (None, the problem).

    The problem is in words, since not every exception of a compiler can be sent to another process.
    """
    try:
        return work(*arguments), ""
    except Exception as error:  # the others still run
        return None, describe(error)


class Child:
    """A process that works for this one.

    A new one replaces it after a problem, which may have cost it the GPU. On a CPU, every call gets
    a new one.
    """

    def __init__(self, method: str) -> None:
        self._context = multiprocessing.get_context(method)
        self._pool: ProcessPoolExecutor | None = None

    def __call__(self, work: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
        """Run `attempt` in the process."""
        pool = self._pool or ProcessPoolExecutor(1, self._context)
        self._pool = None
        try:
            result, problem = pool.submit(attempt, work, arguments).result()
        except BrokenProcessPool:
            result, problem = None, "the process died"
        if ON_GPU and not problem:
            self._pool = pool
        else:
            pool.shutdown()
        return result, problem


def tasks(arguments: argparse.Namespace, checked: dict[str, bool]) -> Iterator[Task]:
    """What to measure: at each length the plain prefill and then the systems."""
    shape, dtype, repeats = arguments.shape, arguments.dtype, arguments.repeats
    for tokens in arguments.lengths:
        if tokens <= arguments.plain_up_to:
            yield Task(shape, dtype, PLAIN, tokens, None, repeats)
        for system, right in checked.items():
            for batch in arguments.leaf_batch:
                yield Task(shape, dtype, system, tokens, batch, repeats, right)


def check_all(arguments: argparse.Namespace, child: Child) -> dict[str, bool]:
    """Which of the systems are right; reports those that are wrong."""
    checked = {}
    for system in arguments.systems:
        _, problem = child(check, arguments.shape, arguments.dtype, system)
        checked[system] = not problem
        if problem:
            print(f"{system} failed the check: {problem}", flush=True)
    return checked


def measure_all(
    arguments: argparse.Namespace, checked: dict[str, bool], child: Child, path: Path
) -> tuple[list[Line], int]:
    """Measure every system at every length; returns the lines, and how many failed.

    The CSV is written after each.
    """
    lines: list[Line] = []
    failed = 0
    for task in tasks(arguments, checked):
        line, problem = child(measure_task, task)
        if problem:
            failed += 1
            print(f"{task.tokens:8} {task.system:14} failed: {problem}", flush=True)
            continue
        lines.append(line)
        measure.write_csv(path, lines)  # keeps what is measured, even if a later one fails
        print(
            f"{line.tokens:8} {line.system:14} {line.leaf_batch:3} leaves {line.seconds:8.2f} s "
            f"{line.microseconds_per_token:8.1f} us/token "
            f"{line.peak_bytes / 2**20:7.0f} MiB  {line.share_of_rate:4.0%} of the matrix rate"
            + ("" if math.isnan(line.share_outside) else f"  {line.share_outside:.0%} outside")
            + ("" if line.checked else "  not right"),
            flush=True,
        )
    return lines, failed


def whole_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="50M")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--lengths",
        type=whole_numbers,
        default="1024,2048,4096,8192,16384,32768,65536,131072",
        help="tokens, measured in this order",
    )
    parser.add_argument(
        "--plain-up-to", type=int, default=32768, help="most tokens for the plain prefill"
    )
    parser.add_argument(
        "--systems",
        type=lambda text: text.split(","),
        default="torch,triton,triton+paper" if ON_GPU else "torch,torch+paper",
        help="torch or triton; +paper: the published method; +graphs (on a GPU); +offload",
    )
    parser.add_argument(
        "--leaf-batch",
        type=whole_numbers,
        default=[None],
        help="leaves at once, one number or several; default: as many as fill the chip",
    )
    parser.add_argument("--repeats", type=int, default=1, help="of which the median counts")
    parser.add_argument(
        "--start-method",
        choices=("spawn", "fork"),
        default="spawn",
        help="of the processes; fork is quicker, but a CPU's memory then includes this process's",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    return parser.parse_args()


def main() -> int:
    args = parse()
    path = args.out / f"encode-{args.shape}-{args.dtype}.csv"
    child = Child(args.start_method)
    checked = check_all(args, child)
    lines, failed = measure_all(args, checked, child, path)
    if not lines:
        return 1
    found = curves(lines)
    plain = found.pop(PLAIN, [])
    for name, curve in found.items():
        point = crossover(curve, plain)
        where = "not within these lengths" if point is None else f"at about {point:.0f} tokens"
        print(f"{name} overtakes the plain prefill {where}")
    draw(lines, path.with_suffix(".time.png"), lambda line: line.seconds, "seconds")
    draw(
        lines,
        path.with_suffix(".memory.png"),
        lambda line: max(line.peak_bytes, 1) / 2**20,
        "MiB above the weights, at the peak",
    )
    return 1 if failed or not all(checked.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
