"""One run of a plan over a pool: what it takes, what it leaves, and when it lets go."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from cases import LAYERS, REPEATABLE, Lengths, lengths, peers, random_tokens
from hypothesis import given
from oracle_tree import Settings
from torch import Tensor

from homer_triton.engine.pool import SlotPool, make_pools
from homer_triton.engine.scheduler import Chunk, Merged, Scheduler
from homer_triton.engine.tree import Node, Plan
from homer_triton.model.llama import Llama
from homer_triton.selection import PAPER

TIGHT = Settings(max_chunk_len=14, target_len=14, layers_warmup=2)

Pools = list[SlotPool]


def run(model: Llama, plan: Plan, pools: Pools, on_node: Callable[[Node], object] = id) -> Merged:
    """The scheduler over random tokens, without a bias."""
    tokens = torch.tensor(random_tokens(plan.prefix_len + plan.context_len + plan.suffix_len))
    before, middle, after = tokens.split([plan.prefix_len, plan.context_len, plan.suffix_len])
    with torch.no_grad():
        walk = Scheduler(model, plan, pools, None, PAPER)
        return walk.run(before, middle[None], after[None], on_node)


def poisoned_pools(model: Llama, plan: Plan) -> Pools:
    """Pools full of NaN: reading a slot that was not written cannot go unseen."""
    pools = make_pools(model, plan)
    for pool in pools:
        pool.cache.fill_(float("nan"))
    return pools


@REPEATABLE
@given(case=lengths(layers=LAYERS, max_leaf_batch=8, may_offload=True))
def test_takes_the_planned_slots_and_leaves_the_kept_ones(case: Lengths) -> None:
    model, plan = peers(4, 2)[1], case.plan()
    pools = poisoned_pools(model, plan)
    visited: list[Node] = []
    merged = run(model, plan, pools, visited.append)
    assert visited == [node for nodes in plan.steps() for node in nodes]
    for pool, planned, slots in zip(pools, plan.slots(), merged.slots[0], strict=True):
        assert pool.high_water == planned
        assert pool.live == plan.rows == len(set(slots.tolist()))
        assert slots[: plan.prefix_len].tolist() == list(range(plan.prefix_len))
        assert pool.cache[:, :, slots].isfinite().all()
    assert merged.hidden.isfinite().all()


@REPEATABLE
@given(case=lengths(layers=LAYERS))
def test_kept_tokens_stay_in_order_with_the_affix_around_them(case: Lengths) -> None:
    model, plan = peers(4, 2)[1], case.plan()
    sources = run(model, plan, poisoned_pools(model, plan)).source_indices[0].tolist()
    tokens = case.prefix + case.context + case.suffix
    assert sources == sorted(set(sources))
    assert sources[: case.prefix] == list(range(case.prefix))
    assert sources[-case.suffix :] == list(range(tokens - case.suffix, tokens))


@pytest.mark.parametrize(("prefix", "context", "suffix"), [(2, 90, 2), (0, 55, 1), (1, 70, 3)])
def test_merged_children_are_freed(
    prefix: int, context: int, suffix: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a node runs and after it, nothing is alive but it and the siblings that wait."""
    model = peers(4, 2)[1]
    plan = Lengths(prefix, context, suffix, LAYERS, TIGHT).plan()
    assert plan.height >= 3
    waiting: list[Node] = []
    chunks: list[weakref.ref[Chunk]] = []
    states: list[weakref.ref[Tensor]] = []
    finish = Scheduler._finish

    def watched(scheduler: Scheduler, nodes: tuple[Node, ...], *rows: Tensor) -> Chunk:
        (node,) = nodes
        if node.height:
            del waiting[-1 - plan.has_right(node.height, node.index) :]
        assert alive(chunks) == len(waiting)
        chunk = finish(scheduler, nodes, *rows)
        chunks.append(weakref.ref(chunk))
        states.append(weakref.ref(chunk.hidden))
        waiting.append(node)
        return chunk

    monkeypatch.setattr(Scheduler, "_finish", watched)

    def check(_: Node) -> None:
        assert alive(chunks) == alive(states) == len(waiting)

    run(model, plan, poisoned_pools(model, plan), check)
    assert alive(chunks) == alive(states) == 0


def alive(references: Sequence[weakref.ref]) -> int:
    return sum(reference() is not None for reference in references)


def test_an_interrupted_run_leaves_a_model_that_can_be_used_again() -> None:
    model, plan = peers(4, 2)[1], Lengths(2, 90, 2, LAYERS, TIGHT).plan()
    expected = run(model, plan, poisoned_pools(model, plan))

    def interrupt(node: Node) -> None:
        if node.height == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, plan, poisoned_pools(model, plan), interrupt)
    assert torch.equal(run(model, plan, poisoned_pools(model, plan)).hidden, expected.hidden)


def test_what_waits_in_host_memory_takes_no_slots() -> None:
    plans = [Lengths(2, 10 * 2**h, 2, 12, TIGHT, offload=True).plan() for h in range(2, 9)]
    affix, chunk = 4, TIGHT.max_chunk_len
    assert len({plan.peak_slots for plan in plans}) == 1
    assert all(plan.peak_slots <= chunk + affix for plan in plans)
    kept = Lengths(2, 10 * 2**8, 2, 12, TIGHT).plan()
    assert kept.peak_slots > 2 * plans[-1].peak_slots


def test_offloading_changes_no_bit() -> None:
    model, case = peers(4, 2)[1], Lengths(2, 90, 2, LAYERS, TIGHT)
    stays, moves = (
        run(model, plan, poisoned_pools(model, plan))
        for plan in (case.plan(), replace(case, offload=True).plan())
    )
    for name in ("hidden", "positions", "source_indices", "pruned_at"):
        assert torch.equal(getattr(stays, name), getattr(moves, name)), name


@pytest.mark.slow
def test_nothing_in_the_tree_waits_for_a_value() -> None:
    """On tensors without data every read of a value is an error: no GPU's host ever waits."""
    model, plan = peers(4, 2)[1], Lengths(2, 90, 2, LAYERS, TIGHT).plan()
    empty = without_data(model)
    pools = make_pools(empty, plan)
    ids = [
        torch.zeros(shape, dtype=torch.int64, device="meta") for shape in ((2,), (1, 90), (1, 2))
    ]
    bias = torch.zeros(LAYERS, 20, device="meta")
    visited: list[Node] = []
    with torch.no_grad():
        merged = Scheduler(empty, plan, pools, bias, PAPER).run(*ids, visited.append)
    assert merged.slots.shape == (1, plan.height + 1, plan.rows)
    assert len(visited) == sum(len(level.nodes) for level in plan.levels)


def without_data(model: Llama) -> Llama:
    """The model with weights that have shapes but no numbers."""

    def emptied(weights: object) -> object:
        if isinstance(weights, Tensor):
            return weights.to("meta")
        return tuple(map(emptied, weights)) if isinstance(weights, tuple) else weights

    def emptied_fields(part: Any) -> Any:
        return replace(
            part, **{f.name: emptied(getattr(part, f.name)) for f in fields(part) if f.init}
        )

    weights = emptied_fields(model.weights)
    weights.layers = [emptied_fields(layer) for layer in weights.layers]
    return Llama(model.config, weights, model.ops)
