"""Time and memory of `encode` by length, beside transformers' plain prefill on the same weights.

    python bench/encode.py [--shape 50M] [--dtype float32] [--lengths 4096,8192] [--out DIR]
                           [--systems torch,triton]

Systems take turns at each length. On a CPU every measurement has a process of its own, so that
one's memory is not another's; a GPU's allocator counts its own. First, in the same run, a text of
one chunk must give transformers' own logits. Writes DIR/encode-SHAPE-DTYPE.csv (its name ends in
-graphs or -offload where that was asked for) and two plots beside it, and prints the crossover: the
length below which the plain prefill is faster.
"""

import argparse
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import measure  # noqa: E402
import torch  # noqa: E402
from random_models import SHAPES, as_transformers, random_llama  # noqa: E402
from torch import Tensor  # noqa: E402

import homer_triton as ht  # noqa: E402
from homer_triton.evaluation import memory  # noqa: E402
from homer_triton.loading import DTYPES  # noqa: E402
from homer_triton.model.llama import Llama  # noqa: E402

AFFIX = 16  # tokens of the prefix, and of the suffix
PLAIN = "transformers"
MATRIX_OPS = ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise")
ATTENTION_OPS = "scaled_dot_product"


@dataclass(frozen=True)
class Line:
    """One system at one length. peak_bytes, predicted_bytes: the most memory above the weights, and
    what the plan says of it; share_of_rate: of the matrix rate measured in the same process;
    share_outside: of the time, spent neither in matrix products nor in attention (CPU only, else
    nan).
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
    device: str
    versions: str
    commit: str
    command: str


@dataclass(frozen=True)
class Task:
    """What a child process is to measure."""

    shape: str
    dtype: str
    system: str
    tokens: int
    leaf_batch: int | None
    repeats: int
    profile: bool
    cuda_graphs: bool
    offload: bool


def make_call(model: Llama, task: Task) -> Callable[[], Tensor]:
    """A function that reads the whole input and returns the last token's logits [V]."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (task.tokens,), generator=generator)
    if task.system == PLAIN:
        peer, inputs = as_transformers(model), ids[None].to(model.device)

        def prefill() -> Tensor:
            with torch.no_grad():
                return peer(inputs, logits_to_keep=1).logits[0, -1].float()

        return prefill
    prefix, context, suffix = ids[:AFFIX], ids[AFFIX:-AFFIX], ids[-AFFIX:]
    config = homer_config(task)
    return lambda: ht.encode(model, context, prefix, suffix, config).logits


def measure_task(task: Task) -> Line:
    """Warm up on the first call, time the others, and note the memory of all."""
    model = random_llama(task.shape, task.dtype, "torch" if task.system == PLAIN else task.system)
    rate, plain = matrix_rate(model), task.system == PLAIN
    call = make_call(model, task)
    # Libraries set themselves up, and some for every shape; what that takes is not counted.
    warm_up = min(task.tokens, model.config.max_position_embeddings) if plain else task.tokens
    if torch.cuda.is_available():  # kernels are compiled for no length
        warm_up = min(warm_up, 16 * model.config.max_position_embeddings)
    make_call(model, replace(task, tokens=warm_up))()
    before = reset_peak()
    seconds = sorted(timed(call) for _ in range(task.repeats))[task.repeats // 2]
    peak = peak_bytes() - before
    outside = profile_outside(call) if task.profile else math.nan
    size, on_gpu = model.dtype.itemsize, model.device.type != "cpu"
    context = task.tokens - 2 * AFFIX
    tree = ht.plan(model.config, context, AFFIX, AFFIX, homer_config(task), size, on_gpu=on_gpu)
    flops = tree.prefill_flops(model.config) if plain else tree.flops(model.config)
    predicted = (
        tree.prefill_memory(model.config, size)
        if plain
        else tree.memory(model.config, size, on_gpu=on_gpu)
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
        *measure.about(),
    )


def homer_config(task: Task) -> ht.HomerConfig:
    return ht.HomerConfig.paper(
        layers_warmup=SHAPES[task.shape].layers_warmup,
        leaf_batch=task.leaf_batch,
        cuda_graphs=task.cuda_graphs and task.system != PLAIN,
        offload="cpu" if task.offload else None,
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


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
    """Forget the peak so far; returns the memory in use, in bytes."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return memory.forget_peak()


def peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else memory.peak()


def check(shape: str, dtype: str, system: str) -> None:
    """Raise `ArithmeticError` unless an input of one chunk gives transformers' logits."""
    model = random_llama(shape, dtype, system)
    task = Task(shape, dtype, system, 0, 1, 1, False, False, False)
    tokens = homer_config(task).chunk_len(model.config)
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


def crossover(lines: list[Line], system: str) -> float | None:
    """The length at which a system overtakes the plain prefill, between measured ones."""
    seconds = {(line.system, line.tokens): line.seconds for line in lines}
    lengths = sorted(n for s, n in seconds if s == PLAIN and (system, n) in seconds)
    ratios = [(n, math.log(seconds[system, n] / seconds[PLAIN, n])) for n in lengths]
    for (short, above), (long, below) in pairwise(ratios):
        if above > 0 >= below:
            part = above / (above - below)
            return math.exp(math.log(short) * (1 - part) + math.log(long) * part)
    return None


def draw(lines: list[Line], path: Path, value: Callable[[Line], float], label: str) -> None:
    """One curve a system over the length, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for system in dict.fromkeys(line.system for line in lines):
        points = sorted((line.tokens, value(line)) for line in lines if line.system == system)
        axes.loglog(*zip(*points, strict=True), "o-", base=2, label=system)
    axes.set_xlabel("input tokens")
    axes.set_ylabel(label)
    axes.set_title(f"{lines[0].shape}, {lines[0].dtype}, {lines[0].device}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def tasks(arguments: argparse.Namespace, ours: list[str]) -> Iterator[Task]:
    """What is to be measured: the systems in turn at each length."""
    on_gpu = torch.cuda.is_available()
    for tokens in (int(length) for length in arguments.lengths.split(",")):
        for system in [PLAIN, *ours] if tokens <= arguments.plain_up_to else ours:
            yield Task(
                arguments.shape,
                arguments.dtype,
                system,
                tokens,
                arguments.leaf_batch,
                arguments.repeats,
                system == "torch" and not on_gpu and tokens <= 16384,
                arguments.cuda_graphs,
                arguments.offload,
            )


def measure_all(
    arguments: argparse.Namespace, ours: list[str], path: Path
) -> tuple[list[Line], int]:
    """Every system at every length, written to a CSV as it comes; and how many failed."""
    lines: list[Line] = []
    failed = 0
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1, maxtasksperchild=None if torch.cuda.is_available() else 1) as child:
        for system in ours:
            child.apply(check, (arguments.shape, arguments.dtype, system))
        for task in tasks(arguments, ours):
            try:
                line = child.apply(measure_task, (task,))
            except RuntimeError as error:  # out of memory: the others may fit
                failed += 1
                reason = str(error).splitlines()[0]
                print(f"{task.tokens:8} {task.system:13} failed: {reason}", flush=True)
                continue
            lines.append(line)
            measure.write_csv(path, lines)  # what is measured stays, whatever comes after
            print(
                f"{line.tokens:8} {line.system:13} {line.seconds:8.2f} s "
                f"{line.microseconds_per_token:8.1f} us/token "
                f"{line.peak_bytes / 2**20:7.0f} MiB  {line.share_of_rate:4.0%} of the matrix rate"
                + ("" if math.isnan(line.share_outside) else f"  {line.share_outside:.0%} outside"),
                flush=True,
            )
    return lines, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="50M")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384,32768,65536,131072")
    parser.add_argument(
        "--plain-up-to", type=int, default=32768, help="tokens of the plain prefill"
    )
    parser.add_argument("--systems", help="torch, triton or both; all that run here by default")
    parser.add_argument("--leaf-batch", type=int, help="as many as fill the chip by default")
    parser.add_argument("--cuda-graphs", action="store_true", help="replay steps of equal shape")
    parser.add_argument("--offload", action="store_true", help="waiting chunks in host memory")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    args = parser.parse_args()
    here = ["torch", "triton"] if torch.cuda.is_available() else ["torch"]
    ours = args.systems.split(",") if args.systems else here
    options = "-graphs" * args.cuda_graphs + "-offload" * args.offload
    path = args.out / f"encode-{args.shape}-{args.dtype}{options}.csv"
    lines, failed = measure_all(args, ours, path)
    if not lines:
        return 1
    for system in ours:
        point = crossover(lines, system)
        found = "not within these lengths" if point is None else f"at about {point:.0f} tokens"
        print(f"{system} overtakes the plain prefill {found}")
    draw(lines, path.with_suffix(".time.png"), lambda line: line.seconds, "seconds")
    draw(
        lines,
        path.with_suffix(".memory.png"),
        lambda line: max(line.peak_bytes, 1) / 2**20,
        "MiB above the weights, at the peak",
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
