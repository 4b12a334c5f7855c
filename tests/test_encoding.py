"""The whole encoding against the oracle, which takes none of the exact shortcuts: they change
nothing.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    HEADS,
    LAYERS,
    REPEATABLE,
    TOLERANCE,
    Lengths,
    assert_equal,
    encode_both,
    lengths,
    peers,
    random_bias,
    random_tokens,
    to_config,
    under_other_defaults,
)
from checkpoints import random_model
from hypothesis import given
from hypothesis import strategies as st
from oracle import Oracle
from oracle_tree import Settings

import homer_triton as ht
from homer_triton.engine.scheduler import Scheduler
from homer_triton.engine.tree import Node


@REPEATABLE
@given(
    case=lengths(layers=LAYERS, max_leaf_batch=8, may_offload=True),
    heads=st.sampled_from(HEADS),
    calibrated=st.booleans(),
    recompute=st.sampled_from(["none", "suffix", "all"]),
    seed=st.integers(0, 9),
)
def test_the_papers_selection_equals_the_oracle(
    case: Lengths, heads: tuple[int, int], calibrated: bool, recompute: str, seed: int
) -> None:
    bias = random_bias(case.settings.max_chunk_len, seed=seed) if calibrated else None
    tree = LAYERS if recompute == "all" else None
    settings = replace(case.settings, bias=bias, recompute=recompute, layers_tree=tree)
    assert_equal(*encode_both(peers(*heads), replace(case, settings=settings), seed))


@REPEATABLE
@given(
    case=lengths(layers=LAYERS, max_leaf_batch=8, may_offload=True),
    heads=st.sampled_from(HEADS),
    recompute=st.sampled_from(["none", "suffix", "all"]),
    choices=st.fixed_dictionaries(
        {
            "logit": st.sampled_from(["logit", "log_softmax", "softmax"]),
            "heads": st.sampled_from(["max", "sum"]),
            "layers": st.sampled_from(["last", "all", "levels", "tree"]),
            "asking": st.integers(1, 4),
            "window": st.sampled_from([1, 3, 5]),
        }
    ),
    cut=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_every_selection_equals_the_oracle(
    case: Lengths,
    heads: tuple[int, int],
    recompute: str,
    choices: dict[str, Any],
    cut: int,
    seed: int,
) -> None:
    room = case.settings.max_chunk_len - case.prefix - case.suffix
    choices["asking"] = min(choices["asking"], case.suffix)
    choices["window"] = min(choices["window"], room - (room + 1) % 2)
    if recompute == "all":  # a tree of fewer layers, where there are some to leave out
        lowest = case.plan().height + 1 + case.settings.layers_warmup
        choices["layers_tree"] = max(lowest, LAYERS - cut)
    settings = replace(case.settings, recompute=recompute, **choices)
    assert_equal(*encode_both(peers(*heads), replace(case, settings=settings), seed))


@REPEATABLE
@given(
    case=lengths(layers=LAYERS, max_leaf_batch=8, may_offload=True),
    heads=st.sampled_from(HEADS),
    recompute=st.sampled_from(["none", "suffix", "all"]),
    layers=st.sampled_from(["last", "all", "levels", "tree"]),
    retrieval=st.lists(
        # One at least in each layer: rows without a vote would all be equal.
        st.lists(st.sampled_from([0.0, 1.0]), min_size=4, max_size=4).filter(any),
        min_size=LAYERS,
        max_size=LAYERS,
    ),
    seed=st.integers(0, 9),
)
def test_retrieval_heads_alone_select(
    case: Lengths,
    heads: tuple[int, int],
    recompute: str,
    layers: str,
    retrieval: list[list[float]],
    seed: int,
) -> None:
    settings = replace(
        case.settings,
        recompute=recompute,
        layers_tree=LAYERS if recompute == "all" else None,
        asking=min(case.suffix, 3),
        logit="softmax",
        heads="sum",
        layers=layers,
        weights=retrieval,
    )
    assert_equal(*encode_both(peers(*heads), replace(case, settings=settings), seed))


def test_layers_without_retrieval_heads_give_no_votes() -> None:
    none, some = [0.0] * 4, [0.0, 1.0, 1.0, 0.0]
    settings = Settings(
        16,
        14,
        3,
        None,
        "all",
        6,
        3,
        "softmax",
        "sum",
        "tree",
        3,
        [none, some, none, some] + [none] * 3,
    )
    assert_equal(*encode_both(peers(4, 2), Lengths(2, 30, 3, LAYERS, settings)))


@pytest.mark.parametrize(
    ("prefix", "context", "suffix", "settings"),
    [
        pytest.param(2, 5, 3, Settings(10, 10, 3), id="one chunk, nothing pruned"),
        pytest.param(2, 5, 3, Settings(10, 8, 3), id="one chunk, pruned at the root"),
        pytest.param(0, 21, 1, Settings(7, 7, 1), id="no prefix, short last leaf"),
        pytest.param(1, 5, 2, Settings(4, 4, 0), id="empty trailing leaves"),
        pytest.param(1, 9, 2, Settings(5, 40, 0), id="a node with one child, a roomy target"),
        pytest.param(1, 32, 1, Settings(10, 3, 3), id="one context row in the end"),
        pytest.param(
            2, 21, 3, Settings(10, 26, 0, recompute="all"), id="chunks, but the target holds all"
        ),
    ],
)
def test_equals_the_oracle_at_the_edges(
    prefix: int, context: int, suffix: int, settings: Settings
) -> None:
    case = Lengths(prefix, context, suffix, LAYERS, settings)
    encoded, expected = encode_both(peers(4, 2), case)
    assert_equal(encoded, expected)
    assert len(encoded) == encoded.plan.rows == encoded.stats.kept_tokens
    assert encoded.stats.tokens == prefix + context + suffix
    assert len(encoded.stats.seconds_by_height) == encoded.plan.height + 1


def test_equal_scores_keep_the_later_rows() -> None:
    hf_model = random_model(dtype=torch.float64, num_hidden_layers=LAYERS)
    for layer in hf_model.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    peer = hf_model, ht.from_transformers(hf_model, ops="torch"), Oracle(hf_model)
    encoded, expected = encode_both(peer, Lengths(2, 20, 1, LAYERS, Settings(13, 13, 3)))
    assert_equal(encoded, expected)
    assert encoded.source_indices.tolist() == [0, 1, *range(7, 12), *range(17, 22), 22]


def test_a_context_that_fits_one_chunk_is_a_plain_prefill() -> None:
    hf_model, model, _ = peers(4, 2)
    tokens = random_tokens(20)
    encoded = ht.encode(
        model, tokens[2:17], tokens[:2], tokens[17:], to_config(Settings(20, 20, 3))
    )
    with torch.no_grad():
        plain = hf_model(torch.tensor([tokens]))
    torch.testing.assert_close(encoded.logits, plain.logits[0, -1].float(), atol=1e-4, rtol=1e-4)
    keys = torch.cat([layer.keys for layer in plain.past_key_values.layers])
    torch.testing.assert_close(encoded.keys, keys, atol=1e-4, rtol=1e-4)
    assert encoded.positions.tolist() == encoded.source_indices.tolist() == list(range(20))
    assert encoded.next_position == 20


@pytest.mark.parametrize("recompute", ["none", "suffix", "all"])
def test_encoding_twice_gives_the_same_bits(recompute: str) -> None:
    case = Lengths(2, 60, 3, LAYERS, Settings(15, 15, 2, None, recompute, LAYERS))
    first, second = (encode_both(peers(4, 2), case)[0] for _ in range(2))
    for name in ("keys", "values", "positions", "pruned_at", "logits"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize("recompute", ["suffix", "all"])
def test_documents_in_one_call_are_as_if_alone(recompute: str) -> None:
    """Of different lengths, and of equal ones that run side by side, in batches of leaves too."""
    model = peers(4, 2)[1]
    config = replace(to_config(Settings(15, 15, 2)), leaf_batch=2, recompute=recompute)
    contexts = [random_tokens(n, seed) for seed, n in enumerate((70, 31, 70, 9, 70, 31))]
    suffixes = [random_tokens(3 if n != 4 else 2, 9 + n) for n in range(6)]
    together = ht.encode_batch(model, contexts, [1, 2], suffixes, config, batch_size=2)
    assert [x.stats.documents for x in together] == [2, 2, 2, 1, 1, 2]
    for context, suffix, encoded in zip(contexts, suffixes, together, strict=True):
        alone = ht.encode(model, context, [1, 2], suffix, config)
        assert encoded.token_ids.tolist() == [1, 2, *context, *suffix]
        assert encoded.next_position == alone.next_position
        for name in ("positions", "source_indices", "pruned_at"):
            assert torch.equal(getattr(encoded, name), getattr(alone, name)), name
        for name in ("keys", "values", "logits"):
            torch.testing.assert_close(getattr(encoded, name), getattr(alone, name), **TOLERANCE)


def test_a_prefix_is_rotated_as_its_chunks_are() -> None:
    """Dynamic NTK rotates by the longest position, so the prefix's own length must not decide."""
    hf_model = random_model(
        dtype=torch.float64,
        max_position_embeddings=32,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    )
    model, tokens = ht.from_transformers(hf_model, ops="torch"), random_tokens(90)
    whole = ht.HomerConfig(max_chunk_len=90, target_len=90, layers_warmup=0)
    encoded = ht.encode(model, tokens[20:80], tokens[:20], tokens[80:], whole)
    expected = hf_model(torch.tensor([tokens])).logits[0, -1].float()
    torch.testing.assert_close(encoded.logits, expected, **TOLERANCE)


def test_the_callers_defaults_change_nothing() -> None:
    """Its default device, its default dtype and its autocast are for its own tensors."""
    model = spoken = ht.from_transformers(random_model(num_hidden_layers=5), ops="torch")
    tokens = torch.tensor(random_tokens(60))
    config = ht.HomerConfig(20, 20, 1, recompute="suffix")

    def everything() -> list[torch.Tensor]:
        bias = ht.calibrate(model, [tokens.tolist()], segment_len=20, num_segments=7)
        calibrated = replace(config, calibration=bias)
        encoded = ht.encode(model, tokens.tolist(), [1], [2, 3], calibrated)
        answer = ht.generate(spoken, encoded, [4, 5], 6, temperature=1.0, seed=3)
        return [bias.bias, encoded.keys, encoded.logits, torch.as_tensor(answer.token_ids)]

    expected = everything()
    cast, typed, placed = under_other_defaults(everything)
    for found in (cast, typed, placed):
        for ours, theirs in zip(expected[:3], found[:3], strict=True):
            assert torch.equal(ours, theirs)
    assert expected[3].tolist() == cast[3].tolist() == typed[3].tolist()


def test_documents_come_with_defaults_and_are_counted() -> None:
    model = peers(4, 2)[1]
    assert ht.encode_batch(model, []) == []
    first, second = ht.encode_batch(model, [random_tokens(50), random_tokens(50, 1)])
    torch.testing.assert_close(first.keys, ht.encode(model, random_tokens(50)).keys, **TOLERANCE)
    assert not torch.equal(first.keys, second.keys)
    with pytest.raises(ValueError, match="2 contexts but 1 suffixes"):
        ht.encode_batch(model, [[1, 2], [3, 4]], suffixes=[[5]])
    with pytest.raises(ValueError, match="lists, an entry for each document"):
        ht.encode_batch(model, [[1, 2], [3, 4]], suffixes="Q?")
    with pytest.raises(ValueError, match="lists, an entry for each document"):
        ht.encode_batch(model, "a text")
    with pytest.raises(ValueError, match="batch_size=0"):
        ht.encode_batch(model, [[1, 2]], batch_size=0)


@pytest.mark.parametrize("recompute", ["none", "suffix", "all"])
@pytest.mark.parametrize("documents", [1, 3])
def test_leaves_run_side_by_side_with_the_same_result(recompute: Any, documents: int) -> None:
    model = peers(4, 2)[1]
    contexts = [random_tokens(104, seed) for seed in range(documents)]
    config = replace(to_config(Settings(15, 15, 2)), recompute=recompute)
    steps: list[int] = []

    class Counted(Scheduler):
        def _step(self, nodes: tuple[Node, ...], *rest: Any) -> None:
            steps.append(len(nodes))
            super()._step(nodes, *rest)

    def read(leaf_batch: int | None) -> tuple[list[ht.EncodedContext], list[int]]:
        steps.clear()
        settings = replace(config, leaf_batch=leaf_batch)
        ends = [[2]] * documents
        encoded = ht.encode_batch(model, contexts, [1], ends, settings, scheduler=Counted)
        return encoded, list(steps)

    (found, together), (expected, apart) = read(None), read(1)
    assert set(apart) == {1}
    assert sum(together) == sum(apart)
    assert len(together) <= len(apart) / 2
    for one, other in zip(found, expected, strict=True):
        assert one.plan.leaf_batch == max(together)
        for name in ("keys", "values", "positions", "source_indices", "pruned_at", "logits"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), **TOLERANCE)


def test_a_memory_budget_sets_how_much_runs_at_once() -> None:
    model = peers(4, 2)[1]
    contexts = [random_tokens(90, seed) for seed in range(4)]
    config = to_config(Settings(15, 15, 2))

    def read(budget: int) -> list[ht.EncodedContext]:
        within = replace(config, memory_budget=budget)
        return ht.encode_batch(model, contexts, [1], [[2]] * 4, within)

    def need(documents: int, leaf_batch: int) -> int:
        plan = ht.plan(model.config, 90, 1, 1, replace(config, leaf_batch=leaf_batch))
        return plan.memory(model.config, 8, documents, on_gpu=False)

    for documents, leaf_batch in ((1, 1), (2, 1), (4, 2), (4, 4)):
        encoded = read(need(documents, leaf_batch))[0]
        assert (encoded.stats.documents, encoded.plan.leaf_batch) == (documents, leaf_batch)
    with pytest.raises(ValueError, match=r"memory_budget=\d+ is less than the \d+MiB"):
        read(need(1, 1) - 1)


@pytest.mark.slow
def test_threads_share_a_model() -> None:
    model = peers(4, 2)[1]
    config = to_config(Settings(15, 15, 2))
    inputs = [random_tokens(count, seed) for seed, count in enumerate((40, 90, 61, 75))]

    def read(tokens: list[int]) -> torch.Tensor:
        return ht.encode(model, tokens[2:-3], tokens[:2], tokens[-3:], config).keys

    alone = [read(tokens) for tokens in inputs]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(read, inputs * 3))
    assert all(torch.equal(a, b) for a, b in zip(alone * 3, together, strict=True))


def test_progress_hears_of_every_node_in_order() -> None:
    model = peers(4, 2)[1]
    heard: list[Node] = []
    encoded = ht.encode(
        model, random_tokens(50), [1], [2], to_config(Settings(12, 12, 3)), progress=heard.append
    )
    assert heard == [node for nodes in encoded.plan.steps() for node in nodes]


def test_defaults_take_the_prefix_from_the_model_and_the_suffix_from_the_context() -> None:
    model = peers(4, 2)[1]
    tokens = random_tokens(50)
    encoded = ht.encode(model, tokens)
    length = model.config.max_position_embeddings // 2 // 8
    assert (encoded.plan.prefix_len, encoded.plan.suffix_len) == (1, length)
    given = ht.encode(model, tokens[:-length], [model.config.bos_token_id], tokens[-length:])
    assert torch.equal(encoded.keys, given.keys)


@pytest.mark.parametrize(
    ("context", "settings", "message"),
    [
        ([], {}, "context is empty"),
        ([1], {}, "one token long"),
        ([1, 96], {}, "token id 96, outside the vocabulary of 96"),
        ([1, -3], {}, "token id -3"),
        ([1.5, 2.0], {}, "whole numbers"),
        ([[1, 2]], {}, "flat list"),
        ("text", {}, "no tokenizer"),
        ({"input_ids": [1, 2]}, {}, "context must be text or a flat list of token ids, not this"),
        ([[1], [2, 3]], {}, "context must be text or a flat list of token ids, not this list"),
        ([1, 2], {"max_chunk_len": 12.0}, "max_chunk_len=12.0 must be a whole number"),
        ([1, 2], {"max_chunk_len": "12"}, "max_chunk_len='12' must be a whole number"),
        ([1, 2], {"max_chunk_len": True}, "max_chunk_len=True must be a whole number"),
        ([1, 2], {"leaf_batch": 2**100}, "leaf_batch=.* must be at most"),
        ([1, 2], {"calibration": torch.ones(2, 3)}, "calibration is a Tensor; make one with"),
        ([1, 2], {"max_chunk_len": 2, "target_len": 2}, "max_chunk_len=2 no room"),
        ([1, 2], {"layers_warmup": LAYERS}, f"layers_warmup={LAYERS} must"),
        ([3] * 1000, {"max_chunk_len": 4}, "raise max_chunk_len or lower layers_warmup"),
    ],
)
def test_refuses_bad_input(context: object, settings: dict[str, Any], message: str) -> None:
    model = peers(4, 2)[1]
    with pytest.raises(ValueError, match=message):
        ht.encode(model, context, config=ht.HomerConfig(**settings))


def test_refuses_a_transformers_model() -> None:
    with pytest.raises(ValueError, match=r"a LlamaForCausalLM; wrap it with .*from_transformers"):
        ht.encode(random_model(), random_tokens(40))


def test_refuses_weights_that_yield_nan() -> None:
    hf_model = random_model()
    hf_model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    model = ht.from_transformers(hf_model, ops="torch")
    with pytest.raises(ValueError, match="not finite"):
        ht.encode(model, random_tokens(40))


def test_numpy_integers_are_numbers(tmp_path: Path) -> None:
    model = peers(4, 2)[1]
    own = ht.HomerConfig(np.int64(20), np.int32(16), np.uint8(1), leaf_batch=np.int16(2))
    plain = ht.HomerConfig(20, 16, 1, leaf_batch=2)
    assert own == plain
    encoded = ht.encode(model, np.array(random_tokens(90)), config=own)
    encoded.save(tmp_path / "out.safetensors")
    assert ht.EncodedContext.load(tmp_path / "out.safetensors").plan == encoded.plan
    lengths = np.array([90, 1, 5])
    assert ht.plan(model, *lengths, config=own) == ht.plan(model, 90, 1, 5, plain)


def test_suffixes_may_be_the_rows_of_a_tensor() -> None:
    model = peers(4, 2)[1]
    contexts, suffixes = torch.tensor(random_tokens(80)).view(2, 40), torch.tensor([[5, 6], [7, 8]])
    both = ht.encode_batch(model, contexts, suffixes=suffixes)
    alone = ht.encode(model, contexts[1], suffix=suffixes[1])
    assert torch.equal(both[1].token_ids, alone.token_ids)
    with pytest.raises(ValueError, match=r"suffix must be text or a flat list .*2-dimensional"):
        ht.encode(model, contexts[0], suffix=suffixes)
    with pytest.raises(ValueError, match="2 contexts but 0 suffixes"):
        ht.encode_batch(model, contexts, suffixes=[])


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((9, -1), "prefix_len=-1 must be at least 0"),
        ((-9,), "context_len=-9 must be at least 0"),
        ((9, 1, -2), "suffix_len=-2 must be at least 0"),
        ((9.5,), "context_len=9.5 must be a whole number"),
        ((10**30,), "context_len=.* must be at most"),
    ],
)
def test_a_plan_refuses_lengths_that_no_text_has(lengths: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ht.plan(peers(4, 2)[1], *lengths)
