"""`homer encode`: read a long text and save its short KV cache."""

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
        typer.Option(
            "--output", "-o", metavar="FILE", help="The file for the encoding (safetensors)."
        ),
    ],
    around: Around,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="The question to read the text for. What it attends to is kept, and it becomes "
            "part of the encoding.",
            show_default="none, what the end of the text or --suffix attends to is kept",
        ),
    ] = None,
    devices: Devices = 1,
    as_json: Json = False,
    settings: Settings,
) -> None:
    """Read a long text once and save its short KV cache.

    `homer generate --encoded FILE` answers from the file without reading the text again. In Python,
    use homer_triton.EncodedContext.load(FILE).

    With --prompt, the encoding answers this question: run `homer generate --encoded FILE` without a
    prompt. Without --prompt, you can ask any question later, but the answer finds only what the end
    of the text (or --suffix) attended to. If you know the question, give it here.

    \b
    Examples:
      homer encode --model HuggingFaceTB/SmolLM2-1.7B-Instruct \\
          --context-file book.txt --prompt "Who tells the story?" \\
          -o book.safetensors
      torchrun --nproc-per-node 8 -m homer_triton encode --model MODEL \\
          --context-file book.txt -o book.safetensors
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
