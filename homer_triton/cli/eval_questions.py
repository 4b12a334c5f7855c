"""`homer eval passkey`, `needles` and `ruler`: find what a text hides or counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from .eval_options import (
    DEFAULT_METHODS,
    Asked,
    AskedAtDepths,
    Lengths,
    Methods,
    PlottedRun,
    Texts,
    describe_samples,
    describe_texts,
    parse_depths,
    read_texts,
    split_list,
)
from .eval_runs import layout_of, length_table, open_folder, progress, report
from .groups import with_groups
from .settings import Settings

if TYPE_CHECKING:
    from ..evaluation.questions import Questions
    from ..evaluation.runs import Record
    from ..storage.files import Inputs
    from .eval_options import Opened


@dataclass(frozen=True, kw_only=True)
class AskedBeyond(Asked):
    """Questions about texts that cannot be short."""

    lengths: Lengths = "4x,8x,16x"


@with_groups
def passkey(
    *,
    methods: Methods = DEFAULT_METHODS,
    asked: AskedAtDepths,
    run: PlottedRun,
    settings: Settings,
) -> None:
    """Find a five-digit key in a long text of repeated sentences.

    \b
    Example:
      homer eval passkey --methods plain,yarn,homer --lengths 1x,8x \\
          -o runs/passkey
    """
    from ..evaluation.passkey import PASSKEY
    from ..evaluation.questions import Questions

    with _opened(run, asked, settings) as (opened, numbers):
        places = parse_depths(asked.depths)
        questions = Questions("passkey", (PASSKEY,), numbers, asked.seed, places)
        _run(run, opened, asked, settings, methods, questions)


@with_groups
def needles(
    *,
    text: Texts,
    methods: Methods = DEFAULT_METHODS,
    asked: AskedAtDepths,
    run: PlottedRun,
    settings: Settings,
) -> None:
    """Find a magic number hidden in your own texts.

    Each question hides a random number in a random part of the documents. The documents are joined.
    Together they must be as long as the longest of --lengths.

    \b
    Example:
      homer eval needles --text novel.txt --methods plain,yarn,homer \\
          --lengths 1x,8x -o runs/needles
    """
    from ..evaluation.needles import needles_in
    from ..evaluation.questions import Questions
    from ..text.tokens import tokenize

    texts = read_texts(text)
    with _opened(run, asked, settings) as (opened, numbers):
        task = needles_in(
            list(texts.values()), lambda own: len(tokenize(opened.model, own, "--text"))
        )
        questions = Questions("needles", (task,), numbers, asked.seed, parse_depths(asked.depths))
        named, inputs = describe_texts(texts), {"--text": text}
        _run(run, opened, asked, settings, methods, questions, named, inputs)


@with_groups
def ruler(
    *,
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks",
            metavar="LIST",
            help="The tasks, separated by commas. niah_single_1: a needle in repeated sentences. "
            "niah_multikey_2: a needle among other needles. niah_multikey_3: the same with random "
            "identifiers (UUIDs). vt: trace variables through assignments. cwe, fwe: find the most "
            "frequent words.",
            show_default="all",
        ),
    ] = "niah_single_1,niah_multikey_2,niah_multikey_3,vt,cwe,fwe",
    methods: Methods = DEFAULT_METHODS,
    asked: AskedBeyond,
    run: PlottedRun,
    settings: Settings,
) -> None:
    """Run six tasks of RULER on generated texts.

    RULER (Hsieh et al. 2024) asks a model to retrieve, trace and aggregate. The score of an answer
    is the share of the expected values that it contains.

    \b
    Example:
      homer eval ruler --model HuggingFaceTB/SmolLM2-1.7B-Instruct \\
          --methods plain,homer --lengths 8192,16384 \\
          --tasks niah_single_1,vt -o runs/ruler
    """
    from ..evaluation.questions import Questions
    from ..evaluation.ruler import choose_tasks

    chosen = choose_tasks(split_list(tasks))
    with _opened(run, asked, settings) as (opened, numbers):
        questions = Questions("ruler", chosen, numbers, asked.seed)
        named = {"tasks": [task.name for task in chosen]}
        _run(run, opened, asked, settings, methods, questions, named)


@contextmanager
def _opened(
    run: PlottedRun, asked: Asked, settings: Settings
) -> Iterator[tuple[Opened, dict[int, int]]]:
    """The model, and the number of questions at each length, in tokens. Raises for bad settings
    before the model is loaded.
    """
    _ = settings.config
    with run.open() as opened:
        yield opened, asked.numbers(opened.limit)


def _run(
    run: PlottedRun,
    opened: Opened,
    asked: Asked,
    settings: Settings,
    methods: str,
    questions: Questions,
    named: Record | None = None,
    inputs: Inputs | None = None,
) -> None:
    """Let the methods answer all questions, then draw the plots and print the figures.

    named: settings of the run besides the common ones; inputs: files that were read, by option.
    """
    from ..evaluation import plots
    from ..evaluation.methods import make_readers
    from ..evaluation.questions import ask, check_lengths

    model, chat = opened.model, not asked.no_chat_template
    readers = make_readers(split_list(methods), model, settings.config)
    layout = layout_of(opened.tokenizer, chat)
    check_lengths(model, questions, layout)
    described = {
        "task": questions.name,
        "methods": list(readers),
        "lengths": sorted(questions.samples),
        "samples": describe_samples(questions.samples),
        "seed": questions.seed,
        "chat_template": chat,
        **({"depths": questions.depths} if questions.has_depths else {}),
        **(named or {}),
    }
    folder = open_folder(run, opened, settings, described, inputs)
    with progress(questions.name, len(questions) * len(readers)) as advance:
        metrics = ask(model, readers, questions, layout, folder, advance)
    folder.finish(metrics)
    if not folder.is_first:
        return
    if not run.no_plots:
        by_length = folder.path / "accuracy_by_length.png"
        plots.plot_accuracy_by_length(metrics, opened.limit, by_length)
        if "by_depth" in metrics:
            by_depth = folder.path / "depth_by_length.png"
            plots.plot_depth_by_length(metrics, opened.limit, by_depth)
    report(folder, metrics, length_table(metrics, opened.limit), run.as_json)
