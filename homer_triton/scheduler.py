"""Walks a plan depth first: runs each node's layers, prunes, merges siblings, and keeps only what
is still needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .model.llama import Llama, Select
from .pool import SlotPool
from .tree import Node, Plan


@dataclass(frozen=True)
class Chunk:
    """B finished nodes of equal shape, side by side, waiting for siblings or for their parents.

    hidden: [B, kept rows, E]; labels: [B, 3, rows], every row's position, source index and slot
    before the prune; kept: [B, kept rows], the rows that survived it.
    """

    hidden: Tensor
    labels: Tensor
    kept: Tensor

    def every_second(self, first: int) -> Chunk:
        """The left (0) or the right (1) ones of the batch's pairs of siblings."""
        return Chunk(self.hidden[first::2], self.labels[first::2], self.kept[first::2])


@dataclass(frozen=True)
class Merged:
    """What is left at the root: the last row's hidden state [E], [T'] positions, source indices and
    slots, and of every input token the height at which it was pruned, [tokens] int8, -1 if kept.
    """

    hidden: Tensor
    positions: Tensor
    source_indices: Tensor
    slots: Tensor
    pruned_at: Tensor


class Scheduler:
    """One run of a plan over a slot pool. Peak use of the pool is `plan.peak_slots`."""

    def __init__(
        self, model: Llama, plan: Plan, pool: SlotPool, bias: Tensor | None, score: str
    ) -> None:
        self.model = model
        self.plan = plan
        self.pool = pool
        self.bias = bias
        self.score = score
        self.rotary = model.rotary(plan.next_position)
        self._pruned_at = torch.full(
            (plan.input_len,), -1, dtype=torch.int8, device=pool.cache.device
        )

    def run(
        self, prefix: Tensor, context: Tensor, suffix: Tensor, on_node: Callable[[Node], None]
    ) -> Merged:
        """Encode `prefix ‖ context ‖ suffix`, each [tokens] on the model's device; `on_node` hears
        of each node.
        """
        self._run_prefix(prefix)
        waiting: list[Chunk] = []
        for nodes in self.plan.steps():
            if nodes[0].height == 0:
                waiting.append(self._finish(nodes, *self._leaves(nodes, context, suffix)))
            else:
                waiting.append(self._finish(nodes, *self._join(nodes, waiting)))
            for node in nodes:
                on_node(node)
        return self._result(waiting.pop())

    def _run_prefix(self, prefix: Tensor) -> None:
        """The prefix is the same in every chunk and sees only itself: one pass fills its slots for
        all of them.
        """
        if len(prefix):
            self.model.forward(prefix, self.pool.cache)

    def _leaves(
        self, nodes: tuple[Node, ...], context: Tensor, suffix: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The embedded tokens [B, rows, E] and the labels [B, 3, rows] of B leaves."""
        plan, batch, width = self.plan, len(nodes), nodes[0].context
        start = nodes[0].index * plan.leaf_context
        parts = context[start : start + batch * width].view(batch, width)
        tokens = torch.cat([parts, suffix.expand(batch, -1)], dim=1)
        rows = torch.arange(tokens.shape[1], device=tokens.device)
        is_suffix = rows >= width
        # A short last leaf's suffix stands where every other leaf's does.
        positions = plan.prefix_len + rows + is_suffix * (plan.leaf_context - width)
        starts = start + width * torch.arange(batch, device=tokens.device)[:, None]
        after_context = plan.context_len - starts - width
        sources = plan.prefix_len + starts + rows + is_suffix * after_context
        slots = self.pool.take(tokens.numel()).view(tokens.shape)
        labels = torch.stack([positions.expand_as(slots), sources, slots], dim=1)
        return self.model.embed(tokens), labels

    def _join(self, nodes: tuple[Node, ...], waiting: list[Chunk]) -> tuple[Tensor, Tensor]:
        """The hidden states and labels of nodes above the leaves, from their children, which no
        longer wait and of which nothing stays; left's suffix slots are free again.
        """
        plan, height = self.plan, nodes[0].height
        right = waiting.pop()
        if not plan.has_right(height, nodes[0].index):
            return right.hidden, right.labels  # pruned by nothing: its target is a whole chunk
        if len(right.kept) == 2 * len(nodes):
            left, right = right.every_second(0), right.every_second(1)
        else:
            left = waiting.pop()
        merged = self.model.ops.prune_and_concatenate(
            left.hidden,
            right.hidden,
            left.labels,
            right.labels,
            left.kept,
            right.kept,
            self.pool.cache[: plan.levels[height].first_layer],
            plan.suffix_len,
        )
        self.pool.give(left.labels[:, 2, -plan.suffix_len :])
        return merged

    def _finish(self, nodes: tuple[Node, ...], hidden: Tensor, labels: Tensor) -> Chunk:
        """Run the nodes' layers and prune at the end of the last one (HOMER, sections 3.2 and 3.3).

        At the root nothing but the last row's output is still needed.
        """
        node = nodes[0]
        rows = torch.arange(labels.shape[2], device=labels.device).expand(len(nodes), -1)
        prunes = node.kept < node.context
        is_root = node.height == self.plan.height
        kept = rows

        def select(q_last: Tensor, k: Tensor) -> Tensor:
            nonlocal kept
            if prunes:
                kept, dropped = self._select(node, q_last, k, labels)
                _, sources, slots = labels.gather(2, dropped[:, None].expand(-1, 3, -1)).unbind(1)
                self.pool.give(slots)
                self._pruned_at[sources] = node.height
            return rows[:, -1:] if is_root else kept

        hidden = self._run_layers(node, hidden, labels, select if prunes or is_root else None)
        return Chunk(hidden, labels, kept)

    def _select(
        self, node: Node, q_last: Tensor, k: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The rows that survive the prune of B nodes like `node`, and the ones that do not, each
        [B, rows].
        """
        layer = self.plan.levels[node.height].last_layer - 1
        bias = None if self.bias is None else self.bias[layer]
        return self.model.ops.score_and_select(
            q_last, k, labels[:, 0], bias, node.kept, 0, node.context, score=self.score
        )

    def _run_layers(
        self, node: Node, hidden: Tensor, labels: Tensor, select: Select | None
    ) -> Tensor:
        """The hidden states [B, rows, E] of nodes after their layers; of the rows `select` chooses
        in the last one, if given.
        """
        level = self.plan.levels[node.height]
        return self.model.run(
            range(level.first_layer, level.last_layer),
            hidden,
            labels[:, 0],
            labels[:, 2],
            self.pool.cache,
            self.plan.prefix_len,
            self.rotary,
            select,
        )

    def _result(self, root: Chunk) -> Merged:
        prefix = torch.arange(self.plan.prefix_len, device=root.labels.device)
        kept = root.labels[0].index_select(1, root.kept[0])
        labels = torch.cat([prefix.expand(3, -1), kept], dim=1)
        return Merged(root.hidden[0, -1], labels[0], labels[1], labels[2], self._pruned_at)
