"""A plan dealt out to ranks: which of them runs which nodes, what travels between them, and what
that takes of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..model.costs import ModelShape, cache_bytes, layer_flops
from .costs import memory_of, node_flops
from .tree import Node, Plan


@dataclass(frozen=True)
class Share:
    """What a rank has of a plan. leaves: how many of them it runs; flops: its floating-point
    operations; time_share: of all that one process would take, by these; sent: bytes that it sends
    to other ranks; memory: bytes at its peak above the model's weights.
    """

    leaves: int
    flops: int
    time_share: float
    sent: int
    memory: int


@dataclass(frozen=True)
class Shares:
    """Leaves in their order, as evenly as whole groups of `leaf_batch` of them go; a node above
    them is the rank's that runs its first leaf. So the first rank runs the root, and what travels
    is a right child of a node.
    """

    plan: Plan
    ranks: int

    def owner(self, node: Node) -> int:
        """The rank that runs a node."""
        size = self.plan.leaf_batch
        groups = -(-len(self.plan.levels[0].nodes) // size)
        return (node.index << node.height) // size * min(self.ranks, groups) // groups

    def steps(self, rank: int) -> Iterator[tuple[Node, ...]]:
        """The plan's steps that a rank runs, in their order."""
        return (nodes for nodes in self.plan.steps() if self.owner(nodes[0]) == rank)

    def arriving(self, nodes: tuple[Node, ...]) -> Node | None:
        """The right child of a step's node, where another rank runs it."""
        node = nodes[0]
        if not node.height or not self.plan.has_right(node.height, node.index):
            return None
        right = self.plan.levels[node.height - 1].nodes[2 * node.index + 1]
        return None if self.owner(right) == self.owner(node) else right

    def destination(self, nodes: tuple[Node, ...]) -> int | None:
        """The rank that runs a step's parents, where it is another one."""
        node = nodes[0]
        if node.height == self.plan.height:
            return None
        parent = self.plan.levels[node.height + 1].nodes[node.index // 2]
        owner = self.owner(parent)
        return None if owner == self.owner(node) else owner

    def sources(self, node: Node) -> slice:
        """The input tokens that the leaves below a node hold, affixes left out."""
        plan = self.plan
        first = plan.prefix_len + (node.index << node.height) * plan.leaf_context
        end = plan.prefix_len + plan.context_len
        return slice(first, min(first + (plan.leaf_context << node.height), end))

    def costs(
        self, shape: ModelShape, itemsize: int, documents: int = 1, on_gpu: bool = True
    ) -> list[Share]:
        """Each rank's share. itemsize: bytes of a number in the model's dtype; on_gpu: whose memory
        is counted.
        """
        plan, shares, whole = self.plan, [], self.plan.flops(shape)
        prefix = layer_flops(shape, 0, plan.prefix_len) * plan.layers_tree
        walked = sum(node_flops(plan, shape, node) for level in plan.levels for node in level.nodes)
        for rank in range(self.ranks):
            steps = list(self.steps(rank))
            own = [node for nodes in steps for node in nodes]
            flops = sum(node_flops(plan, shape, node) for node in own) + (prefix if own else 0)
            if rank == 0:  # all that comes after the walk
                flops += whole - walked - prefix
            leaving = [node for node in own if self.destination((node,)) is not None]
            sent = [documents * self.sent_bytes(node, shape, itemsize) for node in leaving]
            memory = memory_of(plan, shape, itemsize, documents, on_gpu, steps, rank == 0)
            # What is on its way stays, while more is walked; after the last there is no more. What
            # arrives does so between two steps.
            memory += sum(sent[:-1])
            leaves = sum(node.height == 0 for node in own)
            shares.append(Share(leaves, documents * flops, flops / whole, sum(sent), memory))
        return shares

    def sent_bytes(self, node: Node, shape: ModelShape, itemsize: int) -> int:
        """What a node's chunk takes on its way: hidden states, positions, sources and, where they
        are kept, keys and values; its tokens' votes, and where they were pruned.
        """
        plan, rows = self.plan, node.kept + self.plan.suffix_len
        sources = self.sources(node)
        size = rows * (shape.hidden_size * itemsize + 2 * 8)
        size += (sources.stop - sources.start) * (1 + max(itemsize, 4))
        if plan.recompute != "all":
            layers = plan.levels[node.height].last_layer
            size += rows * layers * (cache_bytes(shape, itemsize) // shape.num_hidden_layers)
        return size
