"""`homer eval`: compare HOMER with other methods on tasks with long texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .eval_ablation import ablation
from .eval_lm import lm
from .eval_options import (
    DEFAULT_METHODS,
    Methods,
    PlottedRun,
    Run,
    Seed,
    Texts,
    describe_texts,
    digest,
    parse_length,
    read_texts,
    split_list,
)
from .eval_questions import needles, passkey, ruler
from .eval_runs import (
    layout_of,
    open_folder,
    perplexity_table,
    progress,
    report,
    share_cells,
)
from .groups import with_groups
from .help import QUESTIONS, Command, Group
from .options import NoChatTemplate
from .output import table
from .settings import Settings

app = typer.Typer(
    cls=Group,
    help="""Compare HOMER with other methods on tasks with long texts.

    Each evaluation runs one task and writes a folder: the settings, every prediction, the figures
    and, for most tasks, plots. If a run was stopped, give the same command again and it continues
    (lm starts over).

    \b
    Example:
      homer eval passkey --methods plain,yarn,homer --lengths 1x,8x \\
          -o runs/passkey
    """,
    no_args_is_help=True,
    rich_markup_mode=None,
)


@with_groups
def perplexity(
    *,
    text: Texts,
    methods: Methods = DEFAULT_METHODS,
    max_length: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            rich_help_panel=QUESTIONS,
            help="The most to read of each document: a number of tokens, or a multiple of the "
            "context limit, as in 64x.",
            show_default="all of it",
        ),
    ] = None,
    segments: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            rich_help_panel=QUESTIONS,
            help="How many segments beyond the limit to score, evenly spaced.",
            show_default="all",
        ),
    ] = None,
    suffix_len: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            rich_help_panel=QUESTIONS,
            help="The tokens right before a segment that are its suffix. All methods keep them.",
            show_default="the paper's 100, fewer for a limit below 4,000",
        ),
    ] = None,
    seed: Seed = 0,
    run: PlottedRun,
    settings: Settings,
) -> None:
    """Measure the perplexity far into long documents.

    Beyond the context limit, a document is cut into segments of half the limit. Each segment is
    predicted from all tokens before it. These are read as a prefix (the document's first tokens), a
    context, and a suffix (the tokens right before the segment).

    \b
    Example:
      homer eval perplexity --text book.txt --methods plain,window,homer \\
          --max-length 64x -o runs/perplexity
    """
    from ..evaluation import plots
    from ..evaluation.methods import make_readers
    from ..evaluation.perplexity import lay_out_documents, run_perplexity

    config = settings.config
    texts = read_texts(text)
    with run.open() as opened:
        model, limit = opened.model, opened.limit
        longest = None if max_length is None else parse_length(max_length, limit)
        task = lay_out_documents(model, texts, longest, segments, suffix_len)
        readers = make_readers(split_list(methods), model, config)
        described = {
            "task": "perplexity",
            "methods": list(readers),
            **describe_texts(texts),
            "max_length": longest,
            "segments": segments,
            "suffix_len": task.suffix,
            "seed": seed,
        }
        folder = open_folder(run, opened, settings, described, {"--text": text})
        with progress("perplexity", len(task) * len(readers)) as advance:
            metrics = run_perplexity(model, readers, task, folder, seed, advance)
        folder.finish(metrics)
        if not folder.is_first:
            return
        if not run.no_plots:
            path = folder.path / "perplexity_by_position.png"
            plots.plot_perplexity_by_position(metrics, limit, path)
        report(folder, metrics, perplexity_table(metrics), run.as_json)


@with_groups
def quality(
    *,
    data: Annotated[
        Path,
        typer.Option(
            "--data", metavar="FILE", help="The questions, in QuALITY's own format (JSON lines)."
        ),
    ],
    methods: Methods = DEFAULT_METHODS,
    no_chat_template: NoChatTemplate = False,
    run: Run,
    settings: Settings,
) -> None:
    """Answer multiple-choice questions about long articles (QuALITY).

    The model chooses the likeliest option. The data is published at
    https://github.com/nyu-mll/quality.

    \b
    Example:
      homer eval quality --model meta-llama/Llama-2-7b-hf \\
          --data quality.dev.jsonl --methods plain,ntk,homer,homer+ntk \\
          -o runs/quality
    """
    from ..evaluation.methods import make_readers
    from ..evaluation.quality import read_quality, run_quality

    config = settings.config
    questions = read_quality(data)
    with run.open() as opened:
        model = opened.model
        readers = make_readers(split_list(methods), model, config)
        described = {
            "task": "quality",
            "methods": list(readers),
            "data_digest": digest([data.read_bytes()]),
            "chat_template": not no_chat_template,
        }
        folder = open_folder(run, opened, settings, described, {"--data": data})
        layout = layout_of(opened.tokenizer, not no_chat_template)
        with progress("quality", len(questions.questions) * len(readers)) as advance:
            metrics = run_quality(model, readers, questions, layout, folder, advance)
        folder.finish(metrics)
        if not folder.is_first:
            return
        rows = [
            [row["method"], row["subset"], *share_cells(row), str(row["errors"])]
            for row in metrics["by_method"]
        ]
        headings = ["method", "questions", "right", "95 % interval", "errors"]
        report(folder, metrics, table(headings, rows), run.as_json)


for _command in (passkey, needles, ruler, perplexity, quality, lm, ablation):
    app.command(cls=Command)(_command)
