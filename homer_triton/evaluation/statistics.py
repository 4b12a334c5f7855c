"""Intervals: how far a measured figure can be from the one that more samples would give."""

import math
from collections.abc import Sequence

import torch

# Two-sided 95 % of a normal distribution.
_Z = 1.959964


def wilson_interval(right: float, total: int) -> tuple[float, float]:
    """The 95 % interval of a share, `right` of `total` (Wilson 1927); (0, 1) of nothing.

    Where answers can be right in part, `right` is the sum of their scores, each from 0 to 1. The
    interval is then wider than it need be: no scores of the same mean spread more than 0 and 1.
    """
    if total == 0:
        return 0.0, 1.0
    share, spread = right / total, _Z * _Z / total
    centre = (share + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(
    losses: Sequence[float], weights: Sequence[int], seed: int, resamples: int = 2000
) -> tuple[float, float]:
    """The 95 % interval of a perplexity, by drawing segments with replacement (Efron 1979).

    losses: each segment's mean loss in nats; weights: its tokens. Segments of one document are
    taken as independent. One segment has no spread: both ends are its perplexity.
    """
    mean = torch.tensor(losses, dtype=torch.float64)
    tokens = torch.tensor(weights, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(mean), (resamples, len(mean)), generator=generator)
    means = (mean * tokens)[draws].sum(1) / tokens[draws].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).exp().tolist()
    return low, high
