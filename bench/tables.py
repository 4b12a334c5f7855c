"""Write the tables of the READMEs from the committed results: `python bench/tables.py`.

A table is what is between `<!-- table: NAME -->` and `<!-- end -->`; nothing else in the files
changes. A test checks that the READMEs have the tables that the results give.
"""

import re
import sys
from collections.abc import Callable

from table_parts import (
    NOT_RUN,
    RESULTS,
    ROOT,
    answered,
    markdown,
    read_csv,
    read_json,
    scored,
)
from tables_real import (
    real,
    real_ablation,
    real_costs,
    real_heads,
    real_model,
    real_perplexity,
    real_tasks,
)
from tables_speed import (
    authors,
    decode,
    encode,
    gpu_encode,
    gpu_kernels,
    gpu_layer,
    quantized,
    ranks,
    ranks_simulated,
    speed,
)

PAGES = tuple(ROOT / folder / "README.md" for folder in (".", "bench", "model"))
REAL_MODEL = ROOT / "homer_triton" / "demo" / "real_model.json"
PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


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


def book() -> str:
    """What `homer demo --text` found: one reading, and five questions to each text."""
    rows = []
    for file in sorted((RESULTS / "real" / "book").glob("*.json")):
        found = read_json(f"real/book/{file.name}")
        asked, encode_s = found["asked"], found["encode_seconds"]
        first = sum(one["seconds_to_first"] for one in asked) / len(asked)
        rows.append(
            [
                file.stem.partition("-")[0],
                f"{found['tokens']:,}",
                *(f"{sum(one[name] for one in asked)} of {len(asked)}" for name in _FOUND),
                f"{found['read_seconds'] / encode_s:.2f}",
                f"1/{encode_s / first:.0f}",
                f"{found['bytes_per_token']:.0f}",
            ]
        )
    rows.sort(key=lambda row: (row[0], int(row[1].replace(",", ""))))
    header = ["model", "tokens", "right", "in what was read", "first source right"]
    return markdown([*header, "reading", "question", "bytes a token"], rows)


_FOUND = ("right", "held", "found")


def reading() -> str:
    """What each way of reading is worth: `bench/reading.py`."""
    lines = read_csv("reading.csv") if (RESULTS / "reading.csv").is_file() else []
    if not lines:
        return NOT_RUN
    kinds = list(dict.fromkeys(line["kind"] for line in lines))
    rows = []
    for way in dict.fromkeys(line["way"] for line in lines):
        own = [line for line in lines if line["way"] == way]
        cells = []
        for kind in kinds:
            of_kind = [line for line in own if line["kind"] == kind]
            questions = sum(int(line["questions"]) for line in of_kind)
            mean = sum(float(x["needed_mean"]) * int(x["questions"]) for x in of_kind) / questions
            first = sum(int(line["first"]) for line in of_kind)
            most = max(int(line["needed_most"]) for line in of_kind)
            cells.append(f"{first} of {questions}; {mean:,.0f}, at most {most:,}")
        rows.append([way, *cells, own[0]["bytes"], str(int(own[0]["last_layer"]) + 1)])
    return markdown(["way", *kinds, "bytes of a token's keys", "layers read"], rows)


def passkey() -> str:
    """Share of pass keys found by each method at each length, with 95 % Wilson intervals."""
    folders = {
        "HOMER as published, suffix recomputed": ("passkey-recomputed", "homer"),
        "HOMER as published": ("passkey-merged", "homer"),
        "plain model": ("passkey-baselines", "plain"),
        "position interpolation": ("passkey-baselines", "pi"),
        "NTK": ("passkey-baselines", "ntk"),
        "YaRN": ("passkey-baselines", "yarn"),
        "last tokens that fit": ("passkey-baselines", "window"),
        "independent chunks": ("passkey-baselines", "independent"),
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


TABLES: dict[str, Callable[[], str]] = {
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
    "book": book,
    "reading": reading,
    "real_heads": real_heads,
}


def fill(text: str) -> str:
    """A page's text with every table made anew."""
    return PLACE.sub(lambda place: place[1] + TABLES[place[2]]() + place[3], text)


def main() -> int:
    REAL_MODEL.write_text(real_model(), encoding="utf-8")
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
