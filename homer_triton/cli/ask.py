"""`homer ask`: answers from a text that `homer read` has read."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .answers import Answers
from .groups import with_groups
from .help import COST
from .inputs import open_model
from .options import DocumentSettings, Json, Loading, RopeScaling
from .output import note, print_json, quoted, reported

# How many places are shown with an answer, and how many characters of each.
_SHOWN, _WIDTH = 3, 100


@with_groups(but=("max_chunk_len",))
def ask(
    *,
    document: Annotated[
        Path, typer.Argument(metavar="FILE", help="A document that `homer read` wrote.")
    ],
    prompt: Annotated[
        list[str],
        typer.Option(
            "--prompt",
            metavar="TEXT",
            help="A question about the text. Repeat the option to ask several.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="PATH_OR_ID",
            help="The checkpoint that read the text, if it is no longer where it was.",
            show_default="the one that `homer read` was given",
        ),
    ] = None,
    loading: Loading,
    rope_scaling: RopeScaling = None,
    reading: DocumentSettings,
    keep: Annotated[
        Literal["found", "all"],
        typer.Option(
            "--keep",
            metavar="found|all",
            rich_help_panel=COST,
            help="What is read again for a question. found: the places that it finds. all: the "
            "whole text, which must fit the context limit, as the plain model reads it; the first "
            "question takes as long as that, the others do not.",
        ),
    ] = "found",
    wanted: Answers,
    as_json: Json = False,
) -> None:
    """Ask a text that `homer read` has read.

    Every question finds its own places in the text, whatever was asked before. The answers stream
    to stdout. The places that an answer was made from follow on stderr, best first.

    \b
    Example:
      homer ask book.homer --prompt "Who tells the story?" --prompt "Where does she live?"
    """
    from .. import Document
    from ..document import checkpoint_of

    decoding = asdict(wanted.decoding)
    config = reading.config
    name = checkpoint_of(document) if model is None else model
    options = loading.device, loading.dtype, loading.ops, rope_scaling, loading.quantize
    llama, _ = open_model(name, *options)
    opened = Document.load(document, llama)
    texts = {text.name: text.content for text in opened.texts}
    answers: list[dict[str, Any]] = []
    for question in prompt:
        if len(prompt) > 1 and not as_json:
            print(f"> {question}")
        on_text = None if as_json else partial(print, end="", flush=True)
        answer = opened.ask(question, config=config, keep=keep, on_text=on_text, **decoding)
        places = [
            {**asdict(source), "text": texts[source.name][source.start : source.end]}
            for source in answer.sources
        ]
        answers.append({"prompt": question, **reported(answer), "sources": places})
        if not as_json:
            print()
            for place in places[:_SHOWN]:
                words = " ".join(place["text"].split())
                short = words if len(words) <= _WIDTH else words[: _WIDTH - 1] + "…"
                note(f"  {quoted(place['name'], place['start'], short)}")
    if as_json:
        print_json({"answers": answers})
