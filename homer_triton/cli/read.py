"""`homer read`: read texts once, for any number of questions."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer

from .groups import with_groups
from .inputs import read_text
from .options import Checkpoint, DocumentSettings, Json
from .output import at_terminal, note_read, print_json, readable_bytes
from .ranks import Devices, begin, is_first, joined


@with_groups(but=("target_len",))
def read(
    *,
    checkpoint: Checkpoint,
    texts: Annotated[
        list[str],
        typer.Argument(metavar="FILE…", help="The texts, UTF-8 files. Use - for standard input."),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="The file for the document."),
    ],
    reading: DocumentSettings,
    devices: Devices = 1,
    as_json: Json = False,
) -> None:
    """Read texts once, for any number of questions.

    `homer ask FILE` then answers each question in a moment, from what it asks for. The file keeps
    some hundred bytes for each token. If the reading is interrupted, the same command goes on
    where it stopped.

    \b
    Examples:
      homer read book.txt -o book.homer --model HuggingFaceTB/SmolLM2-1.7B-Instruct
      homer ask book.homer --prompt "Who tells the story?"
    """
    from .. import read as read_once
    from ..storage.files import check_outputs

    if is_first():
        inputs = {"FILE": texts, "--model": checkpoint.model}
        check_outputs({"-o": output}, inputs)
    begin(devices, "-" if "-" in texts else "")
    named = {}
    for file in texts:
        if file in named:
            raise ValueError(f"The text {file} is named twice; name it once.")
        named[file] = read_text(file)
    with joined(checkpoint.device) as ranks:
        llama, _ = checkpoint.open()
        start = perf_counter()
        document = read_once(llama, named, reading.config, at_terminal(), output, ranks)
    if document is None:
        return
    seconds = perf_counter() - start
    note_read(len(document), seconds)
    size = output.stat().st_size
    if as_json:
        figures = {"tokens": len(document), "bytes": size, "seconds": seconds}
        print_json({"output": str(output), **figures})
    else:
        print(f"{output}: {readable_bytes(size)}")
