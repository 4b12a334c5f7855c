"""The options that the evaluations share, and how their values are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..checks import MOST, SEEDS
from .help import OTHER, QUESTIONS
from .inputs import open_model, read_text
from .options import Json, Loading, NoChatTemplate
from .ranks import Devices, begin, joined

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .. import HomerConfig, Llama
    from ..ranks import Ranks

Methods = Annotated[
    str,
    typer.Option(
        "--methods",
        metavar="LIST",
        help="The methods to compare, separated by commas. plain: the whole text at once. pi, ntk, "
        "yarn: the same with rescaled RoPE. window: the last tokens that fit the context limit. "
        "retrieval: the passages that BM25 finds for the question (needs bm25s). independent: "
        "chunks without merging. sequential: chunk after chunk, keeping what the question attends "
        "to. homer: HOMER. read: a document that is read before the question, as by `homer read`. "
        "appended: HOMER on a text that arrives in four parts. homer+pi, homer+ntk, homer+yarn: "
        "HOMER with rescaled RoPE and longer chunks.",
    ),
]
Texts = Annotated[
    list[str],
    typer.Option(
        "--text",
        metavar="FILE",
        help="A document, a UTF-8 file. Repeat the option for more documents.",
    ),
]

Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        metavar="N",
        min=SEEDS[0],
        max=SEEDS[1],
        rich_help_panel=QUESTIONS,
        help="The seed of everything random.",
    ),
]
Lengths = Annotated[
    str,
    typer.Option(
        "--lengths",
        metavar="LIST",
        help="The lengths of the texts, separated by commas: numbers of tokens, or multiples of "
        "the context limit, as in 4x.",
    ),
]

DEFAULT_METHODS = "plain,pi,ntk,yarn,window,independent,homer"


@dataclass(frozen=True, kw_only=True)
class Run(Loading):
    """The folder of a run, and the model to evaluate."""

    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="The folder for the results: config.json, predictions.jsonl, metrics.json and any "
            "plots. A stopped run continues there.",
        ),
    ]
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="PATH_OR_ID",
            help="The checkpoint: a folder or a Hugging Face hub id.",
            show_default="the small model that ships with homer_triton",
        ),
    ] = None
    devices: Devices = 1
    as_json: Json = False

    @contextmanager
    def open(self) -> Iterator[Opened]:
        """The model, on each process that shares the run. Raises the errors of `open_model`."""
        from ..demo import CHECKPOINT

        begin(self.devices)
        checkpoint = self.model or str(CHECKPOINT)
        with joined(self.device) as ranks:
            loading = self.device, self.dtype, self.ops, None, self.quantize
            opened = open_model(checkpoint, *loading)
            yield Opened(*opened, checkpoint, ranks)


@dataclass(frozen=True, kw_only=True)
class PlottedRun(Run):
    """A run that draws plots."""

    no_plots: Annotated[
        bool,
        typer.Option(
            "--no-plots", rich_help_panel=OTHER, help="Do not draw plots. They need matplotlib."
        ),
    ] = False

    def __post_init__(self) -> None:
        """Raise `ValueError` if plots are wanted and matplotlib is missing."""
        if not self.no_plots:
            from ..evaluation.plots import require_matplotlib

            require_matplotlib()


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How many questions are asked, and about how long a text."""

    panel = QUESTIONS

    lengths: Lengths = "1x,4x,8x,16x"
    samples: Annotated[
        str,
        typer.Option(
            "--samples",
            metavar="N",
            help="How many questions to ask at each length, for each depth or task: one number, or "
            "one for each length, as in 4x:12,8x:6.",
        ),
    ] = "4"
    seed: Seed = 0
    no_chat_template: NoChatTemplate = False

    def numbers(self, limit: int) -> dict[int, int]:
        """The number of questions at each length, in tokens. limit: the model's context limit."""
        return parse_samples(self.samples, parse_lengths(self.lengths, limit), limit)


@dataclass(frozen=True, kw_only=True)
class AskedAtDepths(Asked):
    """The same, for tasks that hide something at a depth of the text."""

    depths: Annotated[
        str,
        typer.Option(
            "--depths",
            metavar="LIST",
            help="Where the key is hidden, separated by commas, from 0 (the beginning) to 1 (the "
            "end).",
        ),
    ] = "0.1,0.3,0.5,0.7,0.9"


@dataclass(frozen=True)
class Opened:
    """A model, its tokenizer and its checkpoint; ranks: None for a process that is alone."""

    model: Llama
    tokenizer: PreTrainedTokenizerBase
    checkpoint: str
    ranks: Ranks | None = None

    @property
    def limit(self) -> int:
        """The context limit, in tokens."""
        return self.model.config.context_limit


def split_list(text: str) -> tuple[str, ...]:
    """The entries of a list separated by commas."""
    return tuple(entry.strip() for entry in text.split(",") if entry.strip())


def parse_length(text: str, limit: int) -> int:
    """A length in tokens, rounded down, from a number or a multiple of the context limit, as in 4x.

    Raises `ValueError` for anything else, for less than one token, and for more than any text has.
    """
    number, times = (text[:-1], limit) if text[-1:] in ("x", "×") else (text, 1)
    try:
        # Decimal does not write out a large exponent.
        tokens = (Fraction if "/" in number else Decimal)(number) * times
        fits = 1 <= tokens <= MOST
    except (ValueError, ArithmeticError):
        raise ValueError(
            f"The length {text!r} is neither a number of tokens nor one such as 4x."
        ) from None
    if not fits:
        bound = "at least one token" if tokens < 1 else f"at most {MOST:,} tokens"
        raise ValueError(f"The length {text!r} must be {bound}.")
    return int(tokens)


def parse_lengths(text: str, limit: int) -> tuple[int, ...]:
    """Lengths in tokens, ascending. Raises `ValueError` for none, and as `parse_length` does."""
    lengths = tuple(sorted({parse_length(entry, limit) for entry in split_list(text)}))
    if not lengths:
        raise ValueError("--lengths is empty; give at least one, such as 4x.")
    return lengths


def parse_samples(text: str, lengths: tuple[int, ...], limit: int) -> dict[int, int]:
    """The number of questions at each of the lengths, in tokens.

    Raises `ValueError` for anything but one number or one number for each length, and for less than
    one question.
    """
    if ":" not in text:
        return dict.fromkeys(lengths, _parse_number(text.strip(), text))
    samples: dict[int, int] = {}
    for entry in split_list(text):
        length, _, number = entry.partition(":")
        tokens = parse_length(length, limit)
        if tokens not in lengths or tokens in samples:
            raise ValueError(
                f"--samples {text!r} must name each of --lengths once, which {length} is not."
            )
        samples[tokens] = _parse_number(number.strip(), text)
    for tokens in lengths:
        if tokens not in samples:
            raise ValueError(f"--samples {text!r} has no number for {tokens:,} tokens.")
    return samples


def _parse_number(entry: str, text: str) -> int:
    if not entry.isdecimal() or len(entry) > 9 or int(entry) < 1:
        raise ValueError(
            f"--samples {text!r} must be a number from 1 on, or one for each length as in "
            "4x:12,8x:6."
        )
    return int(entry)


def describe_samples(samples: Mapping[int, int]) -> int | dict[str, int]:
    """The numbers as plain values: a single one if all are equal."""
    numbers = set(samples.values())
    return numbers.pop() if len(numbers) == 1 else {str(n): m for n, m in samples.items()}


def parse_depths(text: str) -> tuple[float, ...]:
    """Depths, ascending. Raises `ValueError` unless there are some, all from 0 to 1."""
    try:
        depths = tuple(sorted({float(entry) for entry in split_list(text)}))
    except ValueError:
        raise ValueError(f"--depths {text!r} must be numbers from 0 to 1.") from None
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"--depths {text!r} must be numbers from 0 to 1.")
    return depths


def describe_config(config: HomerConfig) -> dict[str, Any]:
    """HOMER's settings as plain values, with a digest of the calibration."""
    bias = None if config.calibration is None else config.calibration.bias
    return {
        "max_chunk_len": config.max_chunk_len,
        "target_len": config.target_len,
        "layers_warmup": config.layers_warmup,
        "selection": str(config.selected_by),
        "recompute": config.recompute,
        "layers_tree": config.layers_tree,
        "calibration": None if bias is None else digest([bias.contiguous().numpy().tobytes()]),
    }


def read_texts(files: Sequence[str]) -> dict[str, str]:
    """The texts by the names of their files. Raises the errors of `read_text`."""
    return {file: read_text(file) for file in files}


def describe_texts(texts: Mapping[str, str]) -> dict[str, Any]:
    """The names of texts, and a digest of their contents."""
    contents = (content.encode() for content in texts.values())
    return {"texts": list(texts), "texts_digest": digest(contents)}


def digest(contents: Iterable[bytes]) -> str:
    """A short digest that differs for different contents."""
    total = hashlib.sha256()
    for content in contents:
        total.update(hashlib.sha256(content).digest())
    return total.hexdigest()[:16]
