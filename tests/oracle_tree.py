"""The merge tree laid out naively, for the oracle to run and the plan to be compared with."""

from dataclasses import dataclass, replace
from math import ceil, floor, log2

from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """What an encoding is made with: by default, the paper's. bias is [L, distances] or None;
    layers_tree is how many layers the tree runs, None for all; of the suffix the last `asking` rows
    select; window None is its default; weights [L][HQ] are the heads', None for 1.
    """

    max_chunk_len: int
    target_len: int
    layers_warmup: int
    bias: Tensor | None = None
    recompute: str = "none"
    layers_tree: int | None = None
    asking: int = 1
    logit: str = "logit"
    heads: str = "max"
    layers: str = "last"
    window: int | None = 1
    weights: list[list[float]] | None = None


@dataclass(frozen=True)
class Node:
    """A node over the leaves [first, last), with its children's indices one height below and its
    target in tokens.
    """

    first: int
    last: int
    children: tuple[int, ...]
    target: int


@dataclass(frozen=True)
class Tree:
    """leaves: each one's context tokens; heights: each one's nodes; layers: those that it runs."""

    leaf_context: int
    leaves: list[int]
    heights: list[list[Node]]
    layers: list[range]


def lay_out(prefix: int, context: int, suffix: int, layers: int, settings: Settings) -> Tree:
    """The tree for these lengths, built from the leaves up; targets are set from the root down."""
    room = settings.max_chunk_len - prefix - suffix
    affix = prefix + suffix
    height = ceil(log2(ceil(context / room)))
    leaf_context = ceil(context / 2**height)
    tokens = list(range(context))
    leaves = [len(tokens[i * leaf_context : (i + 1) * leaf_context]) for i in range(2**height)]
    leaves = [length for length in leaves if length > 0]

    rest = (settings.layers_tree or layers) - settings.layers_warmup
    each = rest // (height + 1)
    bottom = settings.layers_warmup + each + rest - each * (height + 1)
    ranges = [range(bottom)]
    for _ in range(height):
        ranges.append(range(ranges[-1].stop, ranges[-1].stop + each))

    heights = [[Node(i, i + 1, (), 0) for i in range(len(leaves))]]
    while len(heights[-1]) > 1:
        below = heights[-1]
        pairs = [tuple(range(i, min(i + 2, len(below)))) for i in range(0, len(below), 2)]
        heights.append(
            [Node(below[pair[0]].first, below[pair[-1]].last, pair, 0) for pair in pairs]
        )

    target = settings.target_len
    if settings.recompute == "all" and height:
        target = settings.max_chunk_len  # the last choice is made from what the root holds
    heights[-1][0] = replace(heights[-1][0], target=min(target, affix + context))
    for above, below in zip(heights[:0:-1], heights[-2::-1], strict=True):
        for parent in above:
            if len(parent.children) == 1:
                targets = [settings.max_chunk_len]
            else:
                usual = affix + floor(room / 2)
                first_of_right = affix + leaves[below[parent.children[1]].first]
                targets = [usual, usual]
                if first_of_right < usual:
                    targets = [settings.max_chunk_len - (first_of_right - affix), first_of_right]
            for child, target in zip(parent.children, targets, strict=True):
                below[child] = replace(below[child], target=target)
    return Tree(leaf_context, leaves, heights, ranges)


def peak_tokens(prefix: int, context: int, suffix: int, layers: int, settings: Settings) -> int:
    """The most tokens alive at once, depth first, one prefix counted for all nodes."""
    tree = lay_out(prefix, context, suffix, layers, settings)
    alive = [prefix]
    peak = prefix

    def finish(height: int, index: int) -> int:
        """Tokens without the prefix that a node hands on."""
        nonlocal peak
        node = tree.heights[height][index]
        if height == 0:
            tokens = tree.leaves[index] + suffix
            alive.append(tokens)
        else:
            handed = [finish(height - 1, child) for child in node.children]
            tokens = sum(handed) - suffix * (len(handed) - 1)
            del alive[-len(handed) :]
            alive.append(tokens)
        peak = max(peak, sum(alive))
        alive[-1] = min(tokens, node.target - prefix)
        return alive[-1]

    finish(len(tree.heights) - 1, 0)
    return peak
