"""The merge tree as data: which tokens, layers and row counts every node has.

Everything about a run but its numbers follows from four lengths, the layer count and three
settings, so the whole schedule is known before the first matrix product (HOMER, sections 3.1 and
3.4). No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from ..checks import MOST
from . import costs

Recompute = Literal["none", "suffix", "all"]

# The least that a described plan's numbers can be.
_LEAST = {
    "prefix_len": 0,
    "context_len": 1,
    "suffix_len": 1,
    "num_layers": 1,
    "max_chunk_len": 1,
    "target_len": 1,
    "layers_warmup": 0,
    "leaf_batch": 1,
    "layers_tree": 1,
    "asking": 1,
}

# Longer chunks take more memory and more attention for each token; shorter ones know too little of
# what stands around a token.
SHORTEST_DEFAULT_CHUNK, LONGEST_DEFAULT_CHUNK = 1024, 8192
# A model answers best from a short prompt; fewer tokens than this lose what was asked for.
SHORTEST_DEFAULT_TARGET = 384


@dataclass(frozen=True, slots=True)
class Node:
    """One chunk: `prefix ‖ context rows ‖ suffix`, run through its level's layers and pruned at the
    end.

    height: 0 for leaves; index: from the left within the height; context: context rows that go in;
    kept: context rows that survive its prune (the affix always does).
    """

    height: int
    index: int
    context: int
    kept: int


@dataclass(frozen=True)
class Level:
    """All nodes of one height, left to right, and the layers [first_layer, last_layer) that they
    run.
    """

    height: int
    first_layer: int
    last_layer: int
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Plan:
    """A merge tree for one input; `levels[0]` holds the leaves and `levels[-1]` the root alone.

    Lengths are in tokens. `prefix_len + context_len + suffix_len` is the whole input; every chunk
    holds the prefix, the suffix and at most `max_chunk_len` tokens in all. `leaf_batch` leaves run
    at once; with `offload` what waits does so in host memory. The tree runs the first `layers_tree`
    of the model's `num_layers`; `asking` rows of every chunk's suffix select. recompute: what is
    read once more in the end, "none", "suffix", or "all" that survived. With "all" the tree's keys
    and values are not kept, and the root keeps all that its chunk holds; if that is more than the
    target, those survivors are chosen from once more, as a chunk that starts anew from its tokens
    (`narrowing`).
    """

    prefix_len: int
    context_len: int
    suffix_len: int
    max_chunk_len: int
    target_len: int
    layers_warmup: int
    leaf_batch: int
    offload: bool
    num_layers: int
    recompute: Recompute
    asking: int
    leaf_context: int
    levels: tuple[Level, ...]

    @property
    def height(self) -> int:
        return len(self.levels) - 1

    @property
    def layers_tree(self) -> int:
        """Layers that the tree runs."""
        return self.levels[-1].last_layer

    @property
    def input_len(self) -> int:
        """Tokens of `prefix ‖ context ‖ suffix`."""
        return self.prefix_len + self.context_len + self.suffix_len

    @property
    def rows(self) -> int:
        """Rows of the finished cache."""
        return min(self.survivors, self.target_len) if self.recompute == "all" else self.survivors

    @property
    def survivors(self) -> int:
        """Tokens that the root keeps, prefix and suffix included."""
        return self.prefix_len + self.levels[-1].nodes[0].kept + self.suffix_len

    @property
    def prunes(self) -> bool:
        """Whether any chunk has to choose which of its rows it keeps."""
        return any(node.kept < node.context for level in self.levels for node in level.nodes)

    def narrowing(self) -> Plan | None:
        """The tree of one chunk that chooses from the root's survivors, if they are too many."""
        if self.survivors == self.rows:
            return None
        return build_plan(
            self.prefix_len,
            self.levels[-1].nodes[0].kept,
            self.suffix_len,
            self.num_layers,
            max_chunk_len=self.survivors,
            target_len=self.target_len,
            layers_warmup=0,
            layers_tree=self.layers_tree,
            recompute=self.recompute,
            asking=self.asking,
        )

    @property
    def next_position(self) -> int:
        """The RoPE position at which new tokens go on."""
        return self.rows if self.recompute == "all" else self.chunk_end

    @property
    def chunk_end(self) -> int:
        """The first RoPE position that no chunk has."""
        return self.prefix_len + self.leaf_context + self.suffix_len

    def steps(self) -> Iterator[tuple[Node, ...]]:
        """The nodes in the order they run: depth first, left before right, children before their
        parent. A step's nodes have equal shapes, stand side by side and run as a batch.
        """

        def walk(height: int, index: int) -> Iterator[tuple[Node, ...]]:
            if 2**height <= self.leaf_batch:
                subtree = [
                    level.nodes[index << (height - j) : (index + 1) << (height - j)]
                    for j, level in enumerate(self.levels[: height + 1])
                ]
                if len(subtree[0]) == 2**height and all(map(_alike, subtree)):
                    yield from subtree
                    return
            if height:
                yield from walk(height - 1, 2 * index)
                if self.has_right(height, index):
                    yield from walk(height - 1, 2 * index + 1)
            yield (self.levels[height].nodes[index],)

        return walk(self.height, 0)

    def has_right(self, height: int, index: int) -> bool:
        """Whether a node above the leaves has two children (the last one of a level may have its
        left one only).
        """
        return 2 * index + 1 < len(self.levels[height - 1].nodes)

    def waits(self, nodes: tuple[Node, ...]) -> bool:
        """Whether a step's only node is a left child whose sibling comes later."""
        first = nodes[0]
        is_left = first.index % 2 == 0 and first.height < self.height
        return len(nodes) == 1 and is_left and self.has_right(first.height + 1, first.index // 2)

    @property
    def peak_slots(self) -> int:
        """The most tokens whose keys and values are alive at once, the prefix included."""
        return self.slots()[0]

    def slots(self, documents: int = 1) -> tuple[int, ...]:
        """For each level, the most tokens that are alive at once in its layers: the prefix, and
        each document's chunks of this height and higher ones.
        """
        return tuple(self.prefix_len + documents * own for own in self.own_slots)

    @cached_property
    def own_slots(self) -> tuple[int, ...]:
        """One document's `slots` without the prefix."""
        live, peak = [0] * len(self.levels), [0] * len(self.levels)

        def count(height: int, tokens: int) -> None:
            for j in range(height + 1):
                live[j] += tokens
                peak[j] = max(peak[j], live[j])

        children = 0
        for nodes in self.steps():
            first, count_now = nodes[0], len(nodes)
            height = first.height
            if height and self.has_right(height, first.index):
                if self.offload and children == count_now:
                    left = self.levels[height - 1].nodes[2 * first.index]
                    count(height - 1, left.kept + self.suffix_len)
                count(height - 1, -count_now * self.suffix_len)
            live[height] += count_now * (first.context + self.suffix_len)
            count(height, 0)
            count(height, -count_now * (first.context - first.kept))
            if self.offload and self.waits(nodes):
                count(height, -first.kept - self.suffix_len)
            children = count_now
        return tuple(peak)

    # What running it costs.
    flops = costs.flops
    prefill_flops = costs.prefill_flops
    memory = costs.memory
    prefill_memory = costs.prefill_memory

    def to_dict(self) -> dict[str, Any]:
        """Everything needed to make this plan again, as plain numbers."""
        fields = asdict(self)
        del fields["levels"], fields["leaf_context"]
        return {**fields, "layers_tree": self.layers_tree}

    @classmethod
    def from_dict(cls, fields: Any) -> Plan:
        """The plan that `to_dict` described. Raises `ValueError` for anything else."""
        cls.check_dict(fields)
        return build_plan(**fields)

    @staticmethod
    def check_dict(fields: Any) -> None:
        """Raise `ValueError` unless these can be what `to_dict` gave, by their types and ranges:
        whether they fit each other is only known when the plan is made, whose nodes take memory by
        the length of the context.
        """
        known = {*_LEAST, "offload", "recompute"}
        if not isinstance(fields, dict) or fields.keys() != known:
            raise ValueError(f"a plan must have {', '.join(sorted(known))}")
        for name, least in _LEAST.items():
            value = fields[name]
            if type(value) is not int or not least <= value <= MOST:
                raise ValueError(f"the plan's {name} is {value!r}")
        if type(fields["offload"]) is not bool:
            raise ValueError(f"the plan's offload is {fields['offload']!r}")
        if fields["recompute"] not in get_args(Recompute):
            raise ValueError(f"the plan's recompute is {fields['recompute']!r}")
        if fields["asking"] > fields["suffix_len"]:
            raise ValueError(f"the plan's asking is {fields['asking']}, beyond its suffix_len")


def build_plan(
    prefix_len: int,
    context_len: int,
    suffix_len: int,
    num_layers: int,
    max_chunk_len: int,
    target_len: int,
    layers_warmup: int,
    leaf_batch: int = 1,
    offload: bool = False,
    layers_tree: int | None = None,
    recompute: Recompute = "none",
    asking: int = 1,
) -> Plan:
    """Lay out the merge tree (HOMER, section 3 and appendix A).

    layers_tree: the layers that it runs, all `num_layers` of the model if left out. Raises
    `ValueError` for an empty context or suffix, an affix that leaves a chunk or the target no room,
    a `layers_tree` that leaves the cache unfinished, and a tree with more levels than the layers
    after the warm-up.
    """
    affix = prefix_len + suffix_len
    room = max_chunk_len - affix
    if context_len < 1:
        raise ValueError(
            "the context is empty; give at least one token besides the prefix and suffix."
        )
    if suffix_len < 1:
        raise ValueError(
            "the suffix is empty; its last tokens score the others, so give at least one."
        )
    if room < 1:
        raise ValueError(
            f"prefix ({prefix_len} tokens) plus suffix ({suffix_len}) leave a chunk of "
            f"max_chunk_len={max_chunk_len} "
            f"no room for context; shorten them or set max_chunk_len to at least {affix + 1}."
        )
    if target_len <= affix:
        raise ValueError(
            f"target_len={target_len} leaves no room for context beside prefix ({prefix_len} "
            "tokens) and suffix "
            f"({suffix_len}); set target_len to at least {affix + 1}."
        )
    tree = num_layers if layers_tree is None else layers_tree
    if not 1 <= tree <= num_layers:
        raise ValueError(
            f"layers_tree={tree} must be at least 1 and at most the model's {num_layers} layers."
        )
    if tree < num_layers and recompute != "all":
        raise ValueError(
            f"layers_tree={tree} of {num_layers} layers makes no cache of them all; set "
            'recompute="all", which reads the survivors once more.'
        )
    if not 0 <= layers_warmup < tree:
        raise ValueError(
            f"layers_warmup={layers_warmup} must be at least 0 and less than the tree's {tree} "
            "layers."
        )

    if leaf_batch < 1 or leaf_batch & (leaf_batch - 1):
        raise ValueError(f"leaf_batch={leaf_batch} must be a power of two: 1, 2, 4, ...")

    height = tree_height(context_len, room)
    per_level = (tree - layers_warmup) // (height + 1)
    if per_level == 0:
        raise ValueError(
            f"{context_len} context tokens in chunks with room for {room} make a tree of "
            f"{height + 1} levels, but only "
            f"{tree - layers_warmup} of {tree} layers are left after "
            f"layers_warmup={layers_warmup}; raise max_chunk_len"
            f"{' or layers_tree' if tree < num_layers else ''} or lower layers_warmup."
        )
    leaf_context = -(-context_len // 2**height)
    leaves = [min(leaf_context, context_len - i) for i in range(0, context_len, leaf_context)]
    first_height_layers = tree - per_level * height

    # What is read again as one prompt is chosen at last from all that the root's chunk holds.
    root = room if recompute == "all" and height else target_len - affix
    budgets = _context_budgets(height, leaves, room, root)
    levels: list[Level] = []
    for j in range(height + 1):
        below = leaves if j == 0 else [node.kept for node in levels[-1].nodes]
        contexts = below if j == 0 else [sum(below[i : i + 2]) for i in range(0, len(below), 2)]
        nodes = tuple(
            Node(j, i, context, min(context, budget))
            for i, (context, budget) in enumerate(zip(contexts, budgets[j], strict=True))
        )
        first = 0 if j == 0 else levels[-1].last_layer
        levels.append(Level(j, first, first_height_layers + per_level * j, nodes))
    return Plan(
        prefix_len,
        context_len,
        suffix_len,
        max_chunk_len,
        target_len,
        layers_warmup,
        leaf_batch,
        offload,
        num_layers,
        recompute,
        asking,
        leaf_context,
        tuple(levels),
    )


def default_chunk_len(context_limit: int) -> int:
    """The length of chunks, and of calibration segments, where nobody says another: a quarter of
    what a model can read, between `SHORTEST_DEFAULT_CHUNK`, or half of a short limit, and
    `LONGEST_DEFAULT_CHUNK`.
    """
    shortest = min(context_limit // 2, SHORTEST_DEFAULT_CHUNK)
    return min(max(context_limit // 4, shortest), LONGEST_DEFAULT_CHUNK)


def default_target_len(chunk_len: int, affix: int, recompute: Recompute) -> int:
    """The most tokens in the finished cache, where nobody says another: a chunk's, as in the paper;
    where they are read again as one prompt, an eighth of it, but at least
    `SHORTEST_DEFAULT_TARGET`.

    affix: tokens of the prefix and the suffix, which have their room beside those.
    """
    if recompute != "all":
        return chunk_len
    return min(chunk_len, max(chunk_len // 8, SHORTEST_DEFAULT_TARGET) + affix)


def tree_height(context_len: int, room: int) -> int:
    """Height of the smallest binary tree whose leaves hold the context, `room` tokens in each."""
    return (-(-context_len // room) - 1).bit_length()


def _alike(nodes: tuple[Node, ...]) -> bool:
    """Whether all nodes have the shape of the first."""
    return all((n.context, n.kept) == (nodes[0].context, nodes[0].kept) for n in nodes)


def _context_budgets(height: int, leaves: list[int], room: int, target: int) -> list[list[int]]:
    """How many context rows each node may hand on, by height and index, from the root down (HOMER,
    appendix A).
    """
    budgets = [[target]]
    for j in range(height - 1, -1, -1):
        count = -(-len(leaves) // 2**j)
        level = [room // 2] * count
        if count % 2:
            level[-1] = room  # no right sibling: nothing to make room for
        elif leaves[(count - 1) * 2**j] < room // 2:
            # The right sibling is one short leaf: it stays whole, and its left sibling takes the
            # rest of the chunk.
            level[-1] = leaves[-1]
            level[-2] = room - leaves[-1]
        budgets.append(level)
    return budgets[::-1]
