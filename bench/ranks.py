"""Measures one text over several processes, and simulates many GPUs.

    python bench/ranks.py measure [--shape 50M] [--tokens 16384] [--ranks 1,2] [--out DIR]
    python bench/ranks.py simulate [--rate-from FILE] [--gigabytes 50] [--microseconds 20]

`measure` starts processes with one thread each (and one GPU each where there are some), which
encode the same text together. The numbers of processes take turns. Then every process encodes the
whole text by itself, all at once: the most that the machine's cores bring. It writes DIR/ranks.csv
with a line for every rank, and its peak memory beside the planned one.

`simulate` runs no model. A step of the plan takes as long as its floating-point operations at the
rate that was measured for one GPU (`bench/encode.py`). A chunk that is sent takes the given latency
and bandwidth, and a rank waits for what it needs. It writes DIR/ranks-simulated.csv and a plot.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from csv import DictReader
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import measure  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from measure import ON_GPU  # noqa: E402
from random_models import SHAPES, Shape, random_llama  # noqa: E402

import homer_triton as ht  # noqa: E402
from homer_triton.engine.costs import node_flops  # noqa: E402
from homer_triton.engine.shares import Shares  # noqa: E402
from homer_triton.engine.tree import Node, Plan  # noqa: E402
from homer_triton.evaluation.memory import watch_peak  # noqa: E402
from homer_triton.model.config import ModelConfig  # noqa: E402
from homer_triton.model.costs import layer_flops  # noqa: E402

RESULTS = ROOT / "bench" / "results"
GPUS = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = tuple(2**n for n in range(17, 25))


@dataclass(frozen=True)
class Line:
    """A rank's part of an encoding.

    seconds: until all ranks were done, the median of the repeats; speedup: over one rank;
    cores_bring: the speed-up when every rank reads a whole text, the most that is possible;
    peak_bytes, planned_bytes: the rank's memory above the model's weights.
    """

    shape: str
    tokens: int
    ranks: int
    rank: int
    leaves: int
    seconds: float
    speedup: float
    cores_bring: float
    time_share: float
    sent_bytes: int
    peak_bytes: int | None
    planned_bytes: int
    device: str
    versions: str
    commit: str
    command: str


@dataclass(frozen=True)
class Simulated:
    """A plan over GPUs that was not run.

    seconds: until the first GPU has the result (the critical path); of_linear: the speed-up over
    one GPU, divided by their number; idle: the share of all GPUs' time that they wait; sent_bytes:
    sent by all together.
    """

    shape: str
    tokens: int
    leaves: int
    gpus: int
    seconds: float
    of_linear: float
    idle: float
    sent_bytes: int
    rate: float
    bandwidth: float
    latency: float
    rate_from: str
    commit: str
    command: str


def measure_ranks(args: argparse.Namespace) -> int:
    """Measure, and write the lines."""
    laps: dict[int, list[list[Any]]] = {count: [] for count in args.ranks}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.repeats):
            for count in args.ranks:
                meeting = Path(folder) / f"{turn}-{count}"
                ends = torch.multiprocessing.spawn(
                    _rank, (count, meeting, args.shape, args.tokens), count, join=False
                )
                while not ends.join():
                    pass
                files = (Path(f"{meeting}.{rank}") for rank in range(count))
                laps[count].append([torch.load(file) for file in files])
    about = measure.about()
    lines = []
    first = args.ranks[0]

    def median(count: int, which: int) -> float:
        return sorted(max(lap[which] for lap in turn) for turn in laps[count])[args.repeats // 2]

    for count in args.ranks:
        seconds = median(count, 0)
        speedup = first * median(first, 0) / seconds
        bring = count * median(first, 1) / median(count, 1)
        for rank, (*_, peak, share) in enumerate(laps[count][-1]):
            cost = share["leaves"], seconds, speedup, bring, share["time_share"], share["sent"]
            place = args.shape, args.tokens, count, rank
            lines.append(Line(*place, *cost, peak, share["memory"], *about))
        own = "; ".join(
            f"{lap[2] / 2**20:.0f} of {lap[3]['memory'] / 2**20:.0f}" for lap in laps[count][-1]
        )
        print(
            f"{count} ranks {seconds:7.2f} s  {speedup:.2f} x, the cores bring {bring:.2f} x  "
            f"peak of plan, MiB: {own}"
        )
    measure.write_csv(args.out / "ranks.csv", lines)
    return 0


def _rank(rank: int, count: int, meeting: Path, shape: str, tokens: int) -> None:
    """One process: it writes its seconds, its peak and its planned share to a file."""
    torch.set_num_threads(1)
    backend = "nccl" if ON_GPU else "gloo"
    if ON_GPU:
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=count)
    model = random_llama(shape, "float32", "auto")
    ids, affix, config = _task(SHAPES[shape], tokens)

    def timed(ranks: ht.Ranks | None) -> float:
        dist.barrier()
        start = time.perf_counter()
        ht.encode(model, ids[affix:-affix], ids[:affix], ids[-affix:], config, ranks=ranks)
        dist.barrier()
        return time.perf_counter() - start

    timed(ht.Ranks())  # not counted: libraries set themselves up for every shape
    peak_above = watch_peak(model.device)
    shared = timed(ht.Ranks())
    peak = peak_above()
    each = timed(None)
    context, size = tokens - 2 * affix, model.dtype.itemsize
    plan = ht.plan(model.config, context, affix, affix, config, size, on_gpu=ON_GPU, ranks=count)
    share = Shares(plan, count).costs(model.config, size, on_gpu=ON_GPU)[rank]
    torch.save((shared, each, peak, vars(share)), f"{meeting}.{rank}")
    dist.destroy_process_group()


def _task(shape: Shape, tokens: int) -> tuple[torch.Tensor, int, ht.HomerConfig]:
    """A text, its affix's length, and settings."""
    ids = torch.randint(shape.sizes["vocab_size"], (tokens,), generator=torch.manual_seed(1))
    return ids, shape.affix, ht.HomerConfig.paper()


@dataclass(frozen=True)
class Machine:
    """A simulated GPU.

    rate: floating-point operations per second; bandwidth: bytes per second that it sends; latency:
    seconds until the first of them arrives.
    """

    rate: float
    bandwidth: float
    latency: float


def simulate(plan: Plan, shape: ModelConfig, itemsize: int, ranks: int, on: Machine) -> list[float]:
    """The seconds that each rank works, and then the seconds until the first one has the result.

    Ranks run their steps in order, each as soon as what it needs has arrived. They send chunks one
    after another while they go on working.
    """
    shares = Shares(plan, ranks)
    prefix = layer_flops(shape, 0, plan.prefix_len) * plan.layers_tree / on.rate
    clock, busy, link = [prefix] * ranks, [prefix] * ranks, [0.0] * ranks
    arrives: dict[Node, float] = {}
    # A right child runs before its parent, on whichever rank.
    for nodes in plan.steps():
        rank = shares.owner(nodes[0])
        child = shares.arriving(nodes)
        start = max(clock[rank], 0.0 if child is None else arrives[child])
        seconds = sum(node_flops(plan, shape, node) for node in nodes) / on.rate
        clock[rank] = start + seconds
        busy[rank] += seconds
        if shares.destination(nodes) is not None:
            (node,) = nodes
            size = shares.sent_bytes(node, shape, itemsize)
            link[rank] = max(clock[rank], link[rank]) + size / on.bandwidth
            arrives[node] = link[rank] + on.latency
    walked = sum(node_flops(plan, shape, node) for level in plan.levels for node in level.nodes)
    last = (plan.flops(shape) - walked) / on.rate - prefix
    return [busy[0] + last, *busy[1:], clock[0] + last]


def simulate_all(args: argparse.Namespace) -> int:
    """Simulate, and write the lines and their plot."""
    with args.rate_from.open() as file:
        measured = max(DictReader(file), key=lambda line: int(line["tokens"]))
    name = measured["shape"]
    rate = int(measured["flops"]) / float(measured["seconds"])
    machine = Machine(rate, 1e9 * args.gigabytes, 1e-6 * args.microseconds)
    shape, affix = ModelConfig.from_hf(SHAPES[name].config(torch.bfloat16)), SHAPES[name].affix
    *_, commit, command = measure.about()
    lines = [
        Simulated(name, *result, *vars(machine).values(), args.rate_from.name, commit, command)
        for tokens in LENGTHS
        for result in _simulated(shape, affix, tokens, machine)
    ]
    measure.write_csv(args.out / "ranks-simulated.csv", lines)
    draw(lines, args.out / "ranks-simulated.png")
    for line in lines:
        print(
            f"{line.tokens:10,} tokens, {line.leaves:5,} leaves, {line.gpus:2} GPUs: "
            f"{line.seconds:8.2f} s, {line.of_linear:4.0%} of linear, idle {line.idle:3.0%}, "
            f"{line.sent_bytes / 2**20:,.0f} MiB sent"
        )
    return 0


def _simulated(
    shape: ModelConfig, affix: int, tokens: int, machine: Machine
) -> Iterator[tuple[int, int, int, float, float, float, int]]:
    """By the number of GPUs: tokens, leaves, GPUs, seconds, of linear, idle and bytes sent."""
    config = ht.HomerConfig.paper()
    alone = 0.0
    for gpus in GPUS:
        context = tokens - 2 * affix
        plan = ht.plan(shape, context, affix, affix, config, 2, ranks=gpus)
        leaves = len(plan.levels[0].nodes)
        if gpus > leaves:
            return
        *busy, seconds = simulate(plan, shape, 2, gpus, machine)
        alone = alone or seconds
        sent = sum(share.sent for share in Shares(plan, gpus).costs(shape, 2))
        idle = 1 - sum(busy) / (gpus * seconds)
        yield tokens, leaves, gpus, seconds, alone / seconds / gpus, idle, sent


def draw(lines: list[Simulated], path: Path) -> None:
    """Draw seconds and the share of a linear speed-up by GPUs, with a curve for each length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for tokens in LENGTHS:
        own = [line for line in lines if line.tokens == tokens]
        gpus = [line.gpus for line in own]
        label = f"{tokens // 2**10:,}k tokens" if tokens < 2**20 else f"{tokens // 2**20}M tokens"
        left.loglog(gpus, [line.seconds for line in own], "o-", base=2, label=label)
        right.semilogx(gpus, [100 * line.of_linear for line in own], "o-", base=2, label=label)
    left.set_ylabel("seconds until the first GPU has the result")
    right.set_ylabel("speed-up over one GPU, % of linear")
    right.set_ylim(0, 105)
    for axes in (left, right):
        axes.set_xlabel("GPUs")
        axes.set_xticks(GPUS, map(str, GPUS))
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)
    one = lines[0]
    figure.suptitle(
        f"A simulation: {one.shape}, bfloat16, {one.rate / 1e12:.0f} TFLOP/s a GPU (measured), "
        f"{one.bandwidth / 1e9:g} GB/s and {1e6 * one.latency:g} µs between them (assumed)",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    measured = commands.add_parser("measure")
    measured.add_argument("--shape", choices=SHAPES, default="50M")
    measured.add_argument("--tokens", type=int, default=16384, help="length of the text")
    counts = torch.cuda.device_count() if ON_GPU else len(os.sched_getaffinity(0))
    powers = [2**n for n in range(counts.bit_length())]
    measured.add_argument(
        "--ranks", type=lambda text: [int(n) for n in text.split(",")], default=powers
    )
    measured.add_argument("--repeats", type=int, default=3, help="of which the median counts")
    measured.set_defaults(run=measure_ranks)
    simulated = commands.add_parser("simulate")
    file = RESULTS / "h200" / "encode-Llama-3-8B-bfloat16.csv"
    simulated.add_argument("--rate-from", type=Path, default=file, help="a CSV of bench/encode.py")
    simulated.add_argument("--gigabytes", type=float, default=50.0, help="a second, per GPU")
    simulated.add_argument("--microseconds", type=float, default=20.0, help="latency of a chunk")
    simulated.set_defaults(run=simulate_all)
    for command in (measured, simulated):
        command.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
