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
    """A finished node, waiting for its sibling.

    hidden: [1, kept rows, E]; labels: [1, 3, rows], every row's position, source index and slot
    before the prune; kept: [1, kept rows], the rows that survived it.
    """

    hidden: Tensor
    labels: Tensor
    kept: Tensor


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
        for node in self.plan.steps():
            if node.height == 0:
                waiting.append(self._finish(node, *self._leaf(node, context, suffix)))
            else:
                waiting.append(self._finish(node, *self._join(node, waiting)))
            on_node(node)
        return self._result(waiting.pop())

    def _run_prefix(self, prefix: Tensor) -> None:
        """The prefix is the same in every chunk and sees only itself: one pass fills its slots for
        all of them.
        """
        if len(prefix):
            self.model.forward(prefix, self.pool.cache)

    def _leaf(self, node: Node, context: Tensor, suffix: Tensor) -> tuple[Tensor, Tensor]:
        """The embedded tokens [1, rows, E] and the labels [1, 3, rows] of a leaf."""
        plan = self.plan
        start = node.index * plan.leaf_context
        tokens = torch.cat([context[start : start + node.context], suffix])
        rows = torch.arange(len(tokens), device=tokens.device)
        is_suffix = rows >= node.context
        # A short last leaf's suffix stands where every other leaf's does.
        positions = plan.prefix_len + rows + is_suffix * (plan.leaf_context - node.context)
        after_context = plan.context_len - start - node.context
        sources = plan.prefix_len + start + rows + is_suffix * after_context
        labels = torch.stack([positions, sources, self.pool.take(len(tokens))])
        return self.model.embed(tokens[None]), labels[None]

    def _join(self, node: Node, waiting: list[Chunk]) -> tuple[Tensor, Tensor]:
        """The hidden states and labels of a node above the leaves, from its children, which no
        longer wait and of which nothing stays; left's suffix slots are free again.
        """
        plan = self.plan
        if not plan.has_right(node.height, node.index):
            only = waiting.pop()  # pruned by nothing: its target is a whole chunk
            return only.hidden, only.labels
        right, left = waiting.pop(), waiting.pop()
        merged = self.model.ops.prune_and_concatenate(
            left.hidden,
            right.hidden,
            left.labels,
            right.labels,
            left.kept,
            right.kept,
            self.pool.cache[: plan.levels[node.height].first_layer],
            plan.suffix_len,
        )
        self.pool.give(left.labels[:, 2, -plan.suffix_len :])
        return merged

    def _finish(self, node: Node, hidden: Tensor, labels: Tensor) -> Chunk:
        """Run the node's layers and prune at the end of the last one (HOMER, sections 3.2 and 3.3).

        At the root nothing but the last row's output is still needed.
        """
        rows = torch.arange(labels.shape[2], device=labels.device)[None]
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
        """The rows that survive a node's prune and the ones that do not, each [1, rows]."""
        layer = self.plan.levels[node.height].last_layer - 1
        bias = None if self.bias is None else self.bias[layer]
        return self.model.ops.score_and_select(
            q_last, k, labels[:, 0], bias, node.kept, 0, node.context, score=self.score
        )

    def _run_layers(
        self, node: Node, hidden: Tensor, labels: Tensor, select: Select | None
    ) -> Tensor:
        """A node's hidden states [1, rows, E] after its layers; of the rows that `select` chooses
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
