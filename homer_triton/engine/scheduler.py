"""Walks a plan depth first: runs each node's layers, prunes, merges siblings, and keeps only what
is still needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.reference import select_rows, spread
from ..model.llama import Llama, Pass
from ..selection import Selection
from .graphs import Replays
from .offload import HostStore, Stored
from .pool import SlotPool
from .retrieval import retrieval_heads
from .tree import Node, Plan

# Rows of the labels; below them come the slots in each level's pool, the leaves' first.
POSITIONS, SOURCES, SLOTS = range(3)


@dataclass(frozen=True)
class Chunk:
    """B finished nodes of equal shape, side by side, waiting for siblings or for their parents.

    hidden: [B, kept rows, E]; labels: [B, K, rows], every row's position, source index, and slot in
    the pool of each level so far, before the prune; kept: [B, kept rows], the rows that survived
    it.
    """

    hidden: Tensor
    labels: Tensor
    kept: Tensor

    def every_second(self, first: int) -> Chunk:
        """The left (0) or the right (1) ones of the batch's pairs of siblings."""
        return Chunk(self.hidden[first::2], self.labels[first::2], self.kept[first::2])

    def kept_labels(self) -> Tensor:
        """The labels of the kept rows alone, [B, K, kept rows]."""
        rows = self.kept[:, None].expand(-1, self.labels.shape[1], -1)
        return self.labels.gather(2, rows)


@dataclass(frozen=True)
class Parked:
    """A waiting chunk in host memory: all but its positions and source indices [B, 2, rows]."""

    labels: Tensor
    stored: Stored


@dataclass(frozen=True)
class Merged:
    """What is left of D documents at the root.

    hidden: [D, E], the last row's; positions, source_indices: [D, T']; slots: [D, levels, T'];
    pruned_at: [D, tokens] int8, the height at which each input token was pruned, -1 if kept.
    """

    hidden: Tensor
    positions: Tensor
    source_indices: Tensor
    slots: Tensor
    pruned_at: Tensor


class Scheduler:
    """One run of a plan over a slot pool for each level, of `plan.slots(documents)` slots.

    All documents of the run share its plan and its prefix; B nodes side by side are the nodes of a
    step, document by document. pools: none where only the choice of tokens matters: keys and values
    then go with their layer. replays: captures the steps in CUDA graphs.
    """

    def __init__(
        self,
        model: Llama,
        plan: Plan,
        pools: Sequence[SlotPool],
        bias: Tensor | None,
        selection: Selection,
        documents: int = 1,
        replays: Replays | None = None,
    ) -> None:
        self.model = model
        self.plan = plan
        self.pools = pools
        self.bias = bias
        # Which heads of a layer count, [L, HQ]; None for all of them.
        self.heads = None
        if selection.heads == "retrieval" and plan.prunes:
            self.heads = retrieval_heads(model)
        if selection.heads == "retrieval" and self.heads is None:
            selection = selection.without_retrieval()
        self.asked = [True] * plan.num_layers if self.heads is None else self.heads.any(1).tolist()
        self.selection = selection
        self.asking = selection.asking(plan.suffix_len)
        self.reach = selection.reach(plan.max_chunk_len - plan.prefix_len - plan.suffix_len)
        self.documents = documents
        self.layers = [layer for pool in pools for layer in pool.cache] or list(
            model.new_cache(plan.prefix_len, plan.layers_tree)
        )
        self.rotary = model.rotary(plan.chunk_end)
        self._replays = replays
        self._store = HostStore(model.device)
        shape = (documents, plan.input_len)
        # By source index, what the nodes so far gave it, if that counts.
        self._voted: Tensor | None = None
        if selection.remembers:
            wide = torch.promote_types(model.dtype, torch.float32)
            self._voted = torch.zeros(shape, dtype=wide, device=model.device)
        self._pruned_at = torch.full(shape, -1, dtype=torch.int8, device=model.device)

    def clear(self) -> None:
        """Be as new, for another run of the same plan: all memory stays where it is, and with it
        the captured steps.
        """
        for pool in self.pools:
            pool.clear()
        if self._voted is not None:
            self._voted.zero_()
        # The last run's result has the old one.
        self._pruned_at = torch.full_like(self._pruned_at, -1)

    def run(
        self, prefix: Tensor, contexts: Tensor, suffixes: Tensor, on_node: Callable[[Node], None]
    ) -> Merged | None:
        """Encode `prefix ‖ context ‖ suffix` of D documents: token ids [P], [D, C] and [D, S] on
        the model's device; `on_node` hears of each node. None where another rank has the result.
        """
        self._run_prefix(prefix)
        waiting: list[Chunk | Parked] = []
        for nodes in self.steps():
            self._step(nodes, waiting, contexts, suffixes)
            for node in nodes:
                on_node(node)
        return self._end(waiting)

    def _run_prefix(self, prefix: Tensor) -> None:
        """The prefix is the same in every chunk and sees only itself: one pass fills its slots for
        all of them.
        """
        if not len(prefix):
            return
        rows = torch.arange(len(prefix), device=prefix.device)[None]
        run = Pass(self.model, rows, self.layers, rows, rotary=self.rotary)
        run.layers(range(len(self.layers)), self.model.embed(prefix[None]), rows[:, -1:])

    def steps(self) -> Iterator[tuple[Node, ...]]:
        """The plan's steps that are run here, in their order."""
        return self.plan.steps()

    def _step(
        self,
        nodes: tuple[Node, ...],
        waiting: list[Chunk | Parked],
        contexts: Tensor,
        suffixes: Tensor,
    ) -> None:
        """Run a step's nodes, which then wait in place of their children."""
        # No name for a chunk here: its memory must go when its parent's begins.
        waiting.append(self._finish(nodes, *self._begin(nodes, waiting, contexts, suffixes)))

    def _end(self, waiting: list[Chunk | Parked]) -> Merged | None:
        """What is left once all steps are done, of the root alone."""
        (root,) = waiting
        assert isinstance(root, Chunk)
        return self._result(root)

    def _begin(
        self,
        nodes: tuple[Node, ...],
        waiting: list[Chunk | Parked],
        contexts: Tensor,
        suffixes: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """What a step's nodes start from: hidden states [B, rows, E] and labels [B, K, rows]."""
        if nodes[0].height == 0:
            inputs = self._leaves(nodes, contexts, suffixes)
        else:
            inputs = self._join(nodes, waiting)
        if nodes[0].index % 2 and waiting and isinstance(waiting[-1], Parked):
            self._store.prefetch(waiting[-1].stored)  # the sibling on the left: its turn is next
        return inputs

    def _leaves(
        self, nodes: tuple[Node, ...], contexts: Tensor, suffixes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The embedded tokens [B, rows, E] and the labels [B, 3, rows] of leaves."""
        plan, count, width = self.plan, len(nodes), nodes[0].context
        start = nodes[0].index * plan.leaf_context
        parts = contexts[:, start : start + count * width].reshape(-1, width)
        ends = suffixes.repeat_interleave(count, 0)
        tokens = torch.cat([parts, ends], dim=1)
        rows = torch.arange(tokens.shape[1], device=tokens.device)
        is_suffix = rows >= width
        # A short last leaf's suffix stands where every other leaf's does.
        positions = plan.prefix_len + rows + is_suffix * (plan.leaf_context - width)
        starts = start + width * torch.arange(count, device=tokens.device)
        starts = starts.repeat(self.documents)[:, None]
        after_context = plan.context_len - starts - width
        sources = plan.prefix_len + starts + rows + is_suffix * after_context
        labels = torch.stack([positions.expand_as(sources), sources], dim=1)
        return self.model.embed(tokens), self._take_slots(labels, 0)

    def _take_slots(self, labels: Tensor, height: int) -> Tensor:
        """Labels with slots in the pool of a level added for all rows, if there are pools."""
        if not self.pools:
            return labels
        batch, _, rows = labels.shape
        slots = self.pools[height].take(batch * rows).view(batch, 1, rows)
        return torch.cat([labels, slots], dim=1)

    def _join(
        self, nodes: tuple[Node, ...], waiting: list[Chunk | Parked]
    ) -> tuple[Tensor, Tensor]:
        """The hidden states and labels of nodes above the leaves, from their children, which no
        longer wait and of which nothing stays; left's suffix slots are free again.
        """
        plan, height, suffix = self.plan, nodes[0].height, self.plan.suffix_len
        right = self._next(waiting)
        if not plan.has_right(height, nodes[0].index):
            # Pruned by nothing: its target is a whole chunk.
            return right.hidden, self._take_slots(right.labels, height)
        if len(right.kept) == 2 * len(nodes) * self.documents:
            left, right = right.every_second(0), right.every_second(1)
        else:
            left = self._next(waiting)
        hidden, labels = self.model.ops.prune_and_concatenate(
            left.hidden,
            right.hidden,
            left.labels,
            right.labels,
            left.kept,
            right.kept,
            suffix,
        )
        for slots, pool in enumerate(self.pools[:height], SLOTS):
            freed, stays = (side.labels[:, slots, -suffix:] for side in (left, right))
            self.model.ops.average_affix_(pool.cache, freed, stays)
            pool.give(freed)
        return hidden, self._take_slots(labels, height)

    def _finish(self, nodes: tuple[Node, ...], hidden: Tensor, labels: Tensor) -> Chunk | Parked:
        """Run the nodes' layers and prune at the end of the last (HOMER, sections 3.2 and 3.3)."""
        node = nodes[0]

        def compute(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            with self.model.own_dtype():
                return self._compute(node, hidden, labels)

        if self._replays is None:
            hidden, kept, dropped = compute(hidden, labels)
        else:
            key = (node.height, len(labels), node.context, node.kept)
            hidden, kept, dropped = self._replays(key, compute, hidden, labels)
        if dropped.shape[1]:
            rows = dropped[:, None].expand(-1, labels.shape[1], -1)
            _, sources, *slots = labels.gather(2, rows).unbind(1)
            for pool, freed in zip(self.pools, slots, strict=False):
                pool.give(freed)
            self._pruned_at.scatter_(1, sources.reshape(self.documents, -1), node.height)
        chunk = Chunk(hidden, labels, kept)
        return self._park(chunk) if self.plan.offload and self.plan.waits(nodes) else chunk

    def _compute(self, node: Node, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The kept rows' hidden states [B, kept rows, E], which rows they are, and which are not.

        At the root nothing but the last row's output is still needed.
        """
        level = self.plan.levels[node.height]
        kept = rows = torch.arange(labels.shape[2], device=labels.device).expand(len(labels), -1)
        dropped = rows[:, :0]
        chooses, is_root = self.chooses(node), node.height == self.plan.height
        votes = self._votes_below(labels) if self._voted is not None else None
        run = Pass(
            self.model,
            labels[:, POSITIONS],
            self.layers,
            labels[:, SLOTS + node.height] if self.pools else None,
            self.plan.prefix_len,
            self.rotary,
        )
        last = level.last_layer - 1
        for layer in range(level.first_layer, last):
            q, k, v = run.project(layer, hidden)
            votes = self.observe(node, layer, q[:, -self.asking :], k, labels, votes)
            hidden = run.attend(layer, hidden, q, k, v)
            del q, k, v
            run.feed_forward_(layer, hidden)
        if not chooses:
            return run.layer(last, hidden, rows[:, -1:] if is_root else None), kept, dropped
        # The keys decide first: pruned tokens get no queries and do not go through the MLP.
        k, v = run.project_keys(last, hidden)
        q = run.last_queries(last, hidden, self.asking)
        kept, dropped = self.select(node, last, q, k, labels, votes)
        hidden = run.attend_from(last, hidden, rows[:, -1:] if is_root else kept, k, v)
        del q, k, v
        run.feed_forward_(last, hidden)
        return hidden, kept, dropped

    def chooses(self, node: Node) -> bool:
        """Whether the last layer of nodes like `node` looks at their rows, by `select`."""
        return node.kept < node.context or self._voted is not None

    def observe(
        self,
        node: Node,
        layer: int,
        q: Tensor,
        k: Tensor,
        labels: Tensor,
        votes: Tensor | None,
    ) -> Tensor | None:
        """The votes so far [B, rows], with those of a layer before the nodes' last.

        q: the asking rows' queries [B, asking, HQ, D]; k: all keys [B, rows, HKV, D].
        """
        if not (self.selection.asks_all_layers and self.asked[layer] and self.chooses(node)):
            return votes
        own = self.score(layer, q, k, self.weights(layer))
        return own if votes is None else votes + own

    def _votes_below(self, labels: Tensor) -> Tensor:
        """What the nodes below gave each row of B chunks, [B, rows]."""
        assert self._voted is not None
        sources = labels[:, SOURCES]
        return self._voted.gather(1, sources.reshape(self.documents, -1)).view(sources.shape)

    def score(self, layer: int, q: Tensor, k: Tensor, weights: Tensor | None) -> Tensor:
        """What a layer's asking rows give each row of B chunks, [B, rows]. weights: each head's, as
        `weights` returns them.
        """
        selection, before = self.selection, self._prefix_keys(layer)
        return self.model.ops.score_rows(q, k, before, selection.logit, selection.join, weights)

    def weights(self, layer: int) -> Tensor | None:
        """How much each head of a layer counts, [HQ], if not all do alike."""
        return None if self.heads is None else self.heads[layer]

    def _prefix_keys(self, layer: int) -> Tensor:
        """A layer's keys of the prefix, [P, HKV, D]."""
        return self.layers[layer][0, : self.plan.prefix_len]

    def select(
        self,
        node: Node,
        layer: int,
        q: Tensor,
        k: Tensor,
        labels: Tensor,
        votes: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The rows that survive the prune of B nodes like `node`, and the ones that do not, each
        [B, rows]. votes: what was given before, by the node's other layers or the nodes below.
        """
        ops, selection = self.model.ops, self.selection
        if selection.is_paper:
            bias = None if self.bias is None else self.bias[layer]
            positions = labels[:, POSITIONS]
            return ops.score_and_select(q[:, -1], k, positions, bias, node.kept, 0, node.context)
        kept, dropped, votes = ops.vote_and_select(
            q,
            k,
            self._prefix_keys(layer),
            votes,
            node.kept,
            0,
            node.context,
            selection.logit,
            selection.join,
            self.reach,
            self.weights(layer),
        )
        if self._voted is not None:
            sources = labels[:, SOURCES].reshape(self.documents, -1)
            self._voted.scatter_(1, sources, votes.reshape(self.documents, -1))
        return kept, dropped

    def _park(self, chunk: Chunk) -> Parked:
        """Move a chunk to host memory."""
        labels, parts = self._take_out(chunk)
        return Parked(labels, self._store.put(parts))

    def _take_out(self, chunk: Chunk) -> tuple[Tensor, list[Tensor]]:
        """A chunk's labels without slots, which are free again, and the rest of it: hidden states,
        and keys and values by level.
        """
        labels = chunk.kept_labels()
        parts = [chunk.hidden]
        for slots, pool in zip(labels[:, SLOTS:].unbind(1), self.pools, strict=False):
            parts.append(pool.cache[:, :, slots])
            pool.give(slots)
        return labels[:, :SLOTS], parts

    def _next(self, waiting: list[Chunk | Parked]) -> Chunk:
        """The chunk that waits last, which no longer does."""
        chunk = waiting.pop()
        if isinstance(chunk, Chunk):
            return chunk
        hidden, *parts = self._store.get(chunk.stored)
        labels = chunk.labels
        for height, part in enumerate(parts):
            labels = self._take_slots(labels, height)
            self.pools[height].cache[:, :, labels[:, -1]] = part
        kept = torch.arange(labels.shape[2], device=labels.device).expand(len(labels), -1)
        return Chunk(hidden, labels, kept)

    def _result(self, root: Chunk) -> Merged:
        kept = root.kept_labels()
        prefix = torch.arange(self.plan.prefix_len, device=kept.device)
        labels = torch.cat([prefix.expand(*kept.shape[:2], -1), kept], dim=2)
        sources = labels[:, SOURCES]
        if self._voted is not None and self.plan.recompute == "all" and self.plan.height:
            sources = self._sources_by_votes()
        return Merged(
            root.hidden[:, -1], labels[:, POSITIONS], sources, labels[:, SLOTS:], self._pruned_at
        )

    def _sources_by_votes(self) -> Tensor:
        """The sources [D, T'] of as many tokens as the root kept, chosen from all of them: where a
        vote's neighbours were in another chunk, they come back.
        """
        assert self._voted is not None
        plan, keep = self.plan, self.plan.levels[-1].nodes[0].kept
        first, stop = plan.prefix_len, plan.prefix_len + plan.context_len
        best = spread(self._voted[:, first:stop], self.reach)
        kept, _ = select_rows(best, plan.input_len, keep, first, stop)
        self._pruned_at.masked_fill_(self._pruned_at < 0, plan.height)
        self._pruned_at.scatter_(1, kept, -1)
        return kept
