"""The options that commands share, each with its help in one place, those that go together in
groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .inputs import Parts, compose, open_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .. import Llama

ModelPath = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="PATH_OR_ID",
        help="A checkpoint of Llama, Mistral, Qwen2, Qwen3, SmolLM3 or Phi-3: a folder with "
        "config.json and safetensors files, or a Hugging Face hub id.",
    ),
]
RopeScaling = Annotated[
    str | None,
    typer.Option(
        "--rope-scaling",
        metavar="JSON",
        help="RoPE parameters in place of the checkpoint's, for example "
        '\'{"rope_type": "yarn", "factor": 4.0}\'.',
    ),
]

_context_file = typer.Option(
    "--context-file", metavar="FILE", help="The long text, in UTF-8; - reads standard input."
)
ContextFile = Annotated[str, _context_file]
OptionalContextFile = Annotated[str | None, _context_file]
EncodedFile = Annotated[
    Path | None,
    typer.Option(
        "--encoded",
        metavar="FILE",
        help="Go on from what `homer encode` saved, in place of --context-file.",
    ),
]
SpecialTokens = Annotated[
    bool,
    typer.Option(
        "--special-tokens",
        help="Take what spells a control token in the text or the prompt for one, such as the end "
        "of a chat's turn; left out, both are nothing but text.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")
]


Quantized = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        metavar="NAME",
        help="Hold the layers' matrices as int8 (anywhere) or fp8 (on a GPU that multiplies it), "
        "by torchao.",
        show_default="as they are",
    ),
]


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How a model runs."""

    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="NAME",
            help="cuda, cuda:1, cpu, …",
            show_default="cuda where there is a GPU, else cpu",
        ),
    ] = None
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            metavar="NAME",
            help="float32, float16 or bfloat16; auto is the checkpoint's own.",
        ),
    ] = "auto"
    ops: Annotated[
        str,
        typer.Option(
            "--ops",
            metavar="NAME",
            help="triton or torch; auto is Triton on a GPU, PyTorch elsewhere.",
        ),
    ] = "auto"
    quantize: Quantized = None


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Loading):
    """The model of a command that must be given one."""

    model: ModelPath
    rope_scaling: RopeScaling = None

    def open(self) -> tuple[Llama, PreTrainedTokenizerBase]:
        """The model and its tokenizer. Raises as `open_model` does."""
        loading = self.device, self.dtype, self.ops, self.rope_scaling, self.quantize
        return open_model(self.model, *loading)


NoChatTemplate = Annotated[
    bool,
    typer.Option(
        "--no-chat-template",
        help="Give the model the bare text even where its tokenizer has a chat template.",
    ),
]

Thinking = Annotated[
    bool | None,
    typer.Option(
        "--thinking/--no-thinking",
        help="Let the model think before it answers, where its chat template asks (Qwen3's, "
        "SmolLM3's).",
        show_default="the template's own choice",
    ),
]


@dataclass(frozen=True, kw_only=True)
class Around:
    """What stands around a context, and how it is read."""

    prefix: Annotated[
        str | None,
        typer.Option(
            "--prefix",
            metavar="TEXT",
            help="Text before the context, such as instructions; every chunk holds it.",
        ),
    ] = None
    suffix: Annotated[
        str | None,
        typer.Option(
            "--suffix",
            metavar="TEXT",
            help="Text after the context; every chunk ends in it, and what it attends to is kept.",
            show_default="the prompt, or else the context's own end",
        ),
    ] = None
    no_chat_template: NoChatTemplate = False
    thinking: Thinking = None
    special_tokens: SpecialTokens = False

    def compose(
        self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], ask_later: bool
    ) -> Parts:
        """The texts laid out around the context, as `inputs.compose` does it."""
        chat = not self.no_chat_template
        parts = self.prefix, self.suffix, prompts, chat, ask_later
        return compose(tokenizer, *parts, self.special_tokens, self.thinking)
