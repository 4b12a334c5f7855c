"""`homer encode`: from a long text to a short KV cache in a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .inputs import compose, note_long_chunks, open_model, read_text
from .options import (
    ContextFile,
    Device,
    Dtype,
    Json,
    ModelPath,
    NoChatTemplate,
    Ops,
    Prefix,
    RopeScaling,
    SpecialTokens,
    Suffix,
)
from .output import at_terminal, note_kept, print_json, readable_bytes, summary
from .settings import files_of, with_settings

if TYPE_CHECKING:
    from .. import HomerConfig


@with_settings
def encode(
    model: ModelPath,
    context_file: ContextFile,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="Where the encoding goes."),
    ],
    prefix: Prefix = None,
    suffix: Suffix = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="A question to encode along with the text. Left out, the encoding serves any "
            "question: give them to `homer generate --encoded`.",
        ),
    ] = None,
    no_chat_template: NoChatTemplate = False,
    special_tokens: SpecialTokens = False,
    rope_scaling: RopeScaling = None,
    device: Device = None,
    dtype: Dtype = "auto",
    ops: Ops = "auto",
    as_json: Json = False,
    *,
    config: HomerConfig,
) -> None:
    """Merge a long text into a short KV cache, once, and save it for many questions.

    The file is safetensors; `homer generate --encoded` goes on from it, and so does Python:
    homer_triton.EncodedContext.load(FILE).

    \b
    Example:
      homer encode --model meta-llama/Llama-3.2-1B --context-file book.txt \\
          -o book.safetensors
    """
    from .. import encode as merge
    from ..storage.files import check_outputs

    inputs = {"--context-file": context_file, "--model": model, **files_of(config)}
    check_outputs({"-o": output}, inputs)
    context = read_text(context_file)
    llama, tokenizer = open_model(model, device, dtype, ops, rope_scaling)
    note_long_chunks(config, llama.config)
    parts = compose(
        tokenizer,
        prefix,
        suffix,
        [] if prompt is None else [prompt],
        chat=not no_chat_template,
        ask_later=prompt is None,
        special_tokens=special_tokens,
    )
    encoded = merge(
        llama,
        context,
        parts.prefix,
        parts.suffix,
        config,
        progress=at_terminal(),
        special_tokens=special_tokens,
    )
    encoded.save(output)
    note_kept(encoded)
    if as_json:
        print_json({"output": str(output), **summary(encoded)})
    else:
        print(f"{output}: {readable_bytes(output.stat().st_size)}")
