"""The options of all commands that generate answers: sampling, length and end of an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from ..checks import SEEDS
from .help import ANSWER

if TYPE_CHECKING:
    from ..decoding import Decoding


@dataclass(frozen=True, kw_only=True)
class Answers:
    """How the tokens of an answer are chosen, and when it ends."""

    panel = ANSWER

    max_new_tokens: Annotated[
        int,
        typer.Option("--max-new-tokens", metavar="N", min=1, help="The most tokens in an answer."),
    ] = 256
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature",
            metavar="X",
            min=0.0,
            help="0 always takes the likeliest token. Above 0, tokens are sampled.",
        ),
    ] = 0.0
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k",
            metavar="N",
            min=1,
            help="Sample only from the N likeliest tokens.",
            show_default="all tokens",
        ),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            metavar="X",
            min=0.0,
            max=1.0,
            help="Sample only from the smallest set of tokens with this total probability, above 0 "
            "and at most 1.",
            show_default="all tokens",
        ),
    ] = None
    repetition_penalty: Annotated[
        float,
        typer.Option(
            "--repetition-penalty",
            metavar="X",
            help="Above 1, tokens that the answer already has become less likely, and so do those "
            "of a prompt that is asked after the reading. The text itself does not count.",
        ),
    ] = 1.0
    stop: Annotated[
        list[str] | None,
        typer.Option(
            "--stop",
            metavar="TEXT",
            help="End the answer after this text. Repeat the option for several.",
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
            help="The seed of the sampling, for repeatable answers.",
            show_default="none",
        ),
    ] = None

    @property
    def decoding(self) -> Decoding:
        """The settings. Raises `ValueError` if they contradict each other."""
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
