"""Output for people and programs: notes, tables, readable sizes, and one JSON object."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .. import EncodedContext, Generation


def print_json(result: dict[str, Any]) -> None:
    """Print the result of a command with `--json`: the only thing that it writes to stdout."""
    text = json.dumps(result, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # escape what the terminal's encoding lacks
        text = json.dumps(result)
    print(text)


def note(sentence: str) -> None:
    """Print a note to stderr; stdout is for the result."""
    print(sentence, file=sys.stderr)


def note_read(tokens: int, seconds: float) -> None:
    """Print to stderr how long a document's reading took."""
    note(f"read {tokens:,} tokens ({seconds:.1f} s, {tokens / seconds:,.0f} tokens/s)")


def quoted(name: str | None, start: int, text: str) -> str:
    """A place of a document on one line: its text's name, its first character, and its words."""
    return f"[{name or 'text'}, {start:,}] {' '.join(text.split())}"


def reported(answer: Generation) -> dict[str, Any]:
    """What the JSON of a command has of an answer."""
    names = ("text", "token_ids", "finish_reason", "seconds_to_first", "seconds")
    return {name: getattr(answer, name) for name in names}


def note_kept(encoded: EncodedContext) -> None:
    """Print to stderr how much an encoding kept."""
    stats, leaves = encoded.stats, len(encoded.plan.levels[0].nodes)
    note(
        f"kept {stats.kept_tokens:,} of {stats.tokens:,} tokens ({leaves:,} "
        f"{'chunk' if leaves == 1 else 'chunks'}, {stats.seconds:.1f} s, "
        f"{stats.tokens_per_second:,.0f} tokens/s)"
    )


def summary(encoded: EncodedContext) -> dict[str, Any]:
    """An encoding's plan and figures as plain values, for JSON."""
    return {
        "next_position": encoded.next_position,
        "model": encoded.model,
        "plan": encoded.plan.to_dict(),
        "stats": encoded.stats.to_dict(),
    }


def at_terminal() -> bool:
    """Whether stderr is a terminal, where progress bars are shown."""
    return sys.stderr.isatty()


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text: the first column aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        aligned = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return "  ".join(aligned).rstrip()

    rule = "  ".join("─" * width for width in widths)
    return "\n".join([line(headings), rule, *map(line, rows)])


def readable_bytes(count: int) -> str:
    """For example 1536 -> "1.5 KiB"."""
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def readable_flops(count: int) -> str:
    """For example 2_000_000_000 -> "2.0 GFLOP"."""
    return _scaled(count, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def _scaled(count: int, step: int, units: Sequence[str]) -> str:
    value, unit = float(count), units[0]
    for larger in units[1:]:
        if value < step:
            break
        value, unit = value / step, larger
    return f"{value:.0f} {unit}" if unit == units[0] else f"{value:.1f} {unit}"
