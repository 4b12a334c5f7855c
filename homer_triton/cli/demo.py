"""`homer demo`: the shipped model finds pass keys far beyond its context limit, and a model and a
text of one's own answer several questions after one reading.
"""

from __future__ import annotations

import json
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .eval_options import parse_length
from .groups import given_options, with_groups
from .help import QUESTIONS
from .inputs import open_model, read_text
from .options import Json, Loading, NoChatTemplate
from .output import at_terminal, note, print_json, readable_bytes, table

if TYPE_CHECKING:
    from ..evaluation.book import BookResult
    from ..evaluation.demo import Measurement

_EXAMPLE_TIMES = 8


@with_groups
def demo(
    *,
    samples: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="How many questions to ask each system at each length, or the text. The time "
            "grows with it.",
        ),
    ] = 4,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="PATH_OR_ID",
            help="Another checkpoint: a folder or a Hugging Face hub id.",
            show_default="the small model that ships with homer_triton",
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Ask your own model about a text of yours, a UTF-8 file, in place of pass keys.",
            show_default="pass keys in texts of many lengths",
        ),
    ] = None,
    length: Annotated[
        str,
        typer.Option(
            "--length",
            metavar="N|Nx",
            rich_help_panel=QUESTIONS,
            help="How much of --text to use: a number of tokens, or a multiple of the model's "
            "context limit such as 2x.",
        ),
    ] = "2x",
    seed: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, rich_help_panel=QUESTIONS, help="The seed of keys and texts."
        ),
    ] = 0,
    no_chat_template: NoChatTemplate = False,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """See HOMER find what is hidden far beyond a model's limit.

    Texts of 1, 4, 8 and 16 times the model's context limit each hide a pass key of five digits.
    Four systems are asked for it: the plain model, HOMER with its default method, HOMER as
    published in the paper, and HOMER that reads a text once for any question. The table shows right
    answers, time per question and peak memory.

    The demo runs on the CPU, in one to two minutes on two cores. It downloads nothing: the model,
    which reads only 256 tokens at once, ships with the package.

    With --model and --text, sentences are hidden in your text. It is read once, and then asked for
    each of them in random order. Every answer is shown with its time and the place it came from.

    \b
    Examples:
      homer demo
      homer demo --samples 20
      homer demo --model HuggingFaceTB/SmolLM2-1.7B-Instruct --text book.txt
    """
    if text is not None:
        _on_a_text(model, text, length, samples, seed, not no_chat_template, loading, as_json)
        return
    if given_options(loading):
        raise ValueError(
            f"{given_options(loading)[0]} needs --text; the pass keys run on the CPU in float32."
        )
    if at_terminal():
        note(
            f"Questions for each system at each length: {samples}. Four take one to two minutes "
            "on two CPU cores."
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


def _on_a_text(
    model: str | None,
    file: str,
    length: str,
    questions: int,
    seed: int,
    chat_template: bool,
    loading: Loading,
    as_json: bool,
) -> None:
    """Read a text once and ask for what was hidden in it."""
    if model is None:
        raise ValueError("--text needs --model: the model that ships here only knows pass keys.")
    text = read_text(file)
    from tqdm import tqdm

    from ..evaluation.book import ask_book
    from ..evaluation.environment import describe_environment

    llama, _ = open_model(model, loading.device, loading.dtype, loading.ops, None, loading.quantize)
    tokens = parse_length(length, llama.config.context_limit)
    with tqdm(total=questions + 2, desc="demo", disable=not at_terminal()) as bar:
        result = ask_book(llama, text, tokens, questions, seed, chat_template, bar.update)
    if as_json:
        about = {"model": model, "dtype": str(llama.dtype).removeprefix("torch."), "seed": seed}
        about |= {"text": Path(file).name, "chat_template": chat_template}
        device = llama.device.type
        print_json({**about, "environment": describe_environment(device), **result.to_dict()})
    else:
        print(book_in_words(result, file))


def book_in_words(result: BookResult, name: str) -> str:
    """What one reading took, and every question with its answer and its place."""
    asked = result.asked
    size = readable_bytes(round(result.tokens * result.bytes_per_token))
    lines = [
        f"{name}: {result.tokens:,} tokens, {len(asked)} sentences hidden in them.",
        f"Read once in {result.read_seconds:.1f} s; {size} kept. "
        f"`homer generate` takes {result.encode_seconds:.1f} s for every question.",
    ]
    for one in asked:
        place = " ".join(one.place.split())
        lines += [
            "",
            f"> {one.question}",
            f"  {' '.join(one.text.split())}",
            f"  ({'right' if one.right else 'wrong'}, {one.seconds:.1f} s, hidden at "
            f"{one.depth:.0%} of the text)",
            f"  from: {place[:100]}",
        ]
    right, held = sum(one.right for one in asked), sum(one.held for one in asked)
    counts = f"{right} of {len(asked)} answers are right; {held} were in what was read for them."
    return "\n".join([*lines, "", counts])


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
        "warm-up\nlayer. HOMER, the paper's: the published method, with one warm-up layer. "
        "HOMER, read once:\nreads the text for any question, then answers this one. Peak memory "
        "is what the questions\ntake above the loaded model, on one thread."
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
