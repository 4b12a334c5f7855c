"""`homer encode`: from a long text to a short KV cache in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .groups import with_groups
from .inputs import read_text
from .options import Around, Checkpoint, ContextFile, Json
from .output import note_kept, print_json, readable_bytes, summary
from .ranks import Devices, begin, is_first
from .reading import opened, read
from .settings import Settings


@with_groups
def encode(
    *,
    checkpoint: Checkpoint,
    context_file: ContextFile,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="Where the encoding goes."),
    ],
    around: Around,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="A question to encode along with the text. Left out, the encoding serves any "
            "question: give them to `homer generate --encoded`.",
        ),
    ] = None,
    devices: Devices = 1,
    as_json: Json = False,
    settings: Settings,
) -> None:
    """Merge a long text into a short KV cache, once, and save it for many questions.

    The file is safetensors; `homer generate --encoded` goes on from it, and so does Python:
    homer_triton.EncodedContext.load(FILE).

    \b
    Example:
      homer encode --model meta-llama/Llama-3.2-1B --context-file book.txt \\
          -o book.safetensors

    Over several machines or GPUs, every process reads a part of the text: --devices 8, or torchrun
    --nproc-per-node 8 -m homer_triton encode, and so on.
    """
    from ..storage.files import check_outputs

    config = settings.config
    if is_first():
        inputs = {"--context-file": context_file, "--model": checkpoint.model, **settings.files}
        check_outputs({"-o": output}, inputs)
    begin(devices, context_file)
    context = read_text(context_file)
    with opened(checkpoint, config) as (llama, tokenizer, ranks):
        prompts = [] if prompt is None else [prompt]
        parts = around.compose(tokenizer, prompts, ask_later=prompt is None)
        encoded = read(llama, context, parts, config, around.special_tokens, ranks)
    if encoded is None:
        return
    encoded.save(output)
    note_kept(encoded)
    if as_json:
        print_json({"output": str(output), **summary(encoded)})
    else:
        print(f"{output}: {readable_bytes(output.stat().st_size)}")
