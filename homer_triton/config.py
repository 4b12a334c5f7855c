"""The settings of an encoding (`HomerConfig`), and the merge tree that they give (`plan`)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

from .calibration import Calibration
from .checks import whole_number
from .engine.leaves import most_memory, with_leaves_at_once
from .engine.tree import (
    Plan,
    Recompute,
    build_plan,
    default_chunk_len,
    default_target_len,
    tree_height,
)
from .model.config import ModelConfig
from .model.llama import Llama
from .selection import PAPER, VOTES, Selection


@dataclass(frozen=True)
class HomerConfig:
    """Settings for `encode`. What is left at None gets a default that fits the model.

    The input is `prefix ‖ context ‖ suffix`. The prefix is its start (a chat template's opening, or
    what the tokenizer puts before a text), the suffix its end (usually the question). The context
    between them is cut into chunks, the leaves of a binary tree. Every chunk holds the prefix, its
    part of the context, and the suffix. At each level of the tree, chunks run through some of the
    model's layers, lose the context tokens that matter least, and are merged in pairs.

        config = ht.HomerConfig(max_chunk_len=2048, memory_budget="12GiB")
        encoded = ht.encode(model, text, suffix="What is the pass key?", config=config)

    Attributes:
        max_chunk_len: The most tokens in a chunk, prefix and suffix included. Default: a quarter of
            the model's context limit, but at least 1024 (or half of the limit where that is less)
            and at most 8192. Beyond the limit, the model meets positions that it was not trained
            on.
        target_len: The most tokens in the finished cache, prefix and suffix included. Default with
            `recompute="all"`: prefix and suffix plus an eighth of a chunk (at least 384 tokens),
            but never more than a chunk. Default otherwise: a chunk. With `recompute="all"`, an
            input of at most so many tokens is read whole, even if it is longer than a chunk.
        layers_warmup: Warm-up layers: layers that the leaves run alone before the first merge, on
            top of the equal share of layers that each level runs. Default: half of the model's
            layers (3/8 where the tree runs all layers), or fewer where the tree has many levels.
        calibration: Corrects the paper's score for distance (see `calibrate`). It goes with the
            paper's selection only.
        selection: How a prune chooses the tokens it keeps: a `Selection`, or a text that names one,
            such as "paper" or "votes,window=7". Default: "votes", the attention that the suffix's
            tokens pay to each context token in the model's retrieval heads (the heads that look up
            what a question repeats); "paper" if there is a calibration.
        recompute: What the model reads once more at the end. "all" (default): everything that
            survived, as one ordinary prompt; the tree then only chooses the tokens. "suffix": the
            suffix, over the tree's cache, so that the question attends directly to all that was
            kept. "none": nothing, as in the paper; the logits then come from the suffix as averaged
            over the chunks. An input that fits `target_len` in one chunk is read only once in any
            case.
        layers_tree: How many of the model's layers the tree runs. Default with `recompute="all"`:
            four fifths, because the last layers choose tokens badly (more if the tree's levels need
            them). Default otherwise: all, which "suffix" and "none" require.
        leaf_batch: How many leaves run at once, a power of two. Default: as many as keep the device
            busy, in at most twice the memory of one at a time (or 256 MiB, if that is more).
        offload: "cpu" lets finished chunks wait in host memory, so that the peak of a GPU's memory
            hardly grows with the input. Default: they wait on the device.
        memory_budget: How much memory encoding may take beside the weights, in bytes or as a text
            such as "12GiB". `plan` then chooses `leaf_batch` and, on a GPU, `offload` to fit,
            unless you set them. Default: no budget.
        cuda_graphs: Replay the steps of a level from CUDA graphs, which helps small models. Needs a
            model on a CUDA device. `Graphs` keeps them for later inputs. Default: False.

    `leaf_batch`, `offload`, `memory_budget` and `cuda_graphs` change speed and memory only. The
    results are the same up to rounding.

    Raises:
        ValueError: A value is of the wrong kind or out of range, or a calibration is given with
            another selection than the paper's.
    """

    max_chunk_len: int | None = None
    target_len: int | None = None
    layers_warmup: int | None = None
    calibration: Calibration | None = None
    selection: Selection | str | None = None
    recompute: Recompute | None = None
    layers_tree: int | None = None
    leaf_batch: int | None = None
    offload: Literal["cpu"] | None = None
    memory_budget: int | str | None = None
    cuda_graphs: bool = False

    @classmethod
    def paper(cls, **settings: Any) -> HomerConfig:
        """The method as published: the paper's selection, and nothing read once more.

        settings: any other settings of `HomerConfig`, such as `calibration`. They win over these
        two.
        """
        return cls(**{"selection": PAPER, "recompute": "none", **settings})

    def __post_init__(self) -> None:
        for name, least in (
            ("max_chunk_len", 1),
            ("target_len", 1),
            ("layers_warmup", 0),
            ("layers_tree", 1),
            ("leaf_batch", 1),
        ):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, whole_number(name, value, least))
        if not isinstance(self.calibration, Calibration | None):
            raise ValueError(
                f"calibration is a {type(self.calibration).__name__}; make one with "
                "Calibration(tensor), Calibration.load(file) or calibrate."
            )
        if isinstance(self.selection, str):
            object.__setattr__(self, "selection", Selection.parse(self.selection))
        if not isinstance(self.selection, Selection | None):
            raise ValueError(
                f"selection is a {type(self.selection).__name__}; give a Selection or a text such "
                "as 'votes,window=7'."
            )
        if self.calibration is not None and not self.selected_by.is_paper:
            raise ValueError(
                "A calibration corrects the paper's selection alone; leave it out or set "
                'selection="paper".'
            )
        choices = {"recompute": (None, *get_args(Recompute)), "offload": (None, "cpu")}
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                known = ", ".join(str(choice) for choice in allowed)
                raise ValueError(f"{name}={value!r} is not known; choose one of {known}.")
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget)

    @property
    def selected_by(self) -> Selection:
        """`selection` as a `Selection`, or its default."""
        if isinstance(self.selection, Selection):
            return self.selection
        return VOTES if self.calibration is None else PAPER

    def chunk_len(self, model: ModelConfig) -> int:
        """`max_chunk_len`, or its default for this model, in tokens."""
        return self.max_chunk_len or default_chunk_len(model.context_limit)

    def most_rows(self, model: ModelConfig, affix: int) -> int:
        """`target_len`, or its default for this model, in tokens.

        affix: the number of tokens in prefix and suffix together.
        """
        chunk_len = self.chunk_len(model)
        return self.target_len or default_target_len(chunk_len, affix, self.reread)

    @property
    def reread(self) -> Recompute:
        """`recompute`, or its default."""
        return self.recompute or "all"


def plan(
    model: ModelConfig | Llama,
    context_len: int,
    prefix_len: int = 0,
    suffix_len: int = 1,
    config: HomerConfig | None = None,
    itemsize: int | None = None,
    documents: int = 1,
    on_gpu: bool = True,
    ranks: int = 1,
) -> Plan:
    """Lay out the merge tree for an input of these lengths, without running anything.

    The result tells how many chunks there are, which layers they run, how many tokens survive, and
    what all of it costs in operations and memory.

    Args:
        model: A loaded model or its config.
        context_len: Tokens of the context, at least 1.
        prefix_len: Tokens of the prefix, which every chunk starts with.
        suffix_len: Tokens of the suffix, which every chunk ends with; at least 1.
        config: The settings; the defaults of `HomerConfig` if left out.
        itemsize: Bytes per number in the dtype that the model runs in. Default: that of the
            checkpoint's own dtype, even if `model` was loaded in another.
        documents: How many documents of these lengths run side by side.
        on_gpu: Whether the model runs on a GPU. It decides how many leaves keep the device busy,
            and whether moving chunks to host memory can save memory.
        ranks: How many processes share the leaves.

    The last four matter only for how many leaves run at once and for what fits a memory budget.

    Returns:
        The merge tree, a `Plan`.

    Raises:
        ValueError: The lengths and settings do not fit together or do not fit the model, or nothing
            fits the memory budget. The message says what to change.
    """
    context_len = whole_number("context_len", context_len, 0)
    prefix_len = whole_number("prefix_len", prefix_len, 0)
    suffix_len = whole_number("suffix_len", suffix_len, 0)
    documents = whole_number("documents", documents, 1)
    ranks = whole_number("ranks", ranks, 1)
    config = config or HomerConfig()
    model = model.config if isinstance(model, Llama) else model
    chunk_len = config.chunk_len(model)
    selection, layers = config.selected_by, model.num_hidden_layers
    recompute = config.reread
    target_len = config.most_rows(model, prefix_len + suffix_len)
    whole = prefix_len + context_len + suffix_len
    if recompute == "all" and whole <= min(target_len, model.context_limit):
        # All of it would be read as one prompt in any case: there is nothing to choose.
        chunk_len = max(chunk_len, whole)
    room = max(chunk_len - prefix_len - suffix_len, 1)
    levels = tree_height(max(context_len, 1), room) + 1
    layers_tree = config.layers_tree
    if layers_tree is None:
        fewest = min(levels + (config.layers_warmup or 0), layers)
        layers_tree = max(4 * layers // 5, fewest) if recompute == "all" else layers
    if levels == 1 and whole <= target_len:
        # Nothing is pruned: the tree's one chunk already is the ordinary prompt.
        recompute, layers_tree = "none", layers
    warmup = config.layers_warmup
    if warmup is None:
        share = layers // 2 if layers_tree < layers else 3 * layers // 8
        warmup = max(min(share, layers_tree - levels), 0)
    selection.check_room(room)
    asking = selection.asking(suffix_len) if suffix_len else 1

    limit = model.context_limit

    def lay_out(leaf_batch: int, offload: bool) -> Plan:
        tree = build_plan(
            prefix_len=prefix_len,
            context_len=context_len,
            suffix_len=suffix_len,
            num_layers=layers,
            max_chunk_len=chunk_len,
            target_len=target_len,
            layers_warmup=warmup,
            leaf_batch=leaf_batch,
            offload=offload,
            layers_tree=layers_tree,
            recompute=recompute,
            asking=asking,
        )
        most = max(node.context for level in tree.levels for node in level.nodes)
        longest = max(prefix_len + most + suffix_len, tree.rows)
        model.check_window(longest, "max_chunk_len" if tree.rows < longest else "target_len")
        if recompute == "all" and tree.rows > limit and not model.reaches_beyond_limit:
            raise ValueError(
                f"{tree.rows} survivors are read once more as one prompt, beyond the model's "
                f"context limit of {limit}; lower target_len or max_chunk_len, or set "
                'recompute="suffix".'
            )
        return tree

    def ways(offload: bool) -> Iterable[Plan]:
        if config.leaf_batch is not None:
            return [lay_out(config.leaf_batch, offload)]
        return with_leaves_at_once(lay_out(1, offload), documents, on_gpu, ranks)

    size = model.dtype.itemsize if itemsize is None else itemsize
    may_offload = config.memory_budget is not None and on_gpu
    choices = [True] if config.offload else [False, True] if may_offload else [False]
    plans = [tree for offload in choices for tree in ways(offload)]
    needs = [tree.memory(model, size, documents, on_gpu) for tree in plans]
    least = min(needs)
    if config.memory_budget is None:
        budget = most_memory(least)
    else:
        budget = parse_bytes(config.memory_budget)
    for tree, need in zip(plans, needs, strict=True):
        if need <= budget:
            return tree
    raise ValueError(
        f"memory_budget={config.memory_budget} is less than the {-(-least // 2**20)}MiB that this "
        "input needs beside the weights; raise it or lower max_chunk_len or target_len."
    )


def parse_bytes(size: int | str) -> int:
    """Bytes from a number or a text such as "12GiB", "900MB" or "1.5 GiB".

    Raises:
        ValueError: It is anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(size), re.IGNORECASE)
    if match is None:
        raise ValueError(
            f"memory_budget={size!r} is not a size; give bytes or a text like '12GiB'."
        )
    number, prefix, binary = match.groups()
    base = 1024 if binary else 1000
    return int(Fraction(number) * base ** " KMGT".index(prefix.upper() or " "))
