"""The plan against the oracle's tree, and its predictions against what running it takes."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import REPEATABLE, Lengths, lengths, random_tokens, to_config
from checkpoints import random_model
from hypothesis import given
from oracle_tree import Settings, lay_out, peak_tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import homer_triton as ht
from homer_triton.engine import leaves
from homer_triton.engine.leaves import ROWS_ON_CPU, ROWS_ON_GPU, SPARE_BYTES
from homer_triton.engine.tree import Plan, build_plan
from homer_triton.kernels import products


@REPEATABLE
@given(case=lengths(max_height=7))
def test_plan_equals_the_oracles_tree(case: Lengths) -> None:
    plan = case.plan()
    tree = lay_out(case.prefix, case.context, case.suffix, case.layers, case.settings)
    assert plan.leaf_context == tree.leaf_context
    assert [node.context for node in plan.levels[0].nodes] == tree.leaves
    assert [range(x.first_layer, x.last_layer) for x in plan.levels] == tree.layers
    assert [len(level.nodes) for level in plan.levels] == [len(nodes) for nodes in tree.heights]
    affix = case.prefix + case.suffix
    for level, nodes in zip(plan.levels, tree.heights, strict=True):
        for node, expected in zip(level.nodes, nodes, strict=True):
            assert affix + node.kept == min(affix + node.context, expected.target)


@REPEATABLE
@given(case=lengths(max_height=7))
def test_plan_loses_no_token_and_no_layer(case: Lengths) -> None:
    plan = case.plan()
    assert sum(node.context for node in plan.levels[0].nodes) == case.context
    assert plan.levels[0].first_layer == 0
    assert plan.num_layers == case.layers
    affix = case.prefix + case.suffix
    for below, level in pairwise(plan.levels):
        assert level.first_layer == below.last_layer
        assert sum(n.context for n in level.nodes) == sum(n.kept for n in below.nodes)
    for level in plan.levels:
        assert all(0 <= node.kept <= node.context for node in level.nodes)
        assert all(affix + node.context <= case.settings.max_chunk_len for node in level.nodes)
    assert plan.rows <= case.settings.target_len


@REPEATABLE
@given(case=lengths(max_height=7))
def test_steps_run_children_before_parents_and_left_before_right(case: Lengths) -> None:
    plan = case.plan()
    steps = [node for nodes in plan.steps() for node in nodes]
    assert sorted(steps, key=lambda n: (n.height, n.index)) == [
        node for level in plan.levels for node in level.nodes
    ]
    order = {(node.height, node.index): i for i, node in enumerate(steps)}
    for height, index in order:
        if height:
            children = [order[height - 1, 2 * index]]
            if plan.has_right(height, index):
                children.append(order[height - 1, 2 * index + 1])
            assert children == sorted(children)
            assert children[-1] == order[height, index] - 1


@REPEATABLE
@given(case=lengths(max_height=7, max_leaf_batch=8))
def test_higher_levels_need_no_more_slots_than_lower_ones(case: Lengths) -> None:
    plan = case.plan()
    slots = plan.slots()
    assert list(slots) == sorted(slots, reverse=True)
    assert slots[-1] == plan.prefix_len + plan.levels[-1].nodes[0].context + plan.suffix_len
    assert [n - plan.prefix_len for n in plan.slots(3)] == [
        3 * (n - plan.prefix_len) for n in slots
    ]


@REPEATABLE
@given(case=lengths(max_height=7))
def test_peak_slots_are_the_oracles(case: Lengths) -> None:
    expected = peak_tokens(case.prefix, case.context, case.suffix, case.layers, case.settings)
    assert case.plan().peak_slots == expected


def test_a_batch_of_leaves_merges_upward_and_a_ragged_end_runs_alone() -> None:
    plan = build_plan(1, 45, 1, 8, 10, 10, 2, leaf_batch=4)
    shapes = [(nodes[0].height, [node.index for node in nodes]) for nodes in plan.steps()]
    assert shapes == [
        (0, [0, 1, 2, 3]),
        (1, [0, 1]),
        (2, [0]),
        (0, [4, 5]),
        (1, [2]),
        (0, [6]),
        (0, [7]),
        (1, [3]),
        (2, [1]),
        (3, [0]),
    ]


def test_a_tree_by_hand() -> None:
    """Six leaves of three tokens: two empty ones are dropped, so a node of height 1 waits alone."""
    plan = build_plan(
        prefix_len=1, context_len=18, suffix_len=2, num_layers=12, max_chunk_len=7, target_len=6,
        layers_warmup=3,
    )  # fmt: skip
    assert [[(n.context, n.kept) for n in level.nodes] for level in plan.levels] == [
        [(3, 2), (3, 2), (3, 2), (3, 2), (3, 2), (3, 2)],
        [(4, 2), (4, 2), (4, 4)],
        [(4, 2), (4, 2)],
        [(4, 3)],
    ]
    ranges = [(level.first_layer, level.last_layer) for level in plan.levels]
    assert ranges == [(0, 6), (6, 8), (8, 10), (10, 12)]
    assert (plan.height, plan.rows, plan.next_position) == (3, 6, 6)
    assert Plan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context_len": 0}, "context is empty"),
        ({"suffix_len": 0}, "suffix is empty"),
        ({"max_chunk_len": 5}, "max_chunk_len=5 no room.*at least 6"),
        ({"target_len": 5}, "target_len=5 leaves no room.*at least 6"),
        ({"layers_warmup": 8}, "layers_warmup=8 must be.*8 layers"),
        ({"layers_tree": 9}, "layers_tree=9 must be at least 1 and at most the model's 8"),
        ({"layers_tree": 6}, 'layers_tree=6 of 8 layers.*set recompute="all"'),
        ({"layers_warmup": -1}, "layers_warmup=-1 must be"),
        ({"context_len": 10_000}, "raise max_chunk_len or lower layers_warmup"),
        ({"layers_warmup": 7}, "raise max_chunk_len or lower layers_warmup"),
    ],
)
def test_refuses_lengths_that_do_not_fit(change: dict[str, int], message: str) -> None:
    fitting = {
        "prefix_len": 2, "context_len": 30, "suffix_len": 3, "num_layers": 8,
        "max_chunk_len": 15, "target_len": 15, "layers_warmup": 3,
    }  # fmt: skip
    assert build_plan(**fitting).height == 2
    with pytest.raises(ValueError, match=message):
        build_plan(**fitting | change)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_chunk_len": 0}, "max_chunk_len=0"),
        ({"target_len": -5}, "target_len=-5"),
        ({"layers_warmup": -1}, "layers_warmup=-1"),
        ({"layers_tree": 0}, "layers_tree=0"),
        ({"recompute": "both"}, "recompute='both'.*none, suffix, all"),
        ({"selection": "l2"}, "selection='l2'.*paper or votes.*rows, logit"),
        ({"selection": 3}, "selection is a int"),
        ({"selection": "votes,window=4"}, "window=4 must be odd"),
        (
            {"selection": "votes", "calibration": ht.Calibration(torch.ones(2, 3))},
            'leave it out or set selection="paper"',
        ),
    ],
)
def test_config_refuses_settings_by_name(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ht.HomerConfig(**setting)


@pytest.mark.slow
def test_settings_left_out_come_from_the_model() -> None:
    model = ht.ModelConfig.from_hf(
        random_model(num_hidden_layers=16, max_position_embeddings=200).config
    )
    plan = ht.plan(model, context_len=300, prefix_len=1, suffix_len=9)
    assert (plan.max_chunk_len, plan.target_len, plan.layers_warmup) == (100, 100, 8)
    assert (plan.layers_tree, plan.recompute, plan.asking) == (12, "all", 9)
    tall = ht.plan(model, context_len=90 * 2**13, prefix_len=1, suffix_len=9)
    assert (tall.height, tall.layers_warmup, tall.layers_tree) == (13, 0, 14)
    paper = ht.plan(model, 300, 1, 9, ht.HomerConfig.paper())
    assert (paper.layers_warmup, paper.layers_tree, paper.asking) == (6, 16, 1)
    assert (paper.recompute, paper.next_position) == ("none", 1 + 75 + 9)


@pytest.mark.parametrize(
    "case",
    [
        Lengths(8, 900, 8, 8, Settings(80, 80, 3)),
        Lengths(0, 60, 4, 8, Settings(64, 64, 3)),
        Lengths(4, 60, 4, 8, Settings(68, 40, 3)),
    ],
)
def test_flops_are_those_that_torch_counts(case: Lengths, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch counts attention without its mask; `flops` counts only what the mask lets through."""
    hf_model = random_model(hidden_size=256, intermediate_size=512, num_hidden_layers=case.layers)
    model = ht.from_transformers(hf_model, ops="torch")
    parts = (random_tokens(n, i) for i, n in enumerate((case.context, case.prefix, case.suffix)))
    monkeypatch.setattr(products, "_ONEDNN", None)  # the counter does not know its products
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        encoded = ht.encode(model, *parts, to_config(case.settings))
    assert encoded.stats.flops == encoded.plan.flops(model.config)
    assert encoded.stats.flops == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_prefill_flops_are_those_that_torch_counts() -> None:
    hf_model = random_model(hidden_size=256, intermediate_size=512)
    config = ht.ModelConfig.from_hf(hf_model.config)
    plan = build_plan(2, 30, 3, config.num_hidden_layers, 15, 15, 0)
    tokens = torch.tensor([random_tokens(35)])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        hf_model(tokens, logits_to_keep=1)
    assert plan.prefill_flops(config) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_memory_grows_by_at_most_half_a_chunk_a_height_where_the_prefills_doubles() -> None:
    shape = ht.ModelConfig.from_hf(random_model(num_hidden_layers=16).config)
    chunk, affix = 128, 4
    row = 2 * 16 * shape.num_key_value_heads * shape.head_dim * 2
    plans = [build_plan(affix, 120 * 2**h, affix, 16, chunk, chunk, 2) for h in range(9)]
    for plan, twice in pairwise(plans):
        growth = twice.memory(shape, itemsize=2) - plans[0].memory(shape, itemsize=2)
        assert 0 < growth <= twice.height * chunk // 2 * row
        plain = twice.prefill_memory(shape, 2) / plan.prefill_memory(shape, 2)
        assert plain == pytest.approx(2, rel=0.1)
    assert plans[0].memory(shape, 2) >= 2 * plans[0].rows * row, "the pool and the finished cache"


def test_as_many_leaves_run_at_once_as_fill_a_chip() -> None:
    shape = ht.ModelConfig.from_hf(random_model(num_hidden_layers=24).config)

    def chosen(context: int, on_gpu: bool = True, documents: int = 1, ranks: int = 1) -> int:
        config = ht.HomerConfig(max_chunk_len=128, recompute="none")
        return ht.plan(shape, context, 4, 4, config, 2, documents, on_gpu, ranks).leaf_batch

    full, rows = 120 * 2**10, 120 + 4
    for on_gpu, enough in ((True, ROWS_ON_GPU), (False, ROWS_ON_CPU)):
        for documents in (1, 3, 8, 64):
            count = chosen(full, on_gpu, documents) * documents * rows
            assert enough <= count < 2 * enough or chosen(full, on_gpu, documents) == 1
    assert [chosen(120 * count) for count in (1, 2, 4, 8)] == [1, 2, 4, 8], "no more than there are"
    assert chosen(120 * 8 - 50) == 4, "the last leaf is shorter than the others"
    assert [chosen(120 * 8, ranks=ranks) for ranks in (2, 4, 8, 16)] == [4, 2, 1, 1]


def test_many_leaves_at_once_take_at_most_twice_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ht.ModelConfig.from_hf(random_model(num_hidden_layers=24).config)
    config = ht.HomerConfig(max_chunk_len=128, recompute="none")

    def lay_out(leaf_batch: int | None) -> Plan:
        return ht.plan(shape, 120 * 2**9, 4, 4, replace(config, leaf_batch=leaf_batch), 2)

    def need(leaf_batch: int | None) -> int:
        return lay_out(leaf_batch).memory(shape, 2)

    roomy = lay_out(None).leaf_batch
    assert 2 * need(1) < need(roomy) <= SPARE_BYTES
    monkeypatch.setattr(leaves, "SPARE_BYTES", 0)
    tight = lay_out(None).leaf_batch
    assert 1 < tight < roomy
    assert need(tight) <= 2 * need(1) < need(2 * tight)
    assert lay_out(roomy).leaf_batch == roomy, "what is given stays"


def test_a_budget_is_met_by_fewer_leaves_first_and_then_by_offloading() -> None:
    shape = ht.ModelConfig.from_hf(random_model(num_hidden_layers=24).config)
    config = ht.HomerConfig.paper(max_chunk_len=128, target_len=128, layers_warmup=2)

    def lay_out(on_gpu: bool = True, **settings: Any) -> Plan:
        return ht.plan(shape, 120 * 2**9, 4, 4, replace(config, **settings), 2, on_gpu=on_gpu)

    def need(plan: Plan) -> int:
        return plan.memory(shape, 2)

    many, few = need(lay_out(leaf_batch=8)), need(lay_out(leaf_batch=1))
    least = need(lay_out(offload="cpu", leaf_batch=1))
    assert least < few < many
    for budget, offload in ((many, False), (few, False), (few - 1, True), (least, True)):
        chosen = lay_out(memory_budget=budget)
        assert (need(chosen) <= budget, chosen.offload) == (True, offload)
        if chosen.leaf_batch < 8:
            more = replace(config, leaf_batch=2 * chosen.leaf_batch)
            more = replace(more, offload="cpu" if offload else None)
            assert need(ht.plan(shape, 120 * 2**9, 4, 4, more, 2)) > budget
    assert lay_out(memory_budget=many).leaf_batch == 8
    assert lay_out(memory_budget=many, leaf_batch=2).leaf_batch == 2
    for on_gpu, too_small in ((False, few - 1), (True, least - 1)):
        with pytest.raises(ValueError, match=rf"memory_budget={too_small} is less than the \d+MiB"):
            lay_out(on_gpu, memory_budget=too_small)
    short = replace(config, offload="cpu", leaf_batch=1)
    shorter = ht.plan(shape, 120 * 2**5, 4, 4, short, 2)
    assert need(shorter) == pytest.approx(least, rel=0.01), "it does not grow with the text"
