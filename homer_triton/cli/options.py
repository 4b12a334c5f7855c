"""The options that commands share, each with its help in one place."""

from pathlib import Path
from typing import Annotated

import typer

ModelPath = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="PATH_OR_ID",
        help="A Llama checkpoint: a folder with config.json and safetensors files, or a Hugging "
        "Face hub id.",
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
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="cuda, cuda:1, cpu, …",
        show_default="cuda where there is a GPU, else cpu",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="NAME",
        help="float32, float16 or bfloat16; auto is the checkpoint's own.",
    ),
]
Ops = Annotated[
    str,
    typer.Option(
        "--ops", metavar="NAME", help="triton or torch; auto is Triton on a GPU, PyTorch elsewhere."
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
Prefix = Annotated[
    str | None,
    typer.Option(
        "--prefix",
        metavar="TEXT",
        help="Text before the context, such as instructions; every chunk holds it.",
    ),
]
Suffix = Annotated[
    str | None,
    typer.Option(
        "--suffix",
        metavar="TEXT",
        help="Text after the context; every chunk ends in it, and what it attends to is kept.",
        show_default="the prompt, or else the context's own end",
    ),
]
NoChatTemplate = Annotated[
    bool,
    typer.Option(
        "--no-chat-template",
        help="Give the model the bare text even where its tokenizer has a chat template.",
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
