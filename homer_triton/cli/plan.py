"""`homer plan`: an input's merge tree, and what it and a reading cost, without running them."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .groups import with_groups
from .help import COST, MODEL, TEXT
from .inputs import note_long_chunks, parse_rope_scaling, read_text
from .options import (
    Json,
    ModelPath,
    OptionalContextFile,
    Quantized,
    RopeScaling,
    SpecialTokens,
)
from .output import print_json, readable_bytes, readable_flops, table
from .settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

    from .. import ModelConfig, Plan


@with_groups
def plan(
    *,
    model: ModelPath,
    context_len: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="The tokens of the context.",
            show_default="those of --context-file",
        ),
    ] = None,
    context_file: OptionalContextFile = None,
    prefix_len: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, rich_help_panel=TEXT, help="The tokens before the context."
        ),
    ] = 1,
    suffix_len: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            rich_help_panel=TEXT,
            help="The tokens after the context, the question included.",
        ),
    ] = 32,
    special_tokens: SpecialTokens = False,
    rope_scaling: RopeScaling = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            metavar="NAME",
            rich_help_panel=MODEL,
            help="The number format of keys and values: float32, float16, bfloat16, or auto (the "
            "checkpoint's).",
        ),
    ] = "auto",
    quantize: Quantized = None,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="NAME",
            help="The kind of device whose memory to compute: cuda or cpu. It need not be here.",
        ),
    ] = "cuda",
    devices: Annotated[
        int,
        typer.Option(
            "--devices",
            metavar="N",
            min=1,
            rich_help_panel=COST,
            help="Also show the share of each of N devices.",
        ),
    ] = 1,
    as_json: Json = False,
    settings: Settings,
) -> None:
    """Show the merge tree of an input, and its memory and operations.

    The last lines are about `homer read`, which reads the same text once for any question.

    Give the length of the text, or the text itself. The model does not run: only its config.json is
    read, and to count a text its tokenizer.

    \b
    Example:
      homer plan --model HuggingFaceTB/SmolLM2-1.7B-Instruct --context-len 131072
    """
    from .. import plan as lay_out
    from ..engine.reading import plan_reading
    from ..engine.shares import Shares
    from ..loading import DTYPES
    from ..model.config import load_config
    from ..model.hub import resolve
    from ..model.quantized import unpacks_as

    config = settings.config
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; choose auto, {', '.join(DTYPES)}.")
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device={device!r} is not known; choose cuda or cpu.")
    on_gpu = device == "cuda"
    folder = resolve(model, weights=False)
    unpacks = unpacks_as(quantize)
    shape = replace(load_config(folder, parse_rope_scaling(rope_scaling)), unpacks=unpacks)
    tokens = _context_tokens(context_len, context_file, folder, special_tokens)
    itemsize = DTYPES.get(dtype, shape.dtype).itemsize
    note_long_chunks(config, shape)
    tree = lay_out(
        shape, tokens, prefix_len, suffix_len, config, itemsize, on_gpu=on_gpu, ranks=devices
    )
    described = _describe(tree, shape, itemsize, on_gpu)
    described["reading"] = asdict(plan_reading(shape, tokens, config, itemsize, on_gpu))
    if devices > 1:
        shares = Shares(tree, devices).costs(shape, itemsize, on_gpu=on_gpu)
        described["devices"] = [asdict(share) for share in shares]
    if as_json:
        print_json(described)
    else:
        print(_in_words(tree, described))


_AFTER_THE_TREE = {
    "none": "its cache is the result",
    "suffix": "the suffix reads its cache once more",
    "all": "the kept tokens are read once more",
}


def _context_tokens(
    length: int | None, file: str | None, folder: Path, special_tokens: bool
) -> int:
    """The given length, or the length of a file by the tokenizer of the checkpoint in `folder`.

    Raises `ValueError` unless exactly one is given, and for a file if there is no tokenizer.
    """
    if length is not None and file is None:
        return length
    if length is not None or file is None:
        raise ValueError("Give a length with --context-len, or a text with --context-file.")
    from ..loading import load_tokenizer
    from ..text.controls import affix_ids, plain_ids

    text = read_text(file)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer; give --context-len instead of the text.")
    return len(affix_ids(tokenizer, text) if special_tokens else plain_ids(tokenizer, text))


def _describe(tree: Plan, shape: ModelConfig, itemsize: int, on_gpu: bool) -> dict[str, Any]:
    """The plan as plain values: lengths in tokens, memory in bytes above the weights."""
    affix = tree.prefix_len + tree.suffix_len
    flops, prefill_flops = tree.flops(shape), tree.prefill_flops(shape)
    memory = tree.memory(shape, itemsize, on_gpu=on_gpu)
    prefill_memory = tree.prefill_memory(shape, itemsize)
    return {
        **tree.to_dict(),
        "leaf_context": tree.leaf_context,
        "rows": tree.rows,
        "next_position": tree.next_position,
        "peak_slots": tree.peak_slots,
        "levels": [
            {
                "height": level.height,
                "nodes": len(level.nodes),
                "first_layer": level.first_layer,
                "last_layer": level.last_layer,
                "rows_in": sorted({affix + node.context for node in level.nodes}),
                "rows_kept": sorted({affix + node.kept for node in level.nodes}),
            }
            for level in tree.levels
        ],
        "flops": flops,
        "prefill_flops": prefill_flops,
        "flops_ratio": flops / prefill_flops,
        "memory_bytes": memory,
        "prefill_memory_bytes": prefill_memory,
        "memory_ratio": memory / prefill_memory,
    }


def _in_words(tree: Plan, described: dict[str, Any]) -> str:
    """The plan as a summary and two tables."""
    tokens = tree.prefix_len + tree.context_len + tree.suffix_len
    levels = [
        [
            str(level["height"]),
            f"{level['nodes']:,}",
            f"{level['first_layer']} to {level['last_layer'] - 1}",
            _span(level["rows_in"]),
            _span(level["rows_kept"]),
        ]
        for level in described["levels"]
    ]
    costs = [
        [
            "memory above the weights",
            readable_bytes(described["memory_bytes"]),
            readable_bytes(described["prefill_memory_bytes"]),
            f"{described['memory_ratio']:.1%}",
        ],
        [
            "operations",
            readable_flops(described["flops"]),
            readable_flops(described["prefill_flops"]),
            f"{described['flops_ratio']:.1%}",
        ],
        ["tokens in the cache", f"{tree.rows:,}", f"{tokens:,}", f"{tree.rows / tokens:.1%}"],
    ]
    at_once = "1 chunk runs" if tree.leaf_batch == 1 else f"{tree.leaf_batch} chunks run"
    lengths = (
        f"{tokens:,} tokens: prefix {tree.prefix_len:,}, context {tree.context_len:,}, suffix "
        f"{tree.suffix_len:,}\n"
        f"at most {tree.max_chunk_len:,} tokens in a chunk and {tree.target_len:,} in the finished "
        f"cache; {tree.layers_warmup} warm-up layers\n"
        f"new tokens start at position {tree.next_position:,}; at most {tree.peak_slots:,} tokens "
        "are held at once\n"
        f"{at_once} at once; finished chunks wait "
        + ("in host memory" if tree.offload else "on the device")
        + "\n"
        f"the tree runs {tree.layers_tree} of {tree.num_layers} layers, then "
        + _AFTER_THE_TREE[tree.recompute]
    )
    parts = [
        lengths,
        table(["height", "chunks", "layers", "tokens in", "tokens kept"], levels),
        table(["", "HOMER", "plain prefill", "ratio"], costs),
    ]
    if "devices" in described:
        shares = [
            [
                str(rank),
                f"{share['leaves']:,}",
                readable_flops(share["flops"]),
                f"{share['time_share']:.1%}",
                readable_bytes(share["sent"]),
                readable_bytes(share["memory"]),
            ]
            for rank, share in enumerate(described["devices"])
        ]
        headings = ["device", "chunks", "operations", "share of work", "sent", "memory"]
        parts.append(table(headings, shares))
    reading = described["reading"]
    ratio = reading["flops"] / described["prefill_flops"]
    parts.append(
        f"Read once, for any question (homer read): {reading['chunks']:,} chunks of at most "
        f"{reading['rows']:,} tokens\n"
        f"at most {readable_flops(reading['flops'])} ({ratio:.1%} of a plain prefill), "
        f"{readable_bytes(reading['memory'])} above the weights, and "
        f"{readable_bytes(reading['kept'])} kept"
    )
    return "\n\n".join(parts)


def _span(counts: list[int]) -> str:
    """For example [97, 128] -> "97 to 128"."""
    low, high = counts[0], counts[-1]
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
