"""`homer eval passkey`, `needles` and `ruler`: answers that are looked up in what a model says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .eval_options import (
    DEFAULT_METHODS,
    Depths,
    Lengths,
    Methods,
    NoPlots,
    OptionalModelPath,
    OutputFolder,
    Samples,
    Seed,
    Texts,
    describe_samples,
    describe_texts,
    parse_depths,
    parse_lengths,
    parse_samples,
    read_texts,
    split_list,
)
from .eval_runs import (
    layout_of,
    length_table,
    open_checkpoint,
    open_folder,
    progress,
    report,
    want_plots,
)
from .options import (
    Device,
    Dtype,
    Json,
    NoChatTemplate,
    Ops,
)
from .settings import with_settings

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from .. import HomerConfig, Llama
    from ..evaluation.questions import Questions
    from ..evaluation.runs import Record, RunFolder
    from ..storage.files import Inputs

_DEPTHS = "0.1,0.3,0.5,0.7,0.9"


@with_settings
def passkey(
    output: OutputFolder,
    model: OptionalModelPath = None,
    methods: Methods = DEFAULT_METHODS,
    lengths: Lengths = "1x,4x,8x,16x",
    depths: Depths = _DEPTHS,
    samples: Samples = "4",
    seed: Seed = 0,
    no_chat_template: NoChatTemplate = False,
    device: Device = None,
    dtype: Dtype = "auto",
    ops: Ops = "auto",
    no_plots: NoPlots = False,
    as_json: Json = False,
    *,
    config: HomerConfig,
) -> None:
    """Find a five-digit key in a long text of repeated sentences.

    Example: homer eval passkey --methods plain,yarn,homer --lengths 1x,8x
    -o runs/passkey
    """
    from ..evaluation.passkey import PASSKEY
    from ..evaluation.questions import Questions

    want_plots(no_plots)
    opened = open_checkpoint(model, device, dtype, ops)
    numbers = _numbers(opened[0], lengths, samples)
    questions = Questions("passkey", (PASSKEY,), numbers, seed, parse_depths(depths))
    folder, metrics = _run(opened, questions, methods, config, not no_chat_template, output)
    _report(folder, metrics, opened[0], no_plots, as_json)


@with_settings
def needles(
    output: OutputFolder,
    text: Texts,
    model: OptionalModelPath = None,
    methods: Methods = DEFAULT_METHODS,
    lengths: Lengths = "1x,4x,8x,16x",
    depths: Depths = _DEPTHS,
    samples: Samples = "4",
    seed: Seed = 0,
    no_chat_template: NoChatTemplate = False,
    device: Device = None,
    dtype: Dtype = "auto",
    ops: Ops = "auto",
    no_plots: NoPlots = False,
    as_json: Json = False,
    *,
    config: HomerConfig,
) -> None:
    """Find a magic number in a text of yours.

    Each question hides another number in another stretch of the documents, which are taken one
    after another and must be as long as the longest of --lengths.

    Example: homer eval needles --text novel.txt --methods plain,yarn,homer --lengths 1x,8x
    -o runs/needles
    """
    from ..evaluation.needles import needles_in
    from ..evaluation.questions import Questions
    from ..text.tokens import tokenize

    want_plots(no_plots)
    texts = read_texts(text)
    opened = open_checkpoint(model, device, dtype, ops)
    numbers = _numbers(opened[0], lengths, samples)
    task = needles_in(list(texts.values()), lambda part: len(tokenize(opened[0], part, "--text")))
    questions = Questions("needles", (task,), numbers, seed, parse_depths(depths))
    folder, metrics = _run(
        *(opened, questions, methods, config, not no_chat_template, output),
        describe_texts(texts),
        {"--text": text},
    )
    _report(folder, metrics, opened[0], no_plots, as_json)


@with_settings
def ruler(
    output: OutputFolder,
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks",
            metavar="LIST",
            help="Any of niah_single_1, niah_multikey_2, niah_multikey_3 (needles in noise, among "
            "others, among others of random letters), vt (variables traced through assignments), "
            "cwe, fwe (the most frequent words).",
            show_default="all",
        ),
    ] = "niah_single_1,niah_multikey_2,niah_multikey_3,vt,cwe,fwe",
    model: OptionalModelPath = None,
    methods: Methods = DEFAULT_METHODS,
    lengths: Lengths = "4x,8x,16x",
    samples: Samples = "4",
    seed: Seed = 0,
    no_chat_template: NoChatTemplate = False,
    device: Device = None,
    dtype: Dtype = "auto",
    ops: Ops = "auto",
    no_plots: NoPlots = False,
    as_json: Json = False,
    *,
    config: HomerConfig,
) -> None:
    """Retrieve, trace and aggregate in made-up texts: six tasks of RULER (Hsieh et al. 2024).

    An answer is worth the share of what is asked for that it holds.

    Example: homer eval ruler --model meta-llama/Llama-3.2-1B --methods plain,homer --lengths
    4096,8192 --tasks niah_single_1,vt -o runs/ruler
    """
    from ..evaluation.questions import Questions
    from ..evaluation.ruler import choose_tasks

    want_plots(no_plots)
    chosen = choose_tasks(split_list(tasks))
    opened = open_checkpoint(model, device, dtype, ops)
    questions = Questions("ruler", chosen, _numbers(opened[0], lengths, samples), seed)
    named = {"tasks": [task.name for task in chosen]}
    folder, metrics = _run(opened, questions, methods, config, not no_chat_template, output, named)
    _report(folder, metrics, opened[0], no_plots, as_json)


def _numbers(model: Llama, lengths: str, samples: str) -> dict[int, int]:
    """How many questions to ask at each length, in tokens."""
    limit = model.config.max_position_embeddings
    return parse_samples(samples, parse_lengths(lengths, limit), limit)


def _run(
    opened: tuple[Llama, PreTrainedTokenizerBase, str],
    questions: Questions,
    methods: str,
    config: HomerConfig,
    chat: bool,
    output: Path,
    named: Record | None = None,
    inputs: Inputs | None = None,
) -> tuple[RunFolder, Record]:
    """Let the methods answer all questions; the folder, and the figures.

    named: settings of the run beside those that all have; inputs: files that were read, by option.
    """
    from ..evaluation.methods import make_readers
    from ..evaluation.questions import ask, check_lengths

    model, tokenizer, checkpoint = opened
    readers = make_readers(split_list(methods), model, config)
    layout = layout_of(tokenizer, chat)
    check_lengths(model, questions, layout)
    settings = {
        "task": questions.name,
        "methods": list(readers),
        "lengths": sorted(questions.samples),
        "samples": describe_samples(questions.samples),
        "seed": questions.seed,
        "chat_template": chat,
        **({"depths": questions.depths} if questions.has_depths else {}),
        **(named or {}),
    }
    folder = open_folder(output, model, checkpoint, config, settings, inputs)
    with progress(questions.name, len(questions) * len(readers)) as advance:
        metrics = ask(model, readers, questions, layout, folder, advance)
    folder.finish(metrics)
    return folder, metrics


def _report(
    folder: RunFolder, metrics: Record, model: Llama, no_plots: bool, as_json: bool
) -> None:
    """Draw the figures, and print them."""
    from ..evaluation import plots

    limit = model.config.max_position_embeddings
    if not no_plots:
        plots.plot_accuracy_by_length(metrics, limit, folder.path / "accuracy_by_length.png")
        if "by_depth" in metrics:
            plots.plot_depth_by_length(metrics, limit, folder.path / "depth_by_length.png")
    report(folder, metrics, length_table(metrics, limit), as_json)
