"""`homer generate`: answers from a long text, or from an encoding of one."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .inputs import compose, homer_config, note_long_chunks, open_model, read_text
from .options import (
    CalibrationFile,
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
    OptionalContextFile,
    Prefix,
    RopeScaling,
    Score,
    Suffix,
    SuffixMode,
    TargetLen,
)
from .output import at_terminal, note_kept, print_json, summary


def generate(
    model: ModelPath,
    context_file: OptionalContextFile = None,
    encoded: Annotated[
        Path | None,
        typer.Option(
            "--encoded",
            metavar="FILE",
            help="Go on from what `homer encode` saved, in place of --context-file.",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            metavar="TEXT",
            help="The question, put after the context. Given several times, the text is encoded "
            "once and each prompt gets an answer of its own.",
            show_default="none: go on with the text",
        ),
    ] = None,
    prefix: Prefix = None,
    suffix: Suffix = None,
    no_chat_template: NoChatTemplate = False,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Most tokens in an answer.")
    ] = 256,
    temperature: Annotated[
        float,
        typer.Option(
            metavar="X", min=0.0, help="0 takes the likeliest token each time; above 0 samples."
        ),
    ] = 0.0,
    top_k: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Sample from the N likeliest tokens only.",
            show_default="all",
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0.0,
            max=1.0,
            help="Sample from the smallest set with this probability.",
            show_default="all",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Makes sampling repeatable.", show_default="none"),
    ] = None,
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
    """Answer questions about a text that may be many times longer than the model's context limit.

    The text is merged into a short cache, steered by the question, and the answer streams to
    stdout. Where the tokenizer has a chat template, text and question become the user's turn.

    \b
    Examples:
      homer generate --model meta-llama/Llama-3.2-1B-Instruct \\
          --context-file book.txt --prompt "Who tells the story?"
      homer generate --model MODEL --encoded book.safetensors \\
          --prompt "Where?" --prompt "When?"
    """
    from .. import EncodedContext
    from .. import encode as merge
    from .. import generate as go_on
    from ..generation import make_warpers

    _refuse_conflicts(
        context_file,
        encoded,
        {
            "--prefix": prefix,
            "--suffix": suffix,
            "--max-chunk-len": max_chunk_len,
            "--target-len": target_len,
            "--layers-warmup": layers_warmup,
            "--leaf-batch": leaf_batch,
            "--offload": offload,
            "--memory-budget": memory_budget,
            "--cuda-graphs": cuda_graphs or None,
            "--calibration": calibration,
            "--suffix-mode": suffix_mode,
            "--score": score,
        },
    )
    make_warpers(temperature, top_k, top_p)  # refuses bad settings before the long work
    prompts = prompt or []
    questions: list[str | None] = [*prompts] or [None]
    text = "" if context_file is None else read_text(context_file)
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
    parts = compose(
        tokenizer,
        prefix,
        suffix,
        prompts,
        chat=not no_chat_template,
        ask_later=encoded is not None or len(prompts) > 1,
    )
    if encoded is None:
        note_long_chunks(config, llama.config)
        context = merge(llama, text, parts.prefix, parts.suffix, config, progress=at_terminal())
    else:
        context = EncodedContext.load(encoded, llama.device)
    note_kept(context)

    answers = []
    for question, appended in zip(questions, parts.appended, strict=True):
        if len(prompts) > 1 and not as_json:
            print(f"> {question}")
        answer = go_on(
            llama,
            context,
            appended,
            max_new_tokens,
            temperature,
            top_k,
            top_p,
            seed,
            on_text=None if as_json else partial(print, end="", flush=True),
        )
        answers.append({"prompt": question, **asdict(answer)})
        if not as_json:
            print()
    if as_json:
        print_json({"answers": answers, **summary(context)})


def _refuse_conflicts(
    context_file: str | None, encoded: Path | None, settings: dict[str, Any]
) -> None:
    """Raise `ValueError` unless there is one source, and no setting that an encoding has fixed."""
    if (context_file is None) == (encoded is None):
        raise ValueError("Give a text with --context-file, or an encoding with --encoded.")
    fixed = [name for name, value in settings.items() if value is not None]
    if encoded is not None and fixed:
        raise ValueError(
            f"{', '.join(fixed)} cannot change what {encoded} holds; give the text with "
            "--context-file to encode it anew."
        )
