"""The tables of time and memory: on CPUs, on a GPU, over several processes."""

import math

from table_parts import markdown, memory, read_csv, read_json

# Systems of bench/encode.py: the plain prefill, and ours on a CPU.
PLAIN, OURS = "transformers", "torch"


def encode(folder: str = "") -> str:
    """`encode`, with our defaults and as published, beside the plain prefill of transformers on the
    CPU, from `bench/encode.py`.
    """
    halves = by_length(f"{folder}encode-50M-bfloat16.csv")
    rows = []
    for tokens, systems in by_length(f"{folder}encode-50M-float32.csv").items():
        plain, paper = systems.get(PLAIN), systems.get(f"{OURS}+paper")
        ours = systems.get(OURS)
        measured = OURS if ours else f"{OURS}+paper"
        half = halves.get(tokens, {}).get(measured)
        outside = float(systems[measured]["share_outside"])
        rows.append(
            [
                f"{tokens:,}",
                *(ratio(plain, line) if plain and line else "" for line in (ours, paper)),
                ratio(systems[measured], half) if half else "",
                *(memory(line, "peak_bytes") if line else "" for line in (ours, paper)),
                memory(systems[measured], "predicted_bytes"),
                memory(plain, "peak_bytes") if plain else "",
                "" if math.isnan(outside) else f"{outside:.0%}",
            ]
        )
    header = [
        "input tokens",
        "times faster than the plain prefill",
        "as published",
        "bfloat16 against float32",
        "memory above the weights",
        "as published",
        "as planned",
        "the plain prefill's",
        "time outside matrix products and attention",
    ]
    return markdown(header, rows)


def by_length(name: str) -> dict[int, dict[str, dict[str, str]]]:
    """The lines of a file of `bench/encode.py` by length and system: of several leaf batches the
    fastest.
    """
    lengths: dict[int, dict[str, dict[str, str]]] = {}
    for line in sorted(read_csv(name), key=lambda line: -float(line["seconds"])):
        lengths.setdefault(int(line["tokens"]), {})[line["system"]] = line
    return dict(sorted(lengths.items()))


def speed() -> str:
    """Some lengths of the plain prefill and ours: the defaults on a CPU, the paper's on a GPU."""
    small = by_length("encode-50M-float32.csv")
    large = gpu_lengths("Llama-3-8B")
    device = large[262144]["triton+paper"]["device"]
    cases = [
        *(("50M, two CPU cores", "default", small, OURS, n) for n in (2048, 8192, 32768)),
        *((f"8B, one {device}", "paper's", large, "triton+paper", n) for n in (262144, 1048576)),
    ]
    rows = []
    for model, method, lengths, system, tokens in cases:
        ours, plain = lengths[tokens][system], lengths[tokens].get(PLAIN)
        rows.append(
            [
                model,
                method,
                f"{tokens:,}",
                seconds_of(plain) if plain else "",
                seconds_of(ours),
                f"**{ratio(plain, ours)}**" if plain else "",
                memory(plain, "peak_bytes") if plain else "",
                memory(ours, "peak_bytes"),
            ]
        )
    header = ["model and machine", "method", "tokens", "plain prefill", "HOMER", "speed-up"]
    return markdown([*header, "memory, plain", "HOMER"], rows)


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


def decode() -> str:
    """A new token after a cache, ours beside transformers', by model and number of sequences."""
    rows = []
    for model, dtype, machine, folder in (
        ("50M", "float32", "AMD, AVX2", "avx2/"),
        ("50M", "bfloat16", "AMD, AVX2", "avx2/"),
        ("SmolLM2-135M", "float32", "AMD, AVX2", "avx2/"),
        ("SmolLM2-135M", "bfloat16", "AMD, AVX2", "avx2/"),
        ("50M", "float32", "AMD, AVX-512", "avx512/"),
        ("50M", "bfloat16", "AMD, AVX-512", "avx512/"),
        ("50M", "float32", "Intel, AVX-512", "intel/"),
        ("50M", "bfloat16", "Intel, AVX-512", "intel/"),
        ("Llama-3-8B", "bfloat16", "H200", "h200/"),
    ):
        found: dict[tuple[str, str], dict[str, float]] = {}
        for line in read_csv(f"{folder}decode-{model}-{dtype}.csv"):
            case = found.setdefault((line["rows"], line["sequences"]), {})
            case[line["system"]] = float(line["median_ms"])
        for (cached, sequences), own in found.items():
            theirs = own[PLAIN]
            cells = [f"{theirs / own[x]:.2f} ×" if x in own else "" for x in ("shared", "copies")]
            time = f"{own['shared']:.1f} ms"
            rows.append([f"{model}, {dtype}, {machine}", cached, sequences, time, *cells])
    header = ["model", "tokens in the cache", "sequences", "a new token of each"]
    return markdown([*header, "times as fast, cache shared", "a copy each"], rows)


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
        '`quantize="int8"` (`--quantize int8`, the extra `quantized`) stores the layers\' matrices',
        f"with torchao, one byte per number. {found['shape']}'s shape takes {share:.0%} of its",
        "memory in float32. Compared with bfloat16, SmolLM2-135M's perplexity on a novel is",
        f"{worse:.1%} higher, and on a CPU reading is {slower[0]:.1f} × and a new token "
        f"{slower[1]:.1f} × as slow",
        "([results](../bench/results/quantized.json)).",
    ]
    return "\n".join(parts) + "\n"


GPU_MODELS = ("Llama-2-7B", "Llama-3-8B", "50M")


def gpu_lengths(model: str) -> dict[int, dict[str, dict[str, str]]]:
    """A model's lines by length and system."""
    return by_length(f"h200/encode-{model}-bfloat16.csv")


def times_plain(systems: dict[str, dict[str, str]], system: str) -> float:
    """How many times as long the plain prefill takes."""
    return float(systems[PLAIN]["seconds"]) / float(systems[system]["seconds"])


def gpu_encode() -> str:
    """`encode` on a GPU beside the plain prefill, by length."""
    rows = []
    for model in GPU_MODELS:
        for tokens, systems in gpu_lengths(model).items():
            plain = systems.get(PLAIN)
            for system, line in systems.items():
                if system == PLAIN:
                    continue
                way = system.removeprefix("triton").replace("+paper", "+as published")
                rows.append(
                    [
                        model + way.replace("+", ", "),
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
