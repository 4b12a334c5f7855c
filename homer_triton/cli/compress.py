"""`homer compress`: shorten a long text to the words that were kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .groups import given_options, with_groups
from .help import SETTINGS, TEXT
from .inputs import (
    read_text,
    require_one_source,
    tokenizer_of,
)
from .options import Around, Checkpoint, EncodedFile, Json, OptionalContextFile
from .output import at_terminal, note, note_kept, print_json, summary
from .ranks import Devices, begin, is_first
from .reading import opened
from .settings import Settings

if TYPE_CHECKING:
    from .. import EncodedContext, HomerConfig, Llama
    from ..ranks import Ranks
    from .inputs import Parts


@with_groups(but=("target_len",))
def compress(
    *,
    checkpoint: Checkpoint,
    context_file: OptionalContextFile = None,
    encoded: EncodedFile = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The file for the short text.",
            show_default="stdout",
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="The question to read the text for: what it attends to is kept. It is not part of "
            "the short text.",
            show_default="none, the end of the text or --suffix decides",
        ),
    ] = None,
    target_len: Annotated[
        int | None,
        typer.Option(
            "--target-len",
            metavar="N",
            min=1,
            rich_help_panel=SETTINGS,
            help="The most tokens in the short text, gap marks included. HOMER never keeps more "
            "tokens than a chunk holds.",
            show_default="that of `homer encode`, or of the encoding",
        ),
    ] = None,
    unit: Annotated[
        Literal["token", "word", "sentence"],
        typer.Option(
            metavar="token|word|sentence",
            help="Kept tokens are completed to whole words or sentences. With token, only to whole "
            "characters.",
        ),
    ] = "word",
    gap: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="The mark where something is left out.",
            show_default='" … "',
        ),
    ] = " … ",
    with_suffix: Annotated[
        bool,
        typer.Option(
            "--with-suffix",
            rich_help_panel=TEXT,
            help="With --encoded: count the suffix as text. Use it if the encoding was made "
            "without a question, so that its suffix is the end of the text.",
        ),
    ] = False,
    around: Around,
    devices: Devices = 1,
    as_json: Json = False,
    settings: Settings,
) -> None:
    """Shorten a text to the words that matter for a question.

    Any other model can read the result. The text is read as by `homer encode`. The kept tokens are
    then written as text, in their order, as whole words, with a mark at each gap.

    \b
    Example:
      homer compress --model HuggingFaceTB/SmolLM2-1.7B-Instruct \\
          --context-file book.txt --prompt "Who tells the story?" \\
          --target-len 1000 -o short.txt
    """
    from .. import EncodedContext
    from ..storage.files import check_outputs, write_atomically
    from ..text.controls import plain_ids

    config = settings.config
    fixed = [] if prompt is None else ["--prompt"]
    fixed += [name for name in given_options(around) if name != "--no-chat-template"]
    require_one_source(context_file, encoded, [*fixed, *given_options(settings)])
    if with_suffix and encoded is None:
        raise ValueError("--with-suffix goes with --encoded; with --context-file, leave it out.")
    inputs = {"--context-file": context_file, "--encoded": encoded, "--model": checkpoint.model}
    if is_first():
        check_outputs({"-o": output}, {**inputs, **settings.files})
    begin(devices, context_file)

    source = None
    context: EncodedContext | None
    if context_file is not None:
        source = read_text(context_file)
        with opened(checkpoint, config) as (llama, tokenizer, ranks):
            prompts = [] if prompt is None else [prompt]
            parts = around.compose(tokenizer, prompts, ask_later=prompt is None)
            with_suffix = parts.suffix is None
            special = around.special_tokens
            context = _encode(llama, source, parts, config, target_len, special, ranks)
    else:
        assert encoded is not None
        context = EncodedContext.load(encoded)
        tokenizer = tokenizer_of(context, checkpoint.model, checkpoint.rope_scaling)
    if context is None:
        return
    note_kept(context)

    text = context.text(tokenizer, target_len, unit, gap, with_suffix, source)
    if output is not None:
        write_atomically(output, lambda file: file.write_bytes(text.encode()))
    tokens_in = context.plan.context_len + (context.plan.suffix_len if with_suffix else 0)
    tokens_out = len(plain_ids(tokenizer, text))
    ratio = tokens_in / tokens_out if tokens_out else None
    shorter = f"{tokens_out:,} of {tokens_in:,} tokens"
    if as_json:
        figures = {"tokens_in": tokens_in, "tokens_out": tokens_out, "ratio": ratio}
        where = None if output is None else str(output)
        print_json({"output": where, "text": text, **figures, **summary(context)})
    elif output is not None:
        print(f"{output}: {shorter}")
    else:
        note(f"text: {shorter}")
        print(text)


def _encode(
    model: Llama,
    text: str,
    parts: Parts,
    config: HomerConfig,
    target_len: int | None,
    special_tokens: bool,
    ranks: Ranks | None,
) -> EncodedContext | None:
    """The text's encoding; None if another rank has it.

    target_len: the most tokens of the context to keep, prefix and suffix not counted; None for the
    settings' own target.
    """
    from .. import encode as merge
    from ..text.tokens import split_input

    chunk_len = config.chunk_len(model.config)
    affixes = parts.prefix, parts.suffix
    before, middle, after = split_input(model, text, *affixes, chunk_len, special_tokens)
    if target_len is not None:
        config = replace(config, target_len=len(before) + target_len + len(after))
    return merge(model, middle, before, after, config, progress=at_terminal(), ranks=ranks)
