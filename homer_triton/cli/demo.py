"""`homer demo`: the shipped model retrieves passkeys far past its context limit."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Json
from .output import at_terminal, print_json, readable_bytes, table

if TYPE_CHECKING:
    from ..evaluation.demo import Measurement

_EXAMPLE_TIMES = 8


def demo(
    samples: Annotated[
        int, typer.Option(metavar="N", min=1, help="Questions per system and length.")
    ] = 20,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Draws keys and texts.")] = 0,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="PATH_OR_ID",
            help="Another checkpoint to ask.",
            show_default="the small one that ships with homer_triton",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Hide a five-digit key in texts up to 16 times the model's context limit, and ask for it.

    The plain model beside HOMER with both ways to treat the suffix: share of right answers, time
    per question and peak memory. Runs on the CPU in under two minutes and needs nothing but this
    package.

    \b
    Example:
      homer demo --samples 5
    """
    from tqdm import tqdm

    from ..demo import CHECKPOINT
    from ..evaluation.demo import SYSTEMS, TIMES, measure
    from ..evaluation.environment import describe_environment

    checkpoint = model or str(CHECKPOINT)
    measured: list[Measurement] = []
    with tqdm(
        total=len(TIMES) * len(SYSTEMS), desc="demo", unit="row", disable=not at_terminal()
    ) as bar:
        for row in measure(checkpoint, samples, seed):
            measured.append(row)
            bar.update()
    if as_json:
        print_json(
            {
                "model": checkpoint,
                "samples": samples,
                "seed": seed,
                "environment": describe_environment("cpu"),
                "measurements": [_plain(row) for row in measured],
            }
        )
    else:
        print(in_words(measured, checkpoint))


def in_words(rows: list[Measurement], checkpoint: str) -> str:
    """An example, the table of all measurements, and what to try next."""
    example = _example([row for row in rows if row.times == _EXAMPLE_TIMES])
    return "\n\n".join([example, _table(rows), _real_model(), _next_steps(checkpoint)])


def _example(rows: list[Measurement]) -> str:
    """The first question at one length in words: what was hidden, asked and answered."""
    first = rows[0].answers[0]
    lines = [
        f"The pass key {first.key} is hidden in a text of {rows[0].tokens:,} tokens, "
        f"{rows[0].times} times the model's context limit.",
        f'Asked "{first.question}", they go on:',
    ]
    lines += [
        f"  {row.system + ':':<26}{row.answers[0].text.strip() or '(nothing)'}  "
        f"({'right' if row.answers[0].right else 'wrong'})"
        for row in rows
    ]
    return "\n".join(lines)


def _table(rows: list[Measurement]) -> str:
    """Accuracy, time and memory, a line for each system at each length."""
    cells = [
        [
            row.system,
            f"{row.times}×",
            f"{row.tokens:,}",
            f"{row.accuracy:.0%}",
            f"{row.seconds:.2f} s",
            readable_bytes(row.peak_bytes),
        ]
        for row in rows
    ]
    return table(["system", "limit", "tokens", "right", "per question", "peak memory"], cells)


def _plain(row: Measurement) -> dict[str, Any]:
    """A measurement as plain values."""
    return {
        "system": row.system,
        "times": row.times,
        "tokens": row.tokens,
        "accuracy": row.accuracy,
        "seconds": row.seconds,
        "peak_bytes": row.peak_bytes,
        "answers": [
            {"key": answer.key, "text": answer.text, "right": answer.right}
            for answer in row.answers
        ],
    }


def _real_model() -> str:
    """How HOMER's defaults do on a real pretrained model, from the committed results."""
    from ..demo import REAL_MODEL

    found = json.loads(REAL_MODEL.read_text(encoding="utf-8"))
    reached = [
        f"{right} of {asked} at {int(length):,} tokens"
        for length, (right, asked) in found["needles"].items()
    ]
    return (
        f"A model this small proves the method alone. {found['model']}, a real one that reads "
        f"{found['limit']:,} tokens,\nfound needles in novels: {', '.join(reached)} (README)."
    )


def _next_steps(checkpoint: str) -> str:
    """Commands that a newcomer may try next."""
    return "\n".join(
        [
            "Memory is what a process took above the loaded model, on one thread. Next, try:",
            f"  homer plan --model {checkpoint} --context-len 131072",
            "  homer generate --model meta-llama/Llama-3.2-1B-Instruct --context-file book.txt \\",
            '      --prompt "Who tells the story?"',
            "  homer generate --help",
        ]
    )
