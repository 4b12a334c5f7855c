"""HomerConfig's settings as options, for all commands that encode."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .help import COST, SETTINGS

if TYPE_CHECKING:
    from .. import HomerConfig


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One option for each field of HomerConfig. For an option left out, the library decides."""

    panel = SETTINGS

    max_chunk_len: Annotated[
        int | None,
        typer.Option(
            "--max-chunk-len",
            metavar="N",
            help="The text is read in chunks: the most tokens in one, prefix and suffix included.",
            show_default="a quarter of the context limit, from 1024 (or half of a shorter limit) "
            "to 8192",
        ),
    ] = None
    target_len: Annotated[
        int | None,
        typer.Option(
            "--target-len",
            metavar="N",
            help="The most tokens in the finished cache, prefix and suffix included.",
            show_default="an eighth of a chunk (at least 384) plus prefix and suffix, up to a "
            "chunk; a whole chunk without --recompute all",
        ),
    ] = None
    layers_warmup: Annotated[
        int | None,
        typer.Option(
            "--layers-warmup",
            metavar="N",
            help="Warm-up layers: extra layers that every chunk runs alone before the first merge.",
            show_default="half of the layers, fewer if the text needs many merges",
        ),
    ] = None
    leaf_batch: Annotated[
        int | None,
        typer.Option(
            "--leaf-batch",
            metavar="N",
            rich_help_panel=COST,
            help="How many chunks run at once, a power of two. More are faster if one chunk does "
            "not keep the chip busy, and take more memory.",
            show_default="as many as keep the chip busy, in at most twice the memory of one (or "
            "256 MiB)",
        ),
    ] = None
    offload: Annotated[
        Literal["cpu"] | None,
        typer.Option(
            "--offload",
            metavar="cpu",
            rich_help_panel=COST,
            help="Keep finished chunks in host memory, so that GPU memory does not grow with the "
            "text.",
            show_default="they stay on the device",
        ),
    ] = None
    memory_budget: Annotated[
        str | None,
        typer.Option(
            "--memory-budget",
            metavar="SIZE",
            rich_help_panel=COST,
            help="The most memory for reading the text, beside the weights, such as 12GiB. "
            "--leaf-batch and --offload are chosen to fit, unless you set them.",
            show_default="no limit",
        ),
    ] = None
    cuda_graphs: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graphs",
            rich_help_panel=COST,
            help="Replay steps of equal shape from CUDA graphs. Helps small models on a GPU.",
            show_default="off",
        ),
    ] = None
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="A file that `homer calibrate` made for this model. It corrects the scores of "
            "--selection paper for distance.",
            show_default="none",
        ),
    ] = None
    selection: Annotated[
        str | None,
        typer.Option(
            "--selection",
            metavar="NAME",
            help="What decides which tokens are kept. votes: the attention of the suffix, by the "
            "model's retrieval heads, which look up what a question repeats. paper: the attention "
            "of its last token, as published. Change a part (rows, logit, heads, layers, window) "
            "as in votes,window=7.",
            show_default="votes, or paper with --calibration",
        ),
    ] = None
    recompute: Annotated[
        Literal["none", "suffix", "all"] | None,
        typer.Option(
            "--recompute",
            metavar="none|suffix|all",
            help="What the model reads once more after the merging. all: the kept tokens, as one "
            "ordinary prompt. suffix: the suffix, over the merged cache. none: nothing, as in the "
            "paper.",
            show_default="all",
        ),
    ] = None
    layers_tree: Annotated[
        int | None,
        typer.Option(
            "--layers-tree",
            metavar="N",
            help="How many of the model's layers chunks and merges run. Fewer than all need "
            "--recompute all.",
            show_default="4/5 of the layers with --recompute all, else all",
        ),
    ] = None

    @cached_property
    def config(self) -> HomerConfig:
        """The settings that were given, with the library's defaults for the others.

        Raises the errors of `HomerConfig` and `Calibration.load`.
        """
        from .. import Calibration, HomerConfig

        options = {field.name: getattr(self, field.name) for field in fields(self)}
        given = {name: value for name, value in options.items() if value is not None}
        if self.calibration is not None:
            given["calibration"] = Calibration.load(self.calibration)
        return HomerConfig(**given)

    @property
    def files(self) -> dict[str, Path | None]:
        """The files to read, by the option that names them."""
        return {"--calibration": self.calibration}
