"""The merge tree as data: which tokens, layers and token counts every node has.

Everything about a run except its numbers follows from four lengths, the layer count and a few
settings. So the whole schedule is known before the first matrix product (HOMER, sections 3.1 and
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

# The smallest values that a described plan may have.
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

# Longer chunks cost more memory, and more attention per token. In shorter ones, a token sees too
# little of what is around it.
SHORTEST_DEFAULT_CHUNK, LONGEST_DEFAULT_CHUNK = 1024, 8192
# A model answers best from a short prompt, but with fewer tokens than this the answer is lost.
SHORTEST_DEFAULT_TARGET = 384


@dataclass(frozen=True, slots=True)
class Node:
    """One chunk of the merge tree.

    A chunk is `prefix ‖ context tokens ‖ suffix`. It runs through the layers of its level and is
    pruned at the end of the last one.

    Attributes:
        height: 0 for leaves.
        index: Its place among the nodes of this height, from the left.
        context: Context tokens that go in.
        kept: Context tokens that survive the prune. Prefix and suffix always do.
    """

    height: int
    index: int
    context: int
    kept: int


@dataclass(frozen=True)
class Level:
    """All nodes of one height, left to right, and the layers that they run.

    Attributes:
        height: 0 for leaves.
        first_layer: The first layer that they run.
        last_layer: The layer after the last one that they run.
        nodes: The nodes.
    """

    height: int
    first_layer: int
    last_layer: int
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Plan:
    """The merge tree for one input: what `plan` returns, known before anything runs.

    The input is `prefix ‖ context ‖ suffix`. The context is cut into chunks, the leaves of a binary
    tree. Every chunk holds the prefix (the input's start), its context tokens and the suffix (the
    input's end, usually the question). Chunks run through the layers of their level, are pruned,
    and are merged in pairs up to the root.

        tree = ht.plan(model, context_len=131072, suffix_len=20)
        print(tree.height, tree.rows, tree.memory(model.config, itemsize=2) / 2**30, "GiB")

    All lengths are in tokens.

    Attributes:
        prefix_len: Length of the prefix.
        context_len: Length of the context.
        suffix_len: Length of the suffix.
        max_chunk_len: The most tokens in a chunk, prefix and suffix included.
        target_len: The most tokens in the finished cache, prefix and suffix included.
        layers_warmup: Warm-up layers: what the leaves run before the first merge, on top of each
            level's equal share of the layers.
        leaf_batch: How many leaves run at once.
        offload: Whether finished chunks wait in host memory.
        num_layers: Layers of the model.
        recompute: What is read once more at the end: "none", "suffix", or "all" that survived. With
            "all", the tree's keys and values are not kept, and its root keeps as many tokens as a
            chunk holds; if these are more than `target_len`, one more chunk chooses from them
            (`narrowing`).
        asking: How many of the suffix's last tokens score the others.
        leaf_context: Context tokens of a leaf; the last leaf may have fewer.
        levels: `levels[0]` has the leaves, `levels[-1]` only the root.
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
        """Height of the root; 0 if a single chunk holds the whole context."""
        return len(self.levels) - 1

    @property
    def layers_tree(self) -> int:
        """How many layers the tree runs."""
        return self.levels[-1].last_layer

    @property
    def input_len(self) -> int:
        """Tokens of `prefix ‖ context ‖ suffix`."""
        return self.prefix_len + self.context_len + self.suffix_len

    @property
    def rows(self) -> int:
        """Tokens of the finished cache."""
        return min(self.survivors, self.target_len) if self.recompute == "all" else self.survivors

    @property
    def survivors(self) -> int:
        """Tokens that the root keeps, prefix and suffix included."""
        return self.prefix_len + self.levels[-1].nodes[0].kept + self.suffix_len

    @property
    def prunes(self) -> bool:
        """Whether any chunk drops tokens."""
        return any(node.kept < node.context for level in self.levels for node in level.nodes)

    def narrowing(self) -> Plan | None:
        """The plan of the one more chunk that chooses from the root's survivors.

        The survivors run as a new chunk, starting from their tokens. None if they are not too many.
        """
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
        """The RoPE position of the first token after the encoding."""
        return self.rows if self.recompute == "all" else self.chunk_end

    @property
    def chunk_end(self) -> int:
        """The first RoPE position after those of a chunk."""
        return self.prefix_len + self.leaf_context + self.suffix_len

    def steps(self) -> Iterator[tuple[Node, ...]]:
        """The nodes in the order in which they run.

        That is depth first, left before right, children before their parent. The nodes of one step
        have equal shapes, are neighbours and run as a batch.
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
        """Whether a node above the leaves has two children. The last of a level may have one."""
        return 2 * index + 1 < len(self.levels[height - 1].nodes)

    def waits(self, nodes: tuple[Node, ...]) -> bool:
        """Whether a step's only node is a left child whose sibling runs later."""
        first = nodes[0]
        is_left = first.index % 2 == 0 and first.height < self.height
        return len(nodes) == 1 and is_left and self.has_right(first.height + 1, first.index // 2)

    @property
    def peak_slots(self) -> int:
        """The most tokens held at once, the prefix included."""
        return self.slots()[0]

    def slots(self, documents: int = 1) -> tuple[int, ...]:
        """For each level, the most tokens held at once in its layers.

        These are the prefix, and each document's chunks of this height and above.

        documents: how many run side by side.
        """
        return tuple(self.prefix_len + documents * own for own in self.own_slots)

    @cached_property
    def own_slots(self) -> tuple[int, ...]:
        """`slots` of one document, without the prefix."""
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

    # The cost of running it.
    flops = costs.flops
    prefill_flops = costs.prefill_flops
    memory = costs.memory
    prefill_memory = costs.prefill_memory

    def to_dict(self) -> dict[str, Any]:
        """All that is needed to make this plan again, as plain numbers."""
        fields = asdict(self)
        del fields["levels"], fields["leaf_context"]
        return {**fields, "layers_tree": self.layers_tree}

    @classmethod
    def from_dict(cls, fields: Any) -> Plan:
        """The plan that `to_dict` described.

        Raises:
            ValueError: The fields are anything else.
        """
        cls.check_dict(fields)
        return build_plan(**fields)

    @staticmethod
    def check_dict(fields: Any) -> None:
        """Raise `ValueError` unless the fields have the names, types and ranges of `to_dict`'s.

        Whether they fit each other is only known when the plan is made. That takes memory for its
        nodes, as many as the context's length asks for.
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

    Args:
        prefix_len, context_len, suffix_len: Tokens of each part of the input.
        num_layers: Layers of the model.
        max_chunk_len, target_len, layers_warmup, leaf_batch, offload: As in `Plan`.
        layers_tree: Layers that the tree runs. Default: all `num_layers`.
        recompute, asking: As in `Plan`.

    Raises:
        ValueError: The context or the suffix is empty, prefix and suffix leave no capacity for
            context in a chunk or in the target, `layers_tree` would leave the cache unfinished, the
            layers after the warm-up are fewer than the tree's levels, or a setting is out of range.
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

    # With "all", the final choice is made later, from everything that the root's chunk holds.
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
    """The default length of chunks, and of calibration segments, in tokens.

    A quarter of the model's context limit, but at least `SHORTEST_DEFAULT_CHUNK` (or half of the
    limit, if that is less) and at most `LONGEST_DEFAULT_CHUNK`.
    """
    shortest = min(context_limit // 2, SHORTEST_DEFAULT_CHUNK)
    return min(max(context_limit // 4, shortest), LONGEST_DEFAULT_CHUNK)


def default_target_len(chunk_len: int, affix: int, recompute: Recompute) -> int:
    """The default for the most tokens in the finished cache.

    A chunk, as in the paper; with `recompute="all"`, an eighth of a chunk (at least
    `SHORTEST_DEFAULT_TARGET`) plus prefix and suffix, but at most a chunk.

    affix: tokens of prefix and suffix together.
    """
    if recompute != "all":
        return chunk_len
    return min(chunk_len, max(chunk_len // 8, SHORTEST_DEFAULT_TARGET) + affix)


def tree_height(context_len: int, room: int) -> int:
    """Height of the smallest binary tree that holds the context, `room` tokens in each leaf."""
    return (-(-context_len // room) - 1).bit_length()


def _alike(nodes: tuple[Node, ...]) -> bool:
    """Whether all nodes have the shape of the first."""
    return all((n.context, n.kept) == (nodes[0].context, nodes[0].kept) for n in nodes)


def _context_budgets(height: int, leaves: list[int], room: int, target: int) -> list[list[int]]:
    """How many context tokens each node may keep, by height and index (HOMER, appendix A).

    The budgets are set from the root down.
    """
    budgets = [[target]]
    for j in range(height - 1, -1, -1):
        count = -(-len(leaves) // 2**j)
        level = [room // 2] * count
        if count % 2:
            level[-1] = room  # no right sibling to share the parent's chunk with
        elif leaves[(count - 1) * 2**j] < room // 2:
            # The right sibling is one short leaf: it is kept whole, and its left sibling gets the
            # rest of the parent's chunk.
            level[-1] = leaves[-1]
            level[-2] = room - leaves[-1]
        budgets.append(level)
    return budgets[::-1]
