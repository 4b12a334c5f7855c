"""HomerConfig's settings as options, each in one place: commands that encode take them all."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from .. import HomerConfig

# By HomerConfig's field: the option that gives it. What is left out is left to the library.
SETTINGS: dict[str, Any] = {
    "max_chunk_len": Annotated[
        int | None,
        typer.Option(
            "--max-chunk-len",
            metavar="N",
            help="Most tokens in a chunk, prefix and suffix included.",
            show_default="a quarter of the context limit, 1024 to 8192",
        ),
    ],
    "target_len": Annotated[
        int | None,
        typer.Option(
            "--target-len",
            metavar="N",
            help="Most tokens in the finished cache.",
            show_default="an eighth of a chunk, at least 384, beside prefix and suffix",
        ),
    ],
    "layers_warmup": Annotated[
        int | None,
        typer.Option(
            "--layers-warmup",
            metavar="N",
            help="Layers that chunks run alone, beyond their share, before the first merge.",
            show_default="half of the layers, fewer where the text needs more merges",
        ),
    ],
    "leaf_batch": Annotated[
        int | None,
        typer.Option(
            "--leaf-batch",
            metavar="N",
            help="Chunks that run at once, a power of two: faster on a chip that one does not "
            "fill, for more memory.",
            show_default="1",
        ),
    ],
    "offload": Annotated[
        Literal["cpu"] | None,
        typer.Option(
            "--offload",
            help="Where finished chunks wait: in the computer's memory, so that a GPU's does not "
            "grow with the text.",
            show_default="on the device",
        ),
    ],
    "memory_budget": Annotated[
        str | None,
        typer.Option(
            "--memory-budget",
            metavar="SIZE",
            help="What encoding may take beside the weights, such as 12GiB; --leaf-batch and "
            "--offload are chosen to fit where they are left out.",
            show_default="none",
        ),
    ],
    "cuda_graphs": Annotated[
        bool | None,
        typer.Option(
            "--cuda-graphs",
            help="Replay steps of equal shape from CUDA graphs, for small models.",
            show_default="no",
        ),
    ],
    "calibration": Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="What `homer calibrate` made for this model: corrects the scores for distance.",
            show_default="none",
        ),
    ],
    "selection": Annotated[
        str | None,
        typer.Option(
            "--selection",
            metavar="NAME",
            help="What decides which tokens are kept: votes (the question's attention) or paper, "
            "and changes to rows, logit, heads, layers and window as in votes,window=7.",
            show_default="votes, or paper with --calibration",
        ),
    ],
    "recompute": Annotated[
        Literal["none", "suffix", "all"] | None,
        typer.Option(
            "--recompute",
            help="What is read once more in the end: all that survived, as one ordinary prompt; "
            "the suffix over the merged cache; or none, as in the paper.",
            show_default="all",
        ),
    ],
    "layers_tree": Annotated[
        int | None,
        typer.Option(
            "--layers-tree",
            metavar="N",
            help="Layers that chunks and their merges run, where all survivors are recomputed.",
            show_default="4/5 of the layers",
        ),
    ],
}


def with_settings(
    command: Callable[..., None] | None = None, *, but: tuple[str, ...] = ()
) -> Callable[..., Any]:
    """Give a command the options of `SETTINGS`, `but` for some: its parameter `config` is the
    `HomerConfig` that they make.
    """
    if command is None:
        return partial(with_settings, but=but)
    settings = {name: option for name, option in SETTINGS.items() if name not in but}

    def run(**arguments: Any) -> None:
        given = {name: arguments.pop(_parameter(name)) for name in settings}
        command(**arguments, config=_make_config(given))

    own = inspect.signature(command).parameters.values()
    parameters = []
    for parameter in own:
        if parameter.name == "config":
            parameters += [
                inspect.Parameter(
                    _parameter(name), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint
                )
                for name, hint in settings.items()
            ]
        else:
            hint = parameter.annotation
            if isinstance(hint, str):
                hint = eval(hint, command.__globals__)
            parameters.append(
                parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY)
            )
    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, __name__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def given_options(config: HomerConfig) -> list[str]:
    """The options that were given to make a config, in the order of the help."""
    default = {field.name: field.default for field in fields(config)}
    given = [name for name in SETTINGS if getattr(config, name) != default[name]]
    return [SETTINGS[name].__metadata__[0].default for name in given]


def files_of(config: HomerConfig) -> dict[str, Path | None]:
    """The files that a config was made from, by the options that name them."""
    return {"--calibration": None if config.calibration is None else config.calibration.file}


def _parameter(name: str) -> str:
    """A setting's name among a command's parameters, some of which are called alike."""
    return f"homer_{name}"


def _make_config(given: dict[str, Any]) -> HomerConfig:
    """The settings that the options give, the library's defaults elsewhere.

    Raises as `HomerConfig` and `Calibration.load` do.
    """
    from .. import Calibration, HomerConfig

    settings = {name: value for name, value in given.items() if value is not None}
    if "calibration" in settings:
        settings["calibration"] = Calibration.load(settings["calibration"])
    return HomerConfig(**settings)
