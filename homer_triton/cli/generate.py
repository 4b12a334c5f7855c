"""`homer generate`: answers from a long text, or from a saved encoding of one."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Annotated

import typer

from .answers import Answers
from .groups import given_options, with_groups
from .inputs import read_text, require_one_source
from .options import Around, Checkpoint, EncodedFile, Json, OptionalContextFile
from .output import note_kept, print_json, reported, summary
from .ranks import Devices, begin
from .reading import opened, read
from .settings import Settings


@with_groups
def generate(
    *,
    checkpoint: Checkpoint,
    context_file: OptionalContextFile = None,
    encoded: EncodedFile = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            metavar="TEXT",
            help="The question about the text. Repeat the option to ask several, each answered on "
            "its own.",
            show_default="none, the model continues after the text",
        ),
    ] = None,
    around: Around,
    wanted: Answers,
    devices: Devices = 1,
    as_json: Json = False,
    settings: Settings,
) -> None:
    """Answer questions about a long text.

    The text may be many times longer than the model's context limit. HOMER reads it in chunks. Each
    chunk ends with the suffix, which holds the prompt. The tokens that the suffix attends to are
    kept, and the chunks are merged into one short KV cache. The answer comes from this cache and
    streams to stdout.

    With one prompt, the text is read for this prompt. With several, it is read once and for none
    of them: what the end of the text (or --suffix) attends to is kept, and a prompt finds only
    that. For the best answers, ask one prompt per run.

    If the tokenizer has a chat template, text and prompt become the user's turn.

    \b
    Examples:
      homer generate --model HuggingFaceTB/SmolLM2-1.7B-Instruct \\
          --context-file book.txt --prompt "Who tells the story?"
      homer generate --model MODEL --encoded book.safetensors
    """
    from .. import EncodedContext
    from .. import generate as go_on

    config = settings.config
    fixed = [name for name in given_options(around) if name in ("--prefix", "--suffix")]
    require_one_source(context_file, encoded, [*fixed, *given_options(settings)])
    # Raises for bad settings before the long work begins.
    decoding = asdict(wanted.decoding)
    prompts = prompt or []
    questions: list[str | None] = [*prompts] or [None]
    begin(devices, context_file)
    text = "" if context_file is None else read_text(context_file)
    with opened(checkpoint, config) as (llama, tokenizer, ranks):
        parts = around.compose(tokenizer, prompts, encoded is not None or len(prompts) > 1)
        if encoded is None:
            context = read(llama, text, parts, config, around.special_tokens, ranks)
        else:
            context = EncodedContext.load(encoded, llama.device)
    if context is None:
        return
    note_kept(context)

    answers = []
    for question, appended in zip(questions, parts.appended, strict=True):
        if len(prompts) > 1 and not as_json:
            print(f"> {question}")
        answer = go_on(
            llama,
            context,
            appended,
            on_text=None if as_json else partial(print, end="", flush=True),
            **decoding,
        )
        answers.append({"prompt": question, **reported(answer)})
        if not as_json:
            print()
    if as_json:
        print_json({"answers": answers, **summary(context)})
