"""The tables of the real pretrained model, from bench/results/real."""

import json
from collections.abc import Callable
from typing import Any

from table_parts import NOT_RUN, RESULTS, Rows, answered, markdown, read_json, scored

# The real model's methods: title, and the group of runs and the name within it.
REAL = {
    "**HOMER**": ("homer", "homer"),
    "HOMER, read once": ("read", "read"),
    "HOMER, text appended in four parts": ("appended", "appended"),
    "HOMER as published": ("paper", "homer"),
    "plain model": ("plain", "plain"),
    "position interpolation": ("pi", "pi"),
    "NTK": ("ntk", "ntk"),
    "YaRN": ("yarn", "yarn"),
    "last tokens that fit": ("window", "window"),
    "BM25 retrieval": ("retrieval", "retrieval"),
    "sequential compression (FINCH-like)": ("sequential", "sequential"),
    "independent chunks": ("independent", "independent"),
}
# Of the checkpoint that bench/real.py reads with.
REAL_LIMIT = 8192


def real_model() -> str:
    """What `homer demo` says about the real model: right answers and questions, by length."""
    cells = real_lengths("needles")["**HOMER**"]
    needles = {str(n): [round(row["right"]), row["total"]] for n, row in sorted(cells.items())}
    found = {"model": "SmolLM2-135M-Instruct", "limit": REAL_LIMIT, "needles": needles}
    return json.dumps(found, indent=2) + "\n"


def real_lengths(task: str) -> dict[str, dict[int, dict[str, Any]]]:
    """What each method reached on a task of the real model, by title and length."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for title, (group, method) in REAL.items():
        metrics = RESULTS / "real" / f"{task}-{group}" / "metrics.json"
        if metrics.is_file():
            device = read_json(f"real/{task}-{group}/config.json")["environment"]["device"]
            on_cpu = "NVIDIA" not in device
            for row in read_json(f"real/{task}-{group}/metrics.json")["by_length"]:
                if row["method"] == method:
                    found.setdefault(title, {})[row["length"]] = {**row, "on_cpu": on_cpu}
    return found


def by_length(task: str, cell: Callable[[dict[str, Any]], str]) -> str:
    """A row for each method of a task of the real model, a cell for each length that was asked."""
    found = real_lengths(task)
    lengths = sorted(set().union(*found.values()))
    rows = []
    for title, cells in found.items():
        rows.append([title, *(cell(cells[n]) if n in cells else "" for n in lengths)])
    return markdown(["method", *map(times_limit, lengths)], rows)


def real(task: str) -> str:
    """Right answers of each method on a task of the real model, with 95 % Wilson intervals and the
    number of questions.
    """
    return by_length(task, asked)


def asked(row: dict[str, Any]) -> str:
    return f"{answered(row)} of {row['total']}"


def times_limit(length: int) -> str:
    return f"{length / REAL_LIMIT:g} × ({length:,})"


def real_tasks() -> str:
    """RULER's tasks one by one: the mean score of each method at each length."""
    rows: Rows = []
    tasks: list[str] = []
    for title, (group, method) in REAL.items():
        metrics = RESULTS / "real" / f"ruler-{group}" / "metrics.json"
        if not metrics.is_file():
            continue
        own = read_json(f"real/ruler-{group}/metrics.json")["by_task"]
        tasks = tasks or list(dict.fromkeys(x["task"] for x in own))
        for length in sorted({x["length"] for x in own}):
            cells = {x["task"]: x for x in own if (x["method"], x["length"]) == (method, length)}
            if cells:
                shares = [answered(cells[name]) + kept(cells[name]) for name in tasks]
                rows.append([title, times_limit(length), str(cells[tasks[0]]["total"]), *shares])
    return markdown(["method", "text", "questions of each", *tasks], rows)


def kept(row: dict[str, Any]) -> str:
    return "" if row.get("held") is None else f", {row['held']:.0%} kept"


def real_costs() -> str:
    """Mean seconds of a question and peak memory above the model, of each method on needles."""
    return by_length("needles", cost)


def cost(row: dict[str, Any]) -> str:
    figures = f"{row['seconds']:.1f} s, {row['peak_bytes'] / 2**20:,.0f} MiB"
    return f"{figures} (CPU)" if row["on_cpu"] else figures


def real_ablation() -> str:
    """Needles found on the real model with one part of the method changed."""
    if not (RESULTS / "real" / "ablation" / "metrics.json").is_file():
        return NOT_RUN
    measured = read_json("real/ablation/metrics.json")["by_length"]
    rows = [[*row["method"].split(": ", 1), asked(row)] for row in measured]
    return markdown(["part", "change", "right answers"], rows)


def real_heads() -> str:
    """How well the votes of some heads rank an answer's tokens among those of its chunk."""
    if not (RESULTS / "real" / "heads.json").is_file():
        return NOT_RUN
    lines = read_json("real/heads.json")["lines"]
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    by = {(line["heads"], line["task"]): line for line in lines}
    rows = []
    for heads in dict.fromkeys(line["heads"] for line in lines):
        cells = [by[heads, task] for task in tasks]
        rows.append([heads, *(f"{x['mean_rank']:.1%}, {x['kept']:.0%}" for x in cells)])
    return markdown(["heads that vote", *tasks], rows)


def real_perplexity() -> str:
    """Perplexity of novels by position, and how many times the window's it is."""
    if not (RESULTS / "real" / "perplexity" / "metrics.json").is_file():
        return NOT_RUN
    measured = read_json("real/perplexity/metrics.json")["by_position"]
    positions = sorted({row["position"] for row in measured})
    by = {(row["method"], row["position"]): row for row in measured}
    rows = [
        [title, *(scored(by[method, n]) for n in positions)]
        for method, title in (("window", "last tokens that fit"), ("homer", "HOMER"))
    ]
    ratios = [by["homer", n]["perplexity"] / by["window", n]["perplexity"] for n in positions]
    rows.append(["HOMER / last tokens", *(f"{x:.3f}" for x in ratios)])
    return markdown(["method", *(f"{n / REAL_LIMIT:g} ×" for n in positions)], rows)
