"""HomerConfig's settings as options, each in one place: commands that encode take them all."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from .. import HomerConfig


@dataclass(frozen=True, kw_only=True)
class Settings:
    """By HomerConfig's field, the option that gives it. What is left out is left to the library."""

    max_chunk_len: Annotated[
        int | None,
        typer.Option(
            "--max-chunk-len",
            metavar="N",
            help="Most tokens in a chunk, prefix and suffix included.",
            show_default="a quarter of the context limit, 1024 to 8192",
        ),
    ] = None
    target_len: Annotated[
        int | None,
        typer.Option(
            "--target-len",
            metavar="N",
            help="Most tokens in the finished cache.",
            show_default="an eighth of a chunk, at least 384, beside prefix and suffix",
        ),
    ] = None
    layers_warmup: Annotated[
        int | None,
        typer.Option(
            "--layers-warmup",
            metavar="N",
            help="Layers that chunks run alone, beyond their share, before the first merge.",
            show_default="half of the layers, fewer where the text needs more merges",
        ),
    ] = None
    leaf_batch: Annotated[
        int | None,
        typer.Option(
            "--leaf-batch",
            metavar="N",
            help="Chunks that run at once, a power of two: faster on a chip that one does not "
            "fill, for more memory.",
            show_default="as many as fill the chip, in at most twice the memory",
        ),
    ] = None
    offload: Annotated[
        Literal["cpu"] | None,
        typer.Option(
            "--offload",
            help="Where finished chunks wait: in the computer's memory, so that a GPU's does not "
            "grow with the text.",
            show_default="on the device",
        ),
    ] = None
    memory_budget: Annotated[
        str | None,
        typer.Option(
            "--memory-budget",
            metavar="SIZE",
            help="What encoding may take beside the weights, such as 12GiB; --leaf-batch and "
            "--offload are chosen to fit where they are left out.",
            show_default="none",
        ),
    ] = None
    cuda_graphs: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graphs",
            help="Replay steps of equal shape from CUDA graphs, for small models.",
            show_default="no",
        ),
    ] = None
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="What `homer calibrate` made for this model: corrects the scores for distance.",
            show_default="none",
        ),
    ] = None
    selection: Annotated[
        str | None,
        typer.Option(
            "--selection",
            metavar="NAME",
            help="What decides which tokens are kept: votes (the question's attention) or paper, "
            "and changes to rows, logit, heads, layers and window as in votes,window=7.",
            show_default="votes, or paper with --calibration",
        ),
    ] = None
    recompute: Annotated[
        Literal["none", "suffix", "all"] | None,
        typer.Option(
            "--recompute",
            help="What is read once more in the end: all that survived, as one ordinary prompt; "
            "the suffix over the merged cache; or none, as in the paper.",
            show_default="all",
        ),
    ] = None
    layers_tree: Annotated[
        int | None,
        typer.Option(
            "--layers-tree",
            metavar="N",
            help="Layers that chunks and their merges run, where all survivors are recomputed.",
            show_default="4/5 of the layers",
        ),
    ] = None

    @cached_property
    def config(self) -> HomerConfig:
        """The settings that the options give, the library's defaults elsewhere.

        Raises as `HomerConfig` and `Calibration.load` do.
        """
        from .. import Calibration, HomerConfig

        options = {field.name: getattr(self, field.name) for field in fields(self)}
        given = {name: value for name, value in options.items() if value is not None}
        if self.calibration is not None:
            given["calibration"] = Calibration.load(self.calibration)
        return HomerConfig(**given)

    @property
    def files(self) -> dict[str, Path | None]:
        """The files that are read, by the options that name them."""
        return {"--calibration": self.calibration}
