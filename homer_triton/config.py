"""The settings of an encoding, and the plan that they make for an input of a given length."""

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
    """How to encode; settings left out come from the model.

    max_chunk_len: tokens that run through a layer at once, by default a quarter of the context
    limit, but at least 1024 (or half of a short limit) and at most 8192. Beyond the limit the model
    meets positions that it was not trained on.
    target_len: the most tokens in the finished cache; by default an eighth of a chunk, but at least
    384, beside prefix and suffix, and a whole chunk where not all is recomputed. selection: what
    decides which tokens a prune keeps, a `Selection` or a text that names one, such as "paper" or
    "votes,window=7"; the question's votes by default, the paper's where there is a calibration,
    which corrects that one alone. recompute: what is read once more in the end, "all" (the
    default: the survivors, as one ordinary prompt; the tree then only chooses them), "suffix" (over
    the tree's cache, so that the question reads all of it directly), or "none" (the paper's: the
    answer comes from the chunks' averaged suffix). layers_tree: the layers that the tree runs; all
    of them, but four fifths where everything is recomputed, since the last layers choose badly.
    layers_warmup: layers that leaves run before the first merge beyond their even share, by default
    half of the layers (3/8 where the tree runs all), and fewer where it needs more levels.
    calibration: the bias that makes near and far tokens comparable, from `calibrate`.

    The numbers do not depend, but for rounding, on how it is run. leaf_batch: leaves that run at
    once, a power of two; by default as many as keep the chip busy, at most twice the memory of one
    at a time (or 256 MiB). offload: "cpu" lets chunks wait in host memory, so that a GPU's peak
    does not depend on the length. memory_budget: bytes, or a text such as "12GiB", that encoding
    may take beside the weights; `plan` then picks `leaf_batch` and `offload` by it where they are
    left out. cuda_graphs: replay a level's steps from CUDA graphs, which the model keeps for the
    next texts of the same lengths, with the memory that they run in (`drop_graphs` frees it).

    `HomerConfig.paper()` is the paper's method. Raises `ValueError` for values out of range.
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
        """The method as published, with other settings as given."""
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
        """`selection`, or its default."""
        if isinstance(self.selection, Selection):
            return self.selection
        return VOTES if self.calibration is None else PAPER

    def chunk_len(self, model: ModelConfig) -> int:
        """`max_chunk_len`, or its default for a model."""
        return self.max_chunk_len or default_chunk_len(model.context_limit)

    def most_rows(self, model: ModelConfig, affix: int) -> int:
        """`target_len`, or its default for a model and so many tokens of prefix and suffix."""
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
    """The merge tree for an input of these lengths, in tokens, before anything is run.

    How many leaves run at once, and what a memory budget allows, depends on the rest: itemsize, the
    bytes of a number in the model's dtype, the checkpoint's own when left out; documents, how many
    run side by side; on_gpu, where rows go through the layers as a GPU wants them, and host memory
    is another than the model's, so that moving chunks there helps; ranks, how many processes share
    the leaves.

    Raises `ValueError` where the lengths or settings do not fit together, or no way to run them
    fits the budget; the message says what to change.
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
    room = max(chunk_len - prefix_len - suffix_len, 1)
    levels = tree_height(max(context_len, 1), room) + 1
    layers_tree = config.layers_tree
    if layers_tree is None:
        fewest = min(levels + (config.layers_warmup or 0), layers)
        layers_tree = max(4 * layers // 5, fewest) if recompute == "all" else layers
    if levels == 1 and prefix_len + context_len + suffix_len <= target_len:
        # Nothing is pruned: to read it once is to read it again.
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

    Raises `ValueError` for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(size), re.IGNORECASE)
    if match is None:
        raise ValueError(
            f"memory_budget={size!r} is not a size; give bytes or a text like '12GiB'."
        )
    number, prefix, binary = match.groups()
    base = 1024 if binary else 1000
    return int(Fraction(number) * base ** " KMGT".index(prefix.upper() or " "))
