"""`homer eval ablation`: what each part of HOMER contributes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import typer

from .eval_options import (
    AskedAtDepths,
    Lengths,
    PlottedRun,
    describe_samples,
    describe_texts,
    parse_depths,
    read_texts,
    split_list,
)
from .eval_runs import layout_of, length_table, open_folder, progress, report
from .groups import with_groups
from .help import QUESTIONS
from .settings import Settings


@dataclass(frozen=True, kw_only=True)
class AskedFar(AskedAtDepths):
    """Questions that a plain model cannot answer."""

    lengths: Lengths = "4x,8x"


@with_groups
def ablation(
    *,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Hide magic numbers in this document, a UTF-8 file, and not pass keys in repeated "
            "sentences. Repeat the option for more documents.",
        ),
    ] = None,
    parts: Annotated[
        str,
        typer.Option(
            "--parts",
            metavar="LIST",
            rich_help_panel=QUESTIONS,
            help="The parts to change, separated by commas: any of selection, recompute, "
            "positions, refinement, layers_tree, W, M, T.",
            show_default="all",
        ),
    ] = "selection,recompute,positions,refinement,layers_tree,W,M,T",
    asked: AskedFar,
    run: PlottedRun,
    settings: Settings,
) -> None:
    """Change one part of HOMER at a time and compare.

    The task is to find pass keys, or needles with --text. The parts are:

    \b
    selection    how tokens are chosen: by the paper (with and without a
                 calibration), by default, with one change, at random
    recompute    none, suffix or all
    positions    kept tokens side by side, or at their own distances
    refinement   what layers keep: by the last layer's choice, by each layer's
                 own scores, at random
    layers_tree  how many layers chunks and merges run
    W, M, T      warm-up layers, length of a chunk, tokens in the cache

    The calibration is that of --calibration, or is measured on the sentences that hide pass keys.

    \b
    Example:
      homer eval ablation --lengths 8x -o runs/ablation
    """
    from ..evaluation import plots
    from ..evaluation.ablation import (
        as_readers,
        calibrate_on_filler,
        choose_parts,
        make_variants,
    )
    from ..evaluation.needles import needles_in
    from ..evaluation.passkey import PASSKEY
    from ..evaluation.questions import Questions, ask, check_lengths
    from ..text.tokens import tokenize

    config = settings.config
    texts = read_texts(text or [])
    with run.open() as opened:
        model, numbers = opened.model, asked.numbers(opened.limit)
        task = PASSKEY
        if texts:
            task = needles_in(list(texts.values()), lambda own: len(tokenize(model, own, "--text")))
        places = parse_depths(asked.depths)
        questions = Questions(task.name, (task,), numbers, asked.seed, places)
        layout = layout_of(opened.tokenizer, not asked.no_chat_template)
        check_lengths(model, questions, layout)
        bias = config.calibration or calibrate_on_filler(model, config.chunk_len(model.config))
        variants = make_variants(model, replace(config, calibration=None), bias, asked.seed)
        readers = as_readers(model, choose_parts(variants, split_list(parts)))
        described = {
            "task": "ablation",
            "methods": list(readers),
            "lengths": sorted(numbers),
            "depths": places,
            "samples": describe_samples(numbers),
            "seed": asked.seed,
            "chat_template": not asked.no_chat_template,
            **describe_texts(texts),
        }
        folder = open_folder(run, opened, settings, described, {"--text": text})
        with progress("ablation", len(questions) * len(readers)) as advance:
            metrics = ask(model, readers, questions, layout, folder, advance)
        folder.finish({**metrics, "task": "ablation"})
        if not folder.is_first:
            return
        if not run.no_plots:
            plots.plot_variants(metrics, opened.limit, folder.path / "variants.png")
        report(folder, metrics, length_table(metrics, opened.limit), run.as_json)
