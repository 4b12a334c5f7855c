"""What tables are made with: where the results lie, how they are read, how a cell is written."""

import csv
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
Rows = list[list[str]]
NOT_RUN = "Not run yet.\n"


def markdown(header: list[str], rows: Rows) -> str:
    """A table, the first column to the left and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def read_json(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def read_csv(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def answered(row: dict[str, Any]) -> str:
    """The share of right answers with its interval."""
    low, high = 100 * row["low"], 100 * row["high"]
    return f"{100 * row['accuracy']:.0f} % ({low:.0f}–{high:.0f})"


def scored(row: dict[str, Any]) -> str:
    """A perplexity with its interval."""
    return f"{row['perplexity']:.1f} ({row['low']:.1f}–{row['high']:.1f})"


def memory(line: dict[str, str], column: str) -> str:
    return f"{int(line[column]) / 2**20:,.0f} MiB"
