"""`homer eval`: does a shortened context keep what matters?"""

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
from .options import NoChatTemplate
from .output import table
from .settings import Settings

app = typer.Typer(
    help="""Does a shortened context keep what matters? Each evaluation compares methods on one task
    and writes a folder with its settings, every prediction, the figures and plots.

    A run that was stopped goes on where it was when the same command is given again.""",
    no_args_is_help=True,
    rich_markup_mode=None,
)
for _command in (passkey, needles, ruler):
    app.command()(_command)


@app.command()
@with_groups
def perplexity(
    *,
    text: Texts,
    methods: Methods = DEFAULT_METHODS,
    max_length: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Read no more of each document: tokens, or times the context limit as in 64x.",
            show_default="all of it",
        ),
    ] = None,
    segments: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Score this many segments beyond the limit, evenly spaced.",
            show_default="all",
        ),
    ] = None,
    suffix_len: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens right before a segment that are its suffix, which no method leaves out.",
            show_default="the paper's 100, fewer for a limit below 4,000",
        ),
    ] = None,
    seed: Seed = 0,
    run: PlottedRun,
    settings: Settings,
) -> None:
    """Predict long documents, each segment from all before it.

    Segments are half the context limit long; what lies before one is read as its prefix (the
    document's first tokens), context and suffix (the tokens right before it).

    Example: homer eval perplexity --text book.txt --methods plain,window,homer --max-length 64x
    -o runs/perplexity
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


@app.command()
@with_groups
def quality(
    *,
    data: Annotated[
        Path,
        typer.Option(
            "--data", metavar="FILE", help="Questions in QuALITY's own format (JSON lines)."
        ),
    ],
    methods: Methods = DEFAULT_METHODS,
    no_chat_template: NoChatTemplate = False,
    run: Run,
    settings: Settings,
) -> None:
    """Choose the likeliest answers to questions about long articles.

    The data is published at https://github.com/nyu-mll/quality.

    Example: homer eval quality --model meta-llama/Llama-2-7b-hf --data quality.dev.jsonl --methods
    plain,ntk,homer,homer+ntk -o runs/quality
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


app.command()(ablation)
app.command()(lm)
