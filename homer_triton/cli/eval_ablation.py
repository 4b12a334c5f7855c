"""`homer eval ablation`: what each part of the method brings."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from .eval_options import (
    Depths,
    Lengths,
    NoPlots,
    OptionalModelPath,
    OutputFolder,
    Samples,
    Seed,
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
    from .. import HomerConfig


@with_settings
def ablation(
    output: OutputFolder,
    model: OptionalModelPath = None,
    lengths: Lengths = "4x,8x",
    depths: Depths = "0.1,0.3,0.5,0.7,0.9",
    samples: Samples = "4",
    seed: Seed = 0,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Look for magic numbers in this document in UTF-8, or in several of them, in "
            "place of keys in repeated sentences.",
        ),
    ] = None,
    parts: Annotated[
        str,
        typer.Option(
            "--parts",
            metavar="LIST",
            help="Any of selection, recompute, refinement, layers_tree, W, M, T.",
            show_default="all",
        ),
    ] = "selection,recompute,refinement,layers_tree,W,M,T",
    no_chat_template: NoChatTemplate = False,
    device: Device = None,
    dtype: Dtype = "auto",
    ops: Ops = "auto",
    no_plots: NoPlots = False,
    as_json: Json = False,
    *,
    config: HomerConfig,
) -> None:
    """Change one part of the method at a time, on pass keys or needles.

    selection: the paper's (calibrated by --calibration, or on the pass keys' own sentences), ours,
    ours with one thing changed, random. recompute: none, suffix, all. refinement: propagative, by
    each layer's own scores, random. layers_tree; W, the warm-up layers; M, the chunk's length; T,
    the target's.

    Example: homer eval ablation --lengths 8x -o runs/ablation
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

    want_plots(no_plots)
    texts = read_texts(text or [])
    llama, tokenizer, checkpoint = open_checkpoint(model, device, dtype, ops)
    limit = llama.config.max_position_embeddings
    tokens, places = parse_lengths(lengths, limit), parse_depths(depths)
    numbers = parse_samples(samples, tokens, limit)
    task = PASSKEY
    if texts:
        task = needles_in(list(texts.values()), lambda own: len(tokenize(llama, own, "--text")))
    questions = Questions(task.name, (task,), numbers, seed, places)
    layout = layout_of(tokenizer, not no_chat_template)
    check_lengths(llama, questions, layout)
    bias = config.calibration or calibrate_on_filler(llama, config.chunk_len(llama.config))
    variants = make_variants(llama, replace(config, calibration=None), bias, seed)
    variants = choose_parts(variants, split_list(parts))
    readers = as_readers(llama, variants)
    settings = {
        "task": "ablation",
        "methods": list(readers),
        "lengths": tokens,
        "depths": places,
        "samples": describe_samples(numbers),
        "seed": seed,
        "chat_template": not no_chat_template,
        **describe_texts(texts),
    }
    folder = open_folder(output, llama, checkpoint, config, settings, {"--text": text})
    with progress("ablation", len(questions) * len(readers)) as advance:
        metrics = ask(llama, readers, questions, layout, folder, advance)
    folder.finish({**metrics, "task": "ablation"})
    if not no_plots:
        plots.plot_variants(metrics, limit, folder.path / "variants.png")
    report(folder, metrics, length_table(metrics, limit), as_json)
