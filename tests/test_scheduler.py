"""One run of a plan over a pool: what it takes, what it leaves, and when it lets go."""

import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from cases import LAYERS, REPEATABLE, Lengths, lengths, peers, random_tokens
from hypothesis import given
from oracle_tree import Settings
from torch import Tensor

from homer_triton.model.llama import Llama
from homer_triton.pool import SlotPool
from homer_triton.scheduler import Chunk, Merged, Scheduler
from homer_triton.tree import Node, Plan

TIGHT = Settings(max_chunk_len=14, target_len=14, layers_warmup=2)


def run(model: Llama, plan: Plan, pool: SlotPool, on_node: Callable[[Node], object] = id) -> Merged:
    """The scheduler over random tokens, without a bias."""
    tokens = torch.tensor(random_tokens(plan.prefix_len + plan.context_len + plan.suffix_len))
    parts = tokens.split([plan.prefix_len, plan.context_len, plan.suffix_len])
    with torch.no_grad():
        return Scheduler(model, plan, pool, None, "max_logit").run(*parts, on_node)


def make_pool(model: Llama, plan: Plan) -> SlotPool:
    """A pool of just the slots that the plan asks for, full of NaN: reading one that was not
    written cannot go unseen.
    """
    cache = model.new_cache(plan.peak_slots).fill_(float("nan"))
    return SlotPool(cache, reserved=plan.prefix_len)


@REPEATABLE
@given(case=lengths(layers=LAYERS, max_leaf_batch=8))
def test_takes_the_planned_slots_and_leaves_the_kept_ones(case: Lengths) -> None:
    model, plan = peers(4, 2)[1], case.plan()
    pool = make_pool(model, plan)
    visited: list[Node] = []
    merged = run(model, plan, pool, visited.append)
    assert visited == [node for nodes in plan.steps() for node in nodes]
    assert pool.high_water == plan.peak_slots
    assert pool.live == plan.rows == len(set(merged.slots.tolist()))
    assert merged.slots[: plan.prefix_len].tolist() == list(range(plan.prefix_len))
    assert pool.cache[:, :, merged.slots].isfinite().all()
    assert merged.hidden.isfinite().all()


@REPEATABLE
@given(case=lengths(layers=LAYERS))
def test_kept_tokens_stay_in_order_with_the_affix_around_them(case: Lengths) -> None:
    model, plan = peers(4, 2)[1], case.plan()
    sources = run(model, plan, make_pool(model, plan)).source_indices.tolist()
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

    run(model, plan, make_pool(model, plan), check)
    assert alive(chunks) == alive(states) == 0


def alive(references: Sequence[weakref.ref]) -> int:
    return sum(reference() is not None for reference in references)


def test_an_interrupted_run_leaves_a_model_that_can_be_used_again() -> None:
    model, plan = peers(4, 2)[1], Lengths(2, 90, 2, LAYERS, TIGHT).plan()
    expected = run(model, plan, make_pool(model, plan))

    def interrupt(node: Node) -> None:
        if node.height == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, plan, make_pool(model, plan), interrupt)
    assert torch.equal(run(model, plan, make_pool(model, plan)).hidden, expected.hidden)
