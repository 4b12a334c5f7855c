"""`homer encode`: from a long text to a short KV cache in a file."""

from pathlib import Path
from typing import Annotated

import typer

from .inputs import compose, homer_config, note_long_chunks, open_model, read_text
from .options import (
    CalibrationFile,
    ContextFile,
    CudaGraphs,
    Device,
    Dtype,
    Json,
    LayersWarmup,
    LeafBatch,
    MaxChunkLen,
    MemoryBudget,
    ModelPath,
    NoChatTemplate,
    Offload,
    Ops,
    Prefix,
    RopeScaling,
    Score,
    Suffix,
    SuffixMode,
    TargetLen,
)
from .output import at_terminal, note_kept, print_json, readable_bytes, summary


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
    max_chunk_len: MaxChunkLen = None,
    target_len: TargetLen = None,
    layers_warmup: LayersWarmup = None,
    leaf_batch: LeafBatch = None,
    offload: Offload = None,
    memory_budget: MemoryBudget = None,
    cuda_graphs: CudaGraphs = False,
    calibration: CalibrationFile = None,
    suffix_mode: SuffixMode = None,
    score: Score = None,
    rope_scaling: RopeScaling = None,
    device: Device = None,
    dtype: Dtype = "auto",
    ops: Ops = "auto",
    as_json: Json = False,
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
    from ..files import check_writable

    check_writable(output)
    context = read_text(context_file)
    config = homer_config(
        max_chunk_len,
        target_len,
        layers_warmup,
        calibration,
        suffix_mode,
        score,
        leaf_batch,
        offload,
        memory_budget,
        cuda_graphs,
    )
    llama, tokenizer = open_model(model, device, dtype, ops, rope_scaling)
    note_long_chunks(config, llama.config)
    parts = compose(
        tokenizer,
        prefix,
        suffix,
        [] if prompt is None else [prompt],
        chat=not no_chat_template,
        ask_later=prompt is None,
    )
    encoded = merge(llama, context, parts.prefix, parts.suffix, config, progress=at_terminal())
    encoded.save(output)
    note_kept(encoded)
    if as_json:
        print_json({"output": str(output), **summary(encoded)})
    else:
        print(f"{output}: {readable_bytes(output.stat().st_size)}")
