"""Other ways to decide what is pruned, for the ablation; all else is the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..engine.scheduler import POSITIONS, SLOTS, Scheduler
from ..engine.tree import Node
from ..kernels.reference import spread


class RandomScheduler(Scheduler):
    """Keeps random rows instead of the most significant ones."""

    def __init__(self, *args: Any, seed: int) -> None:
        super().__init__(*args)
        self._generator = torch.Generator().manual_seed(seed)

    def select(
        self,
        node: Node,
        layer: int,
        q: Tensor,
        k: Tensor,
        labels: Tensor,
        votes: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        batch, _, rows = labels.shape
        draws = torch.rand(batch, node.context, generator=self._generator)
        order = draws.argsort(1).to(labels.device)
        affix = torch.arange(node.context, rows, device=labels.device).expand(batch, -1)
        kept = torch.cat([order[:, : node.kept].sort(1).values, affix], dim=1)
        return kept, order[:, node.kept :].sort(1).values


class LayerwiseScheduler(Scheduler):
    """Without propagative refinement: what is pruned from the keys and values of the layers before
    the last is decided by each layer's own scores, or at random, not by the last layer's.

    Hidden states are pruned as ever. Layers then keep different tokens, so that positions and
    source indices tell the truth about the last layer run only.
    """

    def __init__(self, *args: Any, seed: int | None = None) -> None:
        """seed: keep random rows; left out, those with the best scores of the layer itself."""
        super().__init__(*args)
        if self.plan.offload:
            raise ValueError("Significance by slot is lost with offload; leave it out.")
        if not self.pools:
            raise ValueError('Layers keep tokens of their own only where recompute is not "all".')
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)
        self._significance = [torch.zeros(len(x[0]), device=x.device) for x in self.layers]

    def chooses(self, node: Node) -> bool:
        return True

    def observe(
        self,
        node: Node,
        layer: int,
        q: Tensor,
        k: Tensor,
        labels: Tensor,
        votes: Tensor | None,
    ) -> Tensor | None:
        """As ever; notes by slot how significant the layer finds its rows."""
        slots = labels[:, SLOTS + node.height]
        self._significance[layer][slots] = self._score(layer, q, k, labels)
        return super().observe(node, layer, q, k, labels, votes)

    def select(
        self,
        node: Node,
        layer: int,
        q: Tensor,
        k: Tensor,
        labels: Tensor,
        votes: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The last layer's choice, into whose slots every earlier layer moves its own."""
        self._significance[layer][labels[:, SLOTS + node.height]] = self._score(layer, q, k, labels)
        kept, dropped = super().select(node, layer, q, k, labels, votes)
        for level in self.plan.levels[: node.height + 1]:
            slots = labels[:, SLOTS + level.height, : node.context]
            places = slots.gather(1, kept[:, : node.kept])
            last = level.last_layer - (level.height == node.height)
            for own_layer in range(level.first_layer, last):
                cache, significance = self.layers[own_layer], self._significance[own_layer]
                best = significance[slots].topk(node.kept, dim=1).indices.sort(1).values
                own = slots.gather(1, best)
                cache[:, places] = cache[:, own]
                significance[places] = significance[own]
        return kept, dropped

    def _score(self, layer: int, q: Tensor, k: Tensor, labels: Tensor) -> Tensor:
        """How significant a layer finds each row of B chunks, [B, rows]."""
        if self._generator is not None:
            return torch.rand(k.shape[:2], generator=self._generator).to(k.device)
        # A layer without a retrieval head asks all of its heads, or it would choose nothing.
        weights = self.weights(layer) if self.asked[layer] else None
        scores = self.score(layer, q, k, weights).float()
        if self.bias is not None:
            positions = labels[:, POSITIONS]
            return scores - self.bias[layer][positions[:, -1:] - positions]
        return spread(scores, self.reach)
