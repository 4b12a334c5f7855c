"""The options that commands share. Each has its help text here; related options form groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .help import COST, MODEL, OTHER, TEXT
from .inputs import Parts, compose, open_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .. import HomerConfig, Llama

ModelPath = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="PATH_OR_ID",
        help="The checkpoint: a folder with config.json and safetensors files, or a Hugging Face "
        "hub id. Llama, Mistral, Qwen2, Qwen3, SmolLM3 and Phi-3 are supported.",
    ),
]
RopeScaling = Annotated[
    str | None,
    typer.Option(
        "--rope-scaling",
        metavar="JSON",
        rich_help_panel=MODEL,
        help="RoPE parameters that replace the checkpoint's, for example "
        '\'{"rope_type": "yarn", "factor": 4.0}\'.',
    ),
]

_context_file = typer.Option(
    "--context-file",
    metavar="FILE",
    help="The long text, a UTF-8 file. Use - for standard input.",
)
ContextFile = Annotated[str, _context_file]
OptionalContextFile = Annotated[str | None, _context_file]
EncodedFile = Annotated[
    Path | None,
    typer.Option(
        "--encoded",
        metavar="FILE",
        rich_help_panel=TEXT,
        help="A file that `homer encode` saved with this model, instead of --context-file.",
    ),
]
SpecialTokens = Annotated[
    bool,
    typer.Option(
        "--special-tokens",
        rich_help_panel=TEXT,
        help="Read control tokens that the text or the prompt spells out, such as <|im_end|>, as "
        "control tokens. Without this option they are ordinary text.",
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        rich_help_panel=OTHER,
        help="Print one JSON object on stdout, and nothing else there.",
    ),
]


Quantized = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        metavar="NAME",
        rich_help_panel=MODEL,
        help="Store the layers' matrices as int8 (any device) or fp8 (a GPU that multiplies fp8). "
        "Needs torchao.",
        show_default="as in the checkpoint",
    ),
]


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Where and how a model runs."""

    panel = MODEL

    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="NAME",
            help="Where the model runs: cuda, cuda:1, cpu, …",
            show_default="cuda if there is a GPU, else cpu",
        ),
    ] = None
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            metavar="NAME",
            help="The number format: float32, float16, bfloat16, or auto (the checkpoint's).",
        ),
    ] = "auto"
    ops: Annotated[
        str,
        typer.Option(
            "--ops",
            metavar="NAME",
            rich_help_panel=COST,
            help="The kernels: triton, torch, or auto (Triton on a GPU, PyTorch elsewhere).",
        ),
    ] = "auto"
    quantize: Quantized = None


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Loading):
    """The model of a command that requires one."""

    model: ModelPath
    rope_scaling: RopeScaling = None

    def open(self) -> tuple[Llama, PreTrainedTokenizerBase]:
        """The model and its tokenizer. Raises the errors of `open_model`."""
        loading = self.device, self.dtype, self.ops, self.rope_scaling, self.quantize
        return open_model(self.model, *loading)


NoChatTemplate = Annotated[
    bool,
    typer.Option(
        "--no-chat-template",
        rich_help_panel=TEXT,
        help="Give the model the plain text, even if its tokenizer has a chat template.",
    ),
]

Thinking = Annotated[
    bool | None,
    typer.Option(
        "--thinking/--no-thinking",
        rich_help_panel=TEXT,
        help="Whether the model thinks before it answers. Only for models whose chat template has "
        "this switch, such as Qwen3 and SmolLM3.",
        show_default="the template's choice",
    ),
]


@dataclass(frozen=True, kw_only=True)
class Around:
    """The texts around a context, and how they are read."""

    panel = TEXT

    prefix: Annotated[
        str | None,
        typer.Option(
            "--prefix",
            metavar="TEXT",
            help="A text before the context, such as instructions. Every chunk begins with it.",
        ),
    ] = None
    suffix: Annotated[
        str | None,
        typer.Option(
            "--suffix",
            metavar="TEXT",
            help="A text after the context. Every chunk ends with it, and the tokens that it "
            "attends to are kept. A prompt that the text is read for follows it.",
            show_default="only the prompt, or without one the end of the context",
        ),
    ] = None
    no_chat_template: NoChatTemplate = False
    thinking: Thinking = None
    special_tokens: SpecialTokens = False

    def compose(
        self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], ask_later: bool
    ) -> Parts:
        """The texts around the context, as `inputs.compose` lays them out."""
        chat = not self.no_chat_template
        parts = self.prefix, self.suffix, prompts, chat, ask_later
        return compose(tokenizer, *parts, self.special_tokens, self.thinking)


@dataclass(frozen=True, kw_only=True)
class DocumentSettings:
    """How a document is read, and what is read again for a question."""

    panel = COST

    max_chunk_len: Annotated[
        int | None,
        typer.Option(
            "--max-chunk-len",
            metavar="N",
            min=1,
            help="The text is read in chunks: the most tokens in one.",
            show_default="1024, or less where the context limit is short",
        ),
    ] = None
    target_len: Annotated[
        int | None,
        typer.Option(
            "--target-len",
            metavar="N",
            min=1,
            help="The most tokens that are read again for a question, the question included.",
            show_default="384 tokens of text and those of the question, up to the context limit",
        ),
    ] = None

    @property
    def config(self) -> HomerConfig:
        """The settings that were given, with the library's defaults for the others."""
        from .. import HomerConfig

        return HomerConfig(max_chunk_len=self.max_chunk_len, target_len=self.target_len)
