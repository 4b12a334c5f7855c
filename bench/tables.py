"""The tables of README.md and bench/README.md, made from the committed results: `python
bench/tables.py` writes them.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; nothing else in the files changes.
A test holds them to what the results say.
"""

import csv
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "bench" / "README.md")
RESULTS = ROOT / "bench" / "results"
REAL_MODEL = ROOT / "homer_triton" / "demo" / "real_model.json"
PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

Rows = list[list[str]]


def markdown(header: list[str], rows: Rows) -> str:
    """A table, the first column to the left and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def headline() -> str:
    """What the real model finds, in a sentence."""
    cells = real_lengths("needles")["**HOMER, our defaults**"]
    found = [f"{row['right']:.0f} of {row['total']} at {n:,}" for n, row in sorted(cells.items())]
    return (
        f"SmolLM2-135M, a pretrained Llama that reads {REAL_LIMIT:,} tokens, so finds magic\n"
        f"numbers in novels: **{', '.join(found)} tokens**,\n"
        "with all settings left at their defaults ([how](#what-it-finds-and-how-fast)).\n"
    )


def demo() -> str:
    """What `homer demo` found: accuracy, time and memory of each system at each length."""
    found = read_json("demo.json")["measurements"]
    plain = {row["times"]: row["seconds"] for row in found if row["system"] == "plain model"}
    rows = [
        [
            row["system"],
            f"{row['times']} × limit ({row['tokens']:,} tokens)",
            f"{row['accuracy']:.0%}",
            f"{row['seconds'] / plain[row['times']]:.2f}",
            f"{row['peak_bytes'] / 2**20:.0f} MiB",
        ]
        for row in found
    ]
    return markdown(["system", "text", "right", "time, plain model = 1", "peak memory"], rows)


def passkey() -> str:
    """Share of pass keys found by each method at each length, with 95 % Wilson intervals."""
    folders = {
        "HOMER, the paper's, suffix recomputed": ("passkey-recomputed", "homer"),
        "HOMER, the paper's": ("passkey-merged", "homer"),
        "plain model": ("passkey-baselines", "plain"),
        "position interpolation": ("passkey-baselines", "pi"),
        "NTK": ("passkey-baselines", "ntk"),
        "YaRN": ("passkey-baselines", "yarn"),
        "last tokens that fit": ("passkey-baselines", "window"),
        "independent chunks, no merging": ("passkey-baselines", "independent"),
    }
    cells: dict[str, dict[int, str]] = {}
    for title, (folder, method) in folders.items():
        for row in read_json(f"{folder}/metrics.json")["by_length"]:
            if row["method"] == method:
                cells.setdefault(title, {})[row["length"]] = answered(row)
    lengths = sorted(set().union(*cells.values()))
    header = ["method", *(f"{length // lengths[0]} ×" for length in lengths)]
    rows = [[title, *(row.get(n, "") for n in lengths)] for title, row in cells.items()]
    return markdown(header, rows)


def answered(row: dict[str, Any]) -> str:
    """The share of right answers with its interval."""
    low, high = 100 * row["low"], 100 * row["high"]
    return f"{100 * row['accuracy']:.0f} % ({low:.0f}–{high:.0f})"


def perplexity() -> str:
    """Perplexity of later segments of held-out modules, with 95 % bootstrap intervals."""
    titles = {
        "plain": "plain model",
        "window": "last tokens that fit",
        "homer": "HOMER, merged suffix",
    }
    measured = read_json("perplexity-text/metrics.json")["by_position"]
    positions = sorted({row["position"] for row in measured})
    rows = []
    for method, title in titles.items():
        own = {row["position"]: row for row in measured if row["method"] == method}
        rows.append([title, *(scored(own[n]) for n in positions)])
    limit = positions[0]
    return markdown(["method", *(f"{n / limit:.0f} ×" for n in positions)], rows)


def scored(row: dict[str, Any]) -> str:
    """A perplexity with its interval."""
    return f"{row['perplexity']:.1f} ({row['low']:.1f}–{row['high']:.1f})"


def references() -> str:
    """Perplexity of tokens by where the text last had them, and how many times the window's it is,
    with 95 % bootstrap intervals of the differences.
    """
    measured = read_json("perplexity-references/metrics.json")["by_reference"]
    found = {(row["method"], row["reference"]): row for row in measured}
    titles = {
        "near": "in the window or the segment",
        "far": "only before the window",
        "new": "nowhere",
    }
    rows = []
    for reference, title in titles.items():
        window, homer = found["window", reference], found["homer", reference]
        low, high = homer["times_window_low"], homer["times_window_high"]
        rows.append(
            [
                title,
                f"{homer['tokens']:,}",
                f"{window['perplexity']:.1f}",
                f"{homer['perplexity']:.1f}",
                f"{homer['times_window']:.3f} ({low:.3f}–{high:.3f})",
            ]
        )
    header = ["the text last had it", "tokens", "last tokens that fit", "HOMER, merged suffix"]
    return markdown([*header, "HOMER / last tokens"], rows)


# The real model's methods: title, and the group of runs and the name within it.
REAL = {
    "**HOMER, our defaults**": ("homer", "homer"),
    "HOMER, the text in four parts": ("appended", "appended"),
    "HOMER as the paper has it": ("paper", "homer"),
    "plain model": ("plain", "plain"),
    "position interpolation": ("pi", "pi"),
    "NTK": ("ntk", "ntk"),
    "YaRN": ("yarn", "yarn"),
    "last tokens that fit": ("window", "window"),
    "BM25 retrieval": ("retrieval", "retrieval"),
    "sequential compression (FINCH-like)": ("sequential", "sequential"),
    "independent chunks": ("independent", "independent"),
}
NOT_RUN = "Not run yet.\n"
# Of the checkpoint that bench/real.py reads with.
REAL_LIMIT = 8192


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


def real(task: str) -> str:
    """Right answers of each method on a task of the real model, with 95 % Wilson intervals and the
    number of questions.
    """
    found = real_lengths(task)
    lengths = sorted(set().union(*found.values()))
    rows = []
    for title, cells in found.items():
        rows.append([title, *(asked(cells[n]) if n in cells else "" for n in lengths)])
    return markdown(["method", *map(times_limit, lengths)], rows)


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
    return markdown(["method", "text", "of each", *tasks], rows)


def kept(row: dict[str, Any]) -> str:
    return "" if row.get("held") is None else f", {row['held']:.0%} kept"


def real_costs() -> str:
    """Mean seconds of a question and peak memory above the model, of each method on needles."""
    found = real_lengths("needles")
    lengths = sorted(set().union(*found.values()))
    rows = []
    for title, cells in found.items():
        rows.append([title, *(cost(cells[n]) if n in cells else "" for n in lengths)])
    return markdown(["method", *map(times_limit, lengths)], rows)


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
    return markdown(["asked", *tasks], rows)


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


def encode(folder: str = "") -> str:
    """`encode` beside the plain prefill of transformers on the CPU, from `bench/encode.py`."""
    lines = read_csv(f"{folder}encode-50M-float32.csv")
    plain = {x["tokens"]: x for x in lines if x["system"] == "transformers"}
    halves = read_csv(f"{folder}encode-50M-bfloat16.csv")
    half = {x["tokens"]: x for x in halves if x["system"] == "torch"}
    longest = [x for x in lines if x["system"] == "torch"][-1]
    rows = []
    for ours in (x for x in lines if x["system"] == "torch"):
        theirs = plain.get(ours["tokens"])
        outside = float(ours["share_outside"])
        halved = half.get(ours["tokens"])
        rows.append(
            [
                f"{int(ours['tokens']):,}",
                "" if theirs is None else ratio(theirs, ours),
                "" if halved is None else ratio(ours, halved),
                f"{per_token(ours) / per_token(longest):.2f}",
                memory(ours, "peak_bytes"),
                memory(ours, "predicted_bytes"),
                "" if theirs is None else memory(theirs, "peak_bytes"),
                "" if math.isnan(outside) else f"{outside:.0%}",
            ]
        )
    header = [
        "input tokens",
        "times faster than the plain prefill",
        "bfloat16 against float32",
        "time per token, the longest's = 1",
        "memory above the weights",
        "as planned",
        "the plain prefill's",
        "time outside matrix products and attention",
    ]
    return markdown(header, rows)


def speed() -> str:
    """The longest text that the plain prefill read too, and the authors' code, in a sentence."""
    lines = read_csv("encode-50M-float32.csv")
    theirs = [line for line in lines if line["system"] == "transformers"][-1]
    (ours,) = (x for x in lines if (x["system"], x["tokens"]) == ("torch", theirs["tokens"]))
    *_, published, own = read_csv("authors-50M-float32.csv")
    published, own = (published, own) if "author" in published["system"] else (own, published)
    return (
        f"Reading {int(ours['tokens']):,} tokens on two CPU cores (50M parameters, the method as "
        "published) takes\n"
        f"**{float(ours['seconds']) / float(theirs['seconds']):.0%} of the time** of the plain "
        f"prefill and {memory(ours, 'peak_bytes')} in place of {memory(theirs, 'peak_bytes')}; "
        "against the published\n"
        f"code of HOMER's authors it is {ratio(published, own)} as fast at "
        f"{int(own['tokens']):,} tokens.\n"
    )


def authors() -> str:
    """`encode` beside the published code of the method's authors, from `bench/authors.py`."""
    lines = read_csv("authors-50M-float32.csv")
    pairs = zip(lines[0::2], lines[1::2], strict=True)
    rows = [
        [
            f"{int(ours['tokens']):,}",
            ratio(theirs, ours),
            memory(ours, "peak_bytes"),
            memory(theirs, "peak_bytes"),
        ]
        for ours, theirs in pairs
    ]
    header = ["input tokens", "times faster than the authors' code", "memory above the weights"]
    return markdown([*header, "the authors' code's"], rows)


def ratio(theirs: dict[str, str], ours: dict[str, str]) -> str:
    return f"{float(theirs['seconds']) / float(ours['seconds']):.1f} ×"


def per_token(line: dict[str, str]) -> float:
    return float(line["microseconds_per_token"])


def memory(line: dict[str, str], column: str) -> str:
    return f"{int(line[column]) / 2**20:,.0f} MiB"


GPU_MODELS = ("Llama-2-7B", "Llama-3-8B", "50M")


def gpu_lengths(model: str) -> dict[int, dict[str, dict[str, str]]]:
    """A model's lines by length and system: of several leaf batches the fastest."""
    lengths: dict[int, dict[str, dict[str, str]]] = {}
    lines = read_csv(f"h200/encode-{model}-bfloat16.csv")
    for line in sorted(lines, key=lambda line: -float(line["seconds"])):
        lengths.setdefault(int(line["tokens"]), {})[line["system"]] = line
    return dict(sorted(lengths.items()))


def times_plain(systems: dict[str, dict[str, str]], system: str = "triton") -> float:
    """How many times as long the plain prefill takes."""
    return float(systems["transformers"]["seconds"]) / float(systems[system]["seconds"])


def gpu_speed() -> str:
    """The longest texts on a GPU, in a sentence, and a new token after them."""
    of_lengths = gpu_lengths("Llama-3-8B")
    both, alone = of_lengths[262144], of_lengths[1048576]["triton"]
    tokens = {
        line["system"]: float(line["median_ms"])
        for line in read_csv("h200/decode-Llama-3-8B-bfloat16.csv")
        if (line["rows"], line["sequences"]) == ("4096", "1")
    }
    return (
        f"On one {alone['device']}, a Llama of Llama-3-8B's shape (random weights, the method as\n"
        f"published) reads 262,144 tokens in {float(both['triton']['seconds']):.1f} seconds, "
        f"**{times_plain(both):.1f} × as fast as the plain\n"
        "prefill** with PyTorch's attention, and "
        f"**1,048,576 in {float(alone['seconds']):.0f} seconds** with "
        f"{memory(alone, 'peak_bytes')} above its\n"
        f"weights. A new token after 4,096 rows takes {tokens['shared']:.1f} ms, in transformers' "
        f"`generate` {tokens['transformers']:.0f} ms.\n"
    )


def gpu_encode() -> str:
    """`encode` on a GPU beside the plain prefill, by length."""
    rows = []
    for model in GPU_MODELS:
        for tokens, systems in gpu_lengths(model).items():
            plain = systems.get("transformers")
            for system, line in systems.items():
                if system == "transformers":
                    continue
                rows.append(
                    [
                        f"{model}{system.removeprefix('triton').replace('+', ', ')}",
                        f"{tokens:,}",
                        seconds_of(plain) if plain else "",
                        seconds_of(line),
                        f"{times_plain(systems, system):.1f} ×" if plain else "",
                        f"{float(line['share_of_rate']):.0%}",
                        memory(plain, "peak_bytes") if plain else "",
                        memory(line, "peak_bytes"),
                        memory(line, "predicted_bytes"),
                    ]
                )
    header = ["model", "input tokens", "plain prefill", "HOMER", "times as fast"]
    header += ["of the matrix rate", "memory, plain", "HOMER", "as planned"]
    return markdown(header, rows)


def seconds_of(line: dict[str, str]) -> str:
    """A line's time."""
    return f"{float(line['seconds']):.2f} s"


def gpu_layer() -> str:
    """What one layer launches and moves."""
    rows = []
    for model in ("Llama-2-7B", "Llama-3-8B"):
        lines = read_csv(f"h200/layer-{model}-bfloat16.csv")
        for kind in dict.fromkeys(line["kind"] for line in lines):
            own = [line for line in lines if line["kind"] == kind]
            whole = own.pop()
            each = ", ".join(f"`{line['op']}` {line['launches']}" for line in own)
            moved = f"{int(whole['bytes']) / 1e6:,.0f} MB"
            time = f"{float(whole['microseconds']):,.0f} µs"
            rows.append([model, kind, whole["launches"], moved, time, each])
    header = ["model", "layer", "launches", "bytes", "time", "launches of each op"]
    return markdown(header, rows)


def gpu_kernels() -> str:
    """Every kernel on a GPU beside PyTorch's ways."""
    lines = [x for x in read_csv("h200/kernels.csv") if x["op"] != "limit"]
    cases: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for line in lines:
        cases.setdefault((line["op"], line["case"]), {})[line["system"]] = line
    rows = []
    for (op, case), systems in cases.items():
        ours = systems.pop("triton")
        milliseconds = float(ours["median_ms"])
        if ours["limit"] == "matrix":
            rate = f"{int(ours['flops']) / milliseconds / 1e9:,.0f} TFLOP/s"
        else:
            rate = f"{int(ours['bytes']) / milliseconds / 1e9:.2f} TB/s"
        others = (
            f"{name} {float(line['median_ms']) / milliseconds:.1f} ×"
            for name, line in systems.items()
        )
        rows.append([f"`{op}`, {case}", f"{1e3 * milliseconds:,.0f} µs", rate, ", ".join(others)])
    return markdown(["kernel", "time", "rate", "time of others, ours = 1"], rows)


def decode() -> str:
    """A new token after a cache, ours beside transformers', by model and number of sequences."""
    rows = []
    for model, dtype, machine, folder in (
        ("50M", "float32", "AVX2", "avx2/"),
        ("50M", "bfloat16", "AVX2", "avx2/"),
        ("50M", "float32", "AVX-512", ""),
        ("50M", "bfloat16", "AVX-512", ""),
        ("Llama-3-8B", "bfloat16", "H200", "h200/"),
    ):
        found: dict[tuple[str, str], dict[str, float]] = {}
        for line in read_csv(f"{folder}decode-{model}-{dtype}.csv"):
            case = found.setdefault((line["rows"], line["sequences"]), {})
            case[line["system"]] = float(line["median_ms"])
        for (cached, sequences), own in found.items():
            theirs = own["transformers"]
            cells = [f"{theirs / own[x]:.2f} ×" if x in own else "" for x in ("shared", "copies")]
            time = f"{own['shared']:.1f} ms"
            rows.append([f"{model}, {dtype}, {machine}", cached, sequences, time, *cells])
    header = ["model", "rows in the cache", "sequences", "a token of each"]
    return markdown([*header, "times faster, rows shared", "a copy each"], rows)


def ranks() -> str:
    """A text over several processes: time and memory by their number."""
    rows = []
    by_count: dict[int, list[dict[str, str]]] = {}
    for line in read_csv("ranks.csv"):
        by_count.setdefault(int(line["ranks"]), []).append(line)
    for count, own in by_count.items():
        most = max(own, key=lambda line: int(line["peak_bytes"]))
        rows.append(
            [
                str(count),
                f"{float(own[0]['speedup']):.2f} ×",
                f"{float(own[0]['cores_bring']):.2f} ×",
                f"{sum(int(line['sent_bytes']) for line in own) / 2**20:.0f} MiB",
                f"{int(most['peak_bytes']) / 2**20:.0f} MiB",
                f"{int(most['planned_bytes']) / 2**20:.0f} MiB",
            ]
        )
    header = ["processes", "times faster", "a text each", "sent", "memory of one", "as planned"]
    return markdown(header, rows)


def ranks_simulated() -> str:
    """The share of a linear speed-up that a simulation leaves, by length and number of GPUs."""
    lines = read_csv("ranks-simulated.csv")
    gpus = sorted({int(line["gpus"]) for line in lines} - {1})
    found = {(int(line["tokens"]), int(line["gpus"])): line for line in lines}
    rows = [
        [
            f"{tokens:,}",
            f"{int(found[tokens, 1]['leaves']):,}",
            f"{float(found[tokens, 1]['seconds']):.1f} s",
            *(f"{float(found[tokens, n]['of_linear']):.0%}" for n in gpus),
        ]
        for tokens in sorted({tokens for tokens, _ in found})
    ]
    return markdown(["tokens", "leaves", "one GPU", *(f"{n} GPUs" for n in gpus)], rows)


def quantized() -> str:
    """What int8 weights take and cost, in a few lines."""
    found = read_json("quantized.json")
    memory, reading = found["memory"], found["reading"]
    share = memory["int8"]["bytes"] / memory["float32"]["bytes"]
    half, small = reading["bfloat16"], reading["int8"]
    worse = small["perplexity"] / half["perplexity"] - 1
    names = "seconds_per_1000_tokens", "seconds_per_new_token"
    slower = [small[name] / half[name] for name in names]
    parts = [
        '`quantize="int8"` (`--quantize int8`, the extra `quantized`) holds the layers\' matrices',
        f"in a byte a number, by torchao: {found['shape']}'s shape takes {share:.0%} of the",
        f"memory of float32, and SmolLM2-135M predicts a novel {worse:.1%} worse than in",
        f"bfloat16. On a CPU, reading takes {slower[0]:.1f} × and a new token {slower[1]:.1f} ×",
        "the time of bfloat16. A `transformers` model that torchao has quantised, or bitsandbytes",
        "in 4 bits, is shared as it is. `fp8`, for GPUs that multiply it, has not been run yet,",
        "nor 4 bits on one.",
    ]
    return "\n".join(parts) + "\n"


def read_json(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def read_csv(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


TABLES: dict[str, Callable[[], str]] = {
    "headline": headline,
    "demo": demo,
    "passkey": passkey,
    "perplexity": perplexity,
    "references": references,
    "encode": encode,
    "encode_avx512": lambda: encode("avx512/"),
    "authors": authors,
    "speed": speed,
    "quantized": quantized,
    "decode": decode,
    "ranks": ranks,
    "ranks_simulated": ranks_simulated,
    "gpu_speed": gpu_speed,
    "gpu_encode": gpu_encode,
    "gpu_kernels": gpu_kernels,
    "gpu_layer": gpu_layer,
    "real_needles": lambda: real("needles"),
    "real_passkey": lambda: real("passkey"),
    "real_ruler": lambda: real("ruler"),
    "real_tasks": real_tasks,
    "real_costs": real_costs,
    "real_perplexity": real_perplexity,
    "real_ablation": real_ablation,
    "real_heads": real_heads,
}


def fill(text: str) -> str:
    """A page's text with every table made anew."""
    return PLACE.sub(lambda place: place[1] + TABLES[place[2]]() + place[3], text)


def real_model() -> str:
    """What `homer demo` says of the real model: questions right and asked, by length."""
    cells = real_lengths("needles")["**HOMER, our defaults**"]
    needles = {str(n): [round(row["right"]), row["total"]] for n, row in sorted(cells.items())}
    found = {"model": "SmolLM2-135M-Instruct", "limit": REAL_LIMIT, "needles": needles}
    return json.dumps(found, indent=2) + "\n"


def main() -> int:
    REAL_MODEL.write_text(real_model(), encoding="utf-8")
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
