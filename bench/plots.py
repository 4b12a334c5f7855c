"""Draws what `bench/kernels.py` measured.

    python bench/plots.py [--out DIR]

Reads DIR/kernels.csv. Writes DIR/roofline.png, every kernel against the copy bandwidth and the
matrix rate of the same run, and DIR/ratios.png, every kernel's time against PyTorch's.
"""

import argparse
import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"
MARKERS = "osD^vP*Xh<>"

Line = dict[str, str]


def read_lines(path: Path) -> list[Line]:
    """The measurements of one run."""
    with path.open() as file:
        return list(csv.DictReader(file))


def draw_roofline(lines: list[Line], path: Path) -> None:
    """Draw FLOPs per second over FLOPs per byte. Ops that compute nothing count bytes as FLOPs."""
    limits = {line["case"]: line for line in lines if line["op"] == "limit"}
    copy = int(limits["copy"]["bytes"]) * 1e3
    matrix = int(limits["matrix"]["flops"]) * 1e3
    # A step of several ops has no roof.
    ours = [x for x in lines if x["system"] == "triton" and x["op"] != "closing step"]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    edge = matrix / copy
    axes.loglog([0.5, edge, 8 * edge], [0.5 * copy, matrix, matrix], color="black", lw=1)
    ops = list(dict.fromkeys(line["op"] for line in ours))
    for op, marker in zip(ops, MARKERS, strict=False):
        here = [line for line in ours if line["op"] == op]
        work = [int(line["flops"]) or int(line["bytes"]) for line in here]
        intensity = [w / int(line["bytes"]) for w, line in zip(work, here, strict=True)]
        rate = [w / float(line["median_ms"]) * 1e3 for w, line in zip(work, here, strict=True)]
        axes.plot(intensity, rate, marker, label=op, ms=7, alpha=0.8)
    axes.set_xlabel("FLOPs per byte (1 for ops that only move bytes)")
    axes.set_ylabel("FLOPs per second (bytes for those)")
    axes.set_title(f"{ours[0]['device']}: limits measured in the same run")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_ratios(lines: list[Line], path: Path) -> None:
    """Draw how many times as fast each kernel is as each other system."""
    right = [x for x in lines if x["checked"] == "True"]
    ours = {(x["op"], x["case"]): float(x["median_ms"]) for x in right if x["system"] == "triton"}
    others = [x for x in lines if x["system"] != "triton" and (x["op"], x["case"]) in ours]
    names = [f"{x['op']}, {x['case']}: {x['system']}" for x in others]
    ratios = [float(x["median_ms"]) / ours[x["op"], x["case"]] for x in others]
    figure, axes = plt.subplots(figsize=(9, 0.3 * len(names) + 1.2), layout="constrained")
    colours = ["tab:green" if ratio >= 1 else "tab:red" for ratio in ratios]
    bars = axes.barh(names, ratios, color=colours, alpha=0.8)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.axvline(1, color="black", lw=1)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel("its time / the kernel's time (above 1 the kernel is faster)")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    folder = parser.parse_args().out
    path = folder / "kernels.csv"
    if not path.exists():
        print(f"{path} does not exist: run bench/kernels.py on a GPU first", file=sys.stderr)
        return 2
    lines = read_lines(path)
    draw_roofline(lines, folder / "roofline.png")
    draw_ratios(lines, folder / "ratios.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
