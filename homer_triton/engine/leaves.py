"""How many leaves run side by side, where nobody says. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .tree import Plan

# Rows of a step that keep a chip busy, the documents' together. A GPU multiplies a thousand rows at
# four fifths of its rate and two thousand at nearly all of it, but a small model's layer takes it
# less time than a host takes to launch. On a CPU, more rows than these gained nothing measurable.
ROWS_ON_GPU, ROWS_ON_CPU = 4096, 1024
# What a step of many leaves may take is as much again as one leaf at a time does, or what any
# machine has to spare.
SPARE_BYTES = 256 * 2**20


def with_leaves_at_once(plan: Plan, documents: int, on_gpu: bool, ranks: int) -> Iterator[Plan]:
    """The plan with as many leaves at once as keep a chip busy, and with ever fewer, down to one;
    only such numbers as its tree has steps of, and as leave every rank its share.
    """
    rows = documents * (plan.leaf_context + plan.suffix_len)
    least = -(-(ROWS_ON_GPU if on_gpu else ROWS_ON_CPU) // rows)
    for doublings in range(min((least - 1).bit_length(), plan.height), 0, -1):
        more = replace(plan, leaf_batch=2**doublings)
        if _shares_well(more, ranks) and max(map(len, more.steps())) == more.leaf_batch:
            yield more
    yield replace(plan, leaf_batch=1)


def most_memory(one_at_a_time: int) -> int:
    """The bytes that a plan may take where there is no budget, by what it takes with one leaf at a
    time.
    """
    return max(2 * one_at_a_time, SPARE_BYTES)


def _shares_well(plan: Plan, ranks: int) -> bool:
    """Whether the rank that has the most leaves has at most a quarter more than it must have."""
    leaves = len(plan.levels[0].nodes)
    groups = -(-leaves // plan.leaf_batch)
    most = -(-groups // ranks) * plan.leaf_batch
    return 4 * most <= 5 * -(-leaves // ranks)
