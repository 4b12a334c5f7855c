"""`homer show`: an HTML page of the tokens that were kept of an encoded text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .inputs import tokenizer_of
from .options import Json, RopeScaling
from .output import print_json, readable_bytes


def show(
    encoded: Annotated[
        Path, typer.Argument(metavar="ENCODED", help="A file that `homer encode` saved.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The file for the HTML page.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="PATH_OR_ID",
            help="The checkpoint that made the encoding. Its tokenizer turns tokens into text.",
            show_default="the small model that ships with homer_triton",
        ),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(
            "--png",
            metavar="FILE",
            help="Also draw a figure of where tokens were kept. Needs matplotlib.",
        ),
    ] = None,
    rope_scaling: RopeScaling = None,
    as_json: Json = False,
) -> None:
    """Show on an HTML page which tokens of a text were kept.

    For the other tokens, the page shows at which height of the merge tree they were pruned. It is a
    single file that needs nothing else: the text in colours, an overview to click on, and a search
    by words or token number.

    \b
    Example:
      homer show book.safetensors --model HuggingFaceTB/SmolLM2-1.7B-Instruct \\
          -o kept.html
    """
    from .. import EncodedContext
    from ..evaluation.kept_page import build_page
    from ..evaluation.plots import plot_kept, require_matplotlib
    from ..storage.files import check_outputs, write_atomically
    from ..text.pieces import piece_texts

    check_outputs({"-o": output, "--png": png}, {"ENCODED": encoded, "--model": model})
    if png is not None:
        require_matplotlib()
    context = EncodedContext.load(encoded)
    texts = piece_texts(tokenizer_of(context, model, rope_scaling), context.token_ids)
    title = os.fsencode(encoded.name).decode(errors="replace")
    page = build_page(context, texts, title)
    write_atomically(output, lambda file: file.write_text(page, encoding="utf-8"))
    if png is not None:
        plot_kept(context, png)
    kept = int((context.pruned_at < 0).sum())
    if as_json:
        written = {"output": str(output), "png": None if png is None else str(png)}
        print_json({**written, "tokens": len(context.token_ids), "kept": kept})
    else:
        size = readable_bytes(output.stat().st_size)
        print(f"{output}: {kept:,} of {len(context.token_ids):,} tokens kept, {size}")
        if png is not None:
            print(png)
