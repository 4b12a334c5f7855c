"""`homer show`: which tokens of an encoded text survived, on a page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .inputs import tokenizer_of
from .options import Json, RopeScaling
from .output import print_json, readable_bytes


def show(
    encoded: Annotated[Path, typer.Argument(metavar="ENCODED", help="What `homer encode` saved.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where the HTML page goes.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="PATH_OR_ID",
            help="The checkpoint whose tokenizer turns the tokens into text.",
            show_default="the small one that ships, if it made the encoding",
        ),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option("--png", metavar="FILE", help="Also draw what was kept where, for a paper."),
    ] = None,
    rope_scaling: RopeScaling = None,
    as_json: Json = False,
) -> None:
    """Show which tokens of a text survived, and at which height of the tree the others were pruned.

    The page is one file with everything in it: the text in colours, an overview to click on, and a
    search by words or by token number.

    Example: homer show book.safetensors -o kept.html
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
