"""How answers are chosen: the options of every command that gives some."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from ..checks import SEEDS

if TYPE_CHECKING:
    from ..decoding import Decoding


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What an answer may be, and when it ends."""

    max_new_tokens: Annotated[
        int,
        typer.Option("--max-new-tokens", metavar="N", min=1, help="Most tokens in an answer."),
    ] = 256
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature",
            metavar="X",
            min=0.0,
            help="0 takes the likeliest token each time; above 0 samples.",
        ),
    ] = 0.0
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k",
            metavar="N",
            min=1,
            help="Sample from the N likeliest tokens only.",
            show_default="all",
        ),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            metavar="X",
            min=0.0,
            max=1.0,
            help="Sample from the smallest set with this probability.",
            show_default="all",
        ),
    ] = None
    repetition_penalty: Annotated[
        float,
        typer.Option(
            "--repetition-penalty",
            metavar="X",
            help="Above 1, tokens that prompt and answer hold already become less likely.",
        ),
    ] = 1.0
    stop: Annotated[
        list[str] | None,
        typer.Option(
            "--stop",
            metavar="TEXT",
            help="End the answer with this text; give it again for more.",
            show_default="none",
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            metavar="N",
            min=SEEDS[0],
            max=SEEDS[1],
            help="Makes sampling repeatable.",
            show_default="none",
        ),
    ] = None

    @property
    def decoding(self) -> Decoding:
        """The settings. Raises `ValueError` where they do not fit together."""
        from ..decoding import Decoding

        return Decoding(
            self.max_new_tokens,
            self.temperature,
            self.top_k,
            self.top_p,
            repetition_penalty=self.repetition_penalty,
            stop_strings=tuple(self.stop or ()),
            seed=self.seed,
        )
