"""`homer demo`: the shipped model finds pass keys far beyond its context limit."""

from __future__ import annotations

import json
from multiprocessing import forkserver, get_context
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .help import QUESTIONS
from .options import Json
from .output import at_terminal, note, print_json, readable_bytes, table

if TYPE_CHECKING:
    from ..evaluation.demo import Measurement

_EXAMPLE_TIMES = 8


def demo(
    samples: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="How many questions to ask each system at each length. The time grows with it.",
        ),
    ] = 4,
    seed: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, rich_help_panel=QUESTIONS, help="The seed of keys and texts."
        ),
    ] = 0,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="PATH_OR_ID",
            help="Another checkpoint: a folder or a Hugging Face hub id.",
            show_default="the small model that ships with homer_triton",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """See HOMER find a key hidden far beyond a model's limit.

    Texts of 1, 4, 8 and 16 times the model's context limit each hide a pass key of five digits.
    Three systems are asked for it: the plain model, HOMER with its default method, and HOMER as
    published in the paper. The table shows right answers, time per question and peak memory.

    The demo runs on the CPU, in about a minute on two cores. It downloads nothing: the model, which
    reads only 256 tokens at once, ships with the package.

    \b
    Examples:
      homer demo
      homer demo --samples 20
    """
    if at_terminal():
        note(
            f"Questions for each system at each length: {samples}. Four take about a minute on two "
            "CPU cores."
        )
    _start_server()
    from tqdm import tqdm

    from ..demo import CHECKPOINT
    from ..evaluation.demo import SYSTEMS, TIMES, measure
    from ..evaluation.environment import describe_environment

    checkpoint = model or str(CHECKPOINT)
    measured: list[Measurement] = []
    with tqdm(
        total=len(TIMES) * len(SYSTEMS), desc="demo", unit="measurement", disable=not at_terminal()
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


def _start_server() -> None:
    """Start the server that measuring processes are forked from. It imports the library while this
    process does, which saves seconds.
    """
    get_context("forkserver").set_forkserver_preload(["homer_triton.evaluation.demo"])
    forkserver.ensure_running()


def in_words(rows: list[Measurement], checkpoint: str) -> str:
    """The demo's text: an example, the table of all measurements, and what to try next."""
    example = _example([row for row in rows if row.times == _EXAMPLE_TIMES])
    return "\n\n".join([example, _table(rows), _real_model(), _next_steps(checkpoint)])


def _example(rows: list[Measurement]) -> str:
    """The first question at one length: what was hidden, asked and answered."""
    first = rows[0].answers[0]
    lines = [
        f"The pass key {first.key} is hidden in a text of {rows[0].tokens:,} tokens, "
        f"{rows[0].times} times the model's context limit.",
        f'Asked "{first.question}", each system continues:',
    ]
    lines += [
        f"  {row.system + ':':<26}{row.answers[0].text.strip() or '(nothing)'}  "
        f"({'right' if row.answers[0].right else 'wrong'})"
        for row in rows
    ]
    return "\n".join(lines)


def _table(rows: list[Measurement]) -> str:
    """Right answers, time and memory, one line for each system at each length."""
    cells = [
        [
            row.system,
            f"{row.times}×",
            f"{row.tokens:,}",
            f"{sum(answer.right for answer in row.answers)} of {len(row.answers)}",
            f"{row.seconds:.2f} s",
            readable_bytes(row.peak_bytes),
        ]
        for row in rows
    ]
    headings = ["system", "limit", "tokens", "right", "per question", "peak memory"]
    return (
        table(headings, cells)
        + "\n\nplain model: reads the whole text at once. HOMER: the default method, with one "
        "warm-up\nlayer. HOMER, the paper's: the published method, with one warm-up layer. Peak "
        "memory is\nwhat the questions take above the loaded model, on one thread."
    )


def _plain(row: Measurement) -> dict[str, Any]:
    """A measurement as plain values, for JSON."""
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
    """What HOMER's defaults reach on a real pretrained model, from the committed results."""
    from ..demo import REAL_MODEL

    found = json.loads(REAL_MODEL.read_text(encoding="utf-8"))
    reached = [
        f"  {right} of {asked} at {int(length):,} tokens"
        for length, (right, asked) in found["needles"].items()
    ]
    return "\n".join(
        [
            "A model this small only shows that the method works. A real model with HOMER,",
            f"{found['model']} (context limit {found['limit']:,} tokens), found these",
            "needles in novels:",
            *reached,
        ]
    )


def _next_steps(checkpoint: str) -> str:
    """Commands to try next."""
    return "\n".join(
        [
            "Try next:",
            "  homer generate --model HuggingFaceTB/SmolLM2-1.7B-Instruct \\",
            '      --context-file book.txt --prompt "Who tells the story?"',
            "  homer generate --help",
            f"  homer plan --model {checkpoint} --context-len 131072",
        ]
    )
