"""The options that commands share, each with its help in one place."""

from pathlib import Path
from typing import Annotated, Literal

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
        help="Text after the context; every chunk ends in it, and its last token decides what is "
        "kept.",
        show_default="the prompt, or else the context's own end",
    ),
]
MaxChunkLen = Annotated[
    int | None,
    typer.Option(
        "--max-chunk-len",
        metavar="N",
        help="Most tokens in a chunk, prefix and suffix included.",
        show_default="half the context limit, at most 8192",
    ),
]
TargetLen = Annotated[
    int | None,
    typer.Option(
        "--target-len",
        metavar="N",
        help="Most tokens in the finished cache.",
        show_default="as --max-chunk-len",
    ),
]
LayersWarmup = Annotated[
    int | None,
    typer.Option(
        "--layers-warmup",
        metavar="N",
        help="Layers that chunks run alone, beyond their share, before the first merge.",
        show_default="3/8 of the layers, fewer where the text needs more merges",
    ),
]
CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="What `homer calibrate` made for this model: corrects the scores for distance.",
        show_default="none",
    ),
]
SuffixMode = Annotated[
    Literal["merged", "recomputed"] | None,
    typer.Option(
        "--suffix-mode",
        help="merged: answer from the chunks' averaged suffix, as the paper does. recomputed: read "
        "the suffix once more over everything kept, which often answers better.",
        show_default="merged",
    ),
]
Score = Annotated[
    Literal["max_logit", "log_softmax"] | None,
    typer.Option(
        "--score",
        help="What makes a token significant: its largest attention logit (the paper's), or log "
        "probability.",
        show_default="max_logit",
    ),
]
LeafBatch = Annotated[
    int | None,
    typer.Option(
        "--leaf-batch",
        metavar="N",
        help="Chunks that run at once, a power of two: faster on a chip that one does not fill, "
        "for more memory.",
        show_default="1",
    ),
]
Offload = Annotated[
    Literal["cpu"] | None,
    typer.Option(
        "--offload",
        help="Where finished chunks wait: in the computer's memory, so that a GPU's does not grow "
        "with the text.",
        show_default="on the device",
    ),
]
MemoryBudget = Annotated[
    str | None,
    typer.Option(
        "--memory-budget",
        metavar="SIZE",
        help="What encoding may take beside the weights, such as 12GiB; --leaf-batch and --offload "
        "are chosen to fit where they are left out.",
        show_default="none",
    ),
]
CudaGraphs = Annotated[
    bool,
    typer.Option(
        "--cuda-graphs", help="Replay steps of equal shape from CUDA graphs, for small models."
    ),
]
NoChatTemplate = Annotated[
    bool,
    typer.Option(
        "--no-chat-template",
        help="Give the model the bare text even where its tokenizer has a chat template.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")
]
