"""Several ranks give what one does, and say which of them is in the way."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import random_tokens
from checkpoints import random_model
from hypothesis import given
from hypothesis import strategies as st
from rank_processes import TIMEOUT, run_ranks

import homer_triton as ht
from homer_triton.engine.shares import Shares
from homer_triton.model.costs import layer_flops

LAYERS = 6
CONFIG = ht.HomerConfig(max_chunk_len=32, target_len=24, layers_warmup=0)
PREFIX, SUFFIX = [1, 2], [7, 8, 9]
SHAPE = ht.ModelConfig.from_hf(random_model(num_hidden_layers=16).config)


@pytest.fixture(scope="module")
def model() -> ht.Llama:
    return ht.from_transformers(random_model(num_hidden_layers=LAYERS, dtype=torch.float64))


def assert_alike(found: ht.EncodedContext, expected: ht.EncodedContext) -> None:
    for name in ("keys", "values", "positions", "source_indices", "pruned_at", "logits"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    # Ranks may run fewer leaves at once, so that each has some.
    plan = replace(expected.plan, leaf_batch=found.plan.leaf_batch)
    assert (found.plan, found.next_position) == (plan, expected.next_position)


@pytest.mark.parametrize(
    ("ranks", "context", "settings"),
    [
        (2, 400, {}),
        (3, 391, {}),
        (4, 777, {"leaf_batch": 2}),
        (5, 240, {"recompute": "suffix"}),
        (2, 405, {"recompute": "none", "leaf_batch": 4}),
        (3, 530, {"recompute": "none", "offload": "cpu"}),
        (4, 300, {"selection": "paper", "recompute": "none"}),
        (3, 40, {}),  # fewer leaves than ranks
        (2, 5, {}),  # nothing to share
    ],
)
def test_ranks_give_what_one_gives(
    model: ht.Llama, tmp_path: Path, ranks: int, context: int, settings: dict[str, Any]
) -> None:
    config, tokens = replace(CONFIG, **settings), random_tokens(context)
    alone = ht.encode(model, tokens, PREFIX, SUFFIX, config)

    def share(rank: int) -> object:
        return ht.encode(model, tokens, PREFIX, SUFFIX, config, ranks=ht.Ranks())

    first, *others = run_ranks(ranks, tmp_path, share)
    assert_alike(first, alone)
    assert others == [None] * (ranks - 1)


def test_every_rank_may_have_a_copy(model: ht.Llama, tmp_path: Path) -> None:
    tokens = random_tokens(200)
    alone = ht.encode(model, tokens, PREFIX, SUFFIX, CONFIG)

    def share(rank: int) -> object:
        ranks = ht.Ranks(everywhere=True)
        return ht.encode(model, tokens, PREFIX, SUFFIX, CONFIG, ranks=ranks)

    for found in run_ranks(3, tmp_path, share):
        assert_alike(found, alone)


def test_without_a_process_group_there_are_no_ranks() -> None:
    with pytest.raises(ValueError, match="There is no process group; call"):
        ht.Ranks()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rank: {"config": replace(CONFIG, target_len=20 + rank)}, "another settings than"),
        (lambda rank: {"context": random_tokens(200 + rank)}, "another settings, text than"),
        (lambda rank: {"suffix": [7, 8, 9 + rank]}, "another text than"),
        (lambda rank: {"suffix": [[], SUFFIX][rank]}, "suffix"),
    ],
)
def test_ranks_with_different_arguments_are_refused(
    model: ht.Llama, tmp_path: Path, change: Callable[[int], dict[str, Any]], told: str
) -> None:
    def share(rank: int) -> object:
        usual = {"context": random_tokens(200), "suffix": SUFFIX, "config": CONFIG}
        return ht.encode(model, prefix=PREFIX, ranks=ht.Ranks(), **(usual | change(rank)))

    for error in run_ranks(2, tmp_path, share):
        assert isinstance(error, ValueError)
        assert told in str(error)


def test_ranks_with_different_models_are_refused(model: ht.Llama, tmp_path: Path) -> None:
    weights = random_model(seed=5, num_hidden_layers=LAYERS, dtype=torch.float64)
    models = [model, ht.from_transformers(weights)]

    def share(rank: int) -> object:
        ranks = ht.Ranks()
        return ht.encode(models[rank], random_tokens(99), PREFIX, SUFFIX, CONFIG, ranks=ranks)

    for error in run_ranks(2, tmp_path, share):
        assert "another model than rank" in str(error)


def test_a_rank_that_is_gone_ends_the_others(model: ht.Llama, tmp_path: Path) -> None:
    def share(rank: int) -> object:
        def on_node(node: object) -> None:
            if rank == 2:
                os._exit(9)

        ranks = ht.Ranks()
        return ht.encode(model, random_tokens(500), PREFIX, SUFFIX, CONFIG, on_node, ranks=ranks)

    begun = time.monotonic()
    first, _, third = run_ranks(3, tmp_path, share)
    assert time.monotonic() - begun < 2 * TIMEOUT
    assert third == 9
    assert isinstance(first, ht.RankError)
    assert str(first).startswith("Another rank is gone or does not answer (")


def test_documents_are_dealt_out(model: ht.Llama, tmp_path: Path) -> None:
    lengths = [300, 50, 300, 170, 20, 410, 300]
    texts = [[*random_tokens(n), i] for i, n in enumerate(lengths)]
    suffixes = [SUFFIX] * len(texts)
    alone = ht.encode_batch(model, texts, PREFIX, suffixes, CONFIG, batch_size=2)

    def share(rank: int) -> object:
        ranks = ht.Ranks()
        return ht.encode_batch(model, texts, PREFIX, suffixes, CONFIG, batch_size=2, ranks=ranks)

    first, *others = run_ranks(3, tmp_path, share)
    for found, expected in zip(first, alone, strict=True):
        assert_alike(found, expected)
    assert others == [None, None]


def test_a_document_that_fails_is_named_and_the_others_finish(
    model: ht.Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [random_tokens(n) for n in (300, 200, 100)]

    def share(rank: int) -> object:
        if rank:
            monkeypatch.setattr(model, "logits", None)
        try:
            return ht.encode_batch(model, texts, PREFIX, [SUFFIX] * 3, CONFIG, ranks=ht.Ranks())
        except ht.DocumentsError as error:
            return str(error), [one is None for one in error.encoded]

    (told, missing), other = run_ranks(2, tmp_path, share)
    assert other is None
    assert missing == [False, True, True]
    assert told.startswith("Document 1 failed on rank 1: TypeError: ")
    assert "; Document 2 failed on rank 1: " in told


@given(
    context=st.integers(1, 3000),
    ranks=st.integers(1, 9),
    leaf_batch=st.sampled_from([1, 2, 4]),
    recompute=st.sampled_from(["all", "none"]),
)
def test_every_node_has_one_rank(context: int, ranks: int, leaf_batch: int, recompute: Any) -> None:
    config = replace(CONFIG, leaf_batch=leaf_batch, recompute=recompute)
    plan = ht.plan(SHAPE, context, 2, 3, config)
    shares = Shares(plan, ranks)
    walked = [list(shares.steps(rank)) for rank in range(ranks)]
    assert sorted(str(x) for own in walked for x in own) == sorted(map(str, plan.steps()))
    for rank, own in enumerate(walked):
        for nodes in own:
            assert {shares.owner(node) for node in nodes} == {rank}
            to, child = shares.destination(nodes), shares.arriving(nodes)
            assert to is None or (len(nodes) == 1 and to < rank)
            assert child is None or shares.destination((child,)) == rank
    costs = shares.costs(SHAPE, 2)
    assert sum(share.leaves for share in costs) == len(plan.levels[0].nodes)
    working = [share.leaves for share in costs if share.leaves]
    assert max(working) - min(working) < 2 * leaf_batch
    # Every rank that works runs the prefix.
    prefix = layer_flops(SHAPE, 0, plan.prefix_len) * plan.layers_tree
    assert sum(share.flops for share in costs) == plan.flops(SHAPE) + (len(working) - 1) * prefix


@pytest.mark.parametrize("recompute", ["all", "none"])
def test_as_many_bytes_are_sent_as_was_said(
    model: ht.Llama, tmp_path: Path, recompute: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, recompute=recompute)
    lengths = 500, len(PREFIX), len(SUFFIX)
    plan = ht.plan(model, *lengths, config, 8, on_gpu=False, ranks=3)
    expected = [share.sent for share in Shares(plan, 3).costs(model.config, 8)]

    def share(rank: int) -> int:
        sent, send = [0], ht.Ranks.send

        def watched(self: ht.Ranks, tensors: list[torch.Tensor], to: int) -> Any:
            sent[0] += sum(x.nbytes for x in tensors)
            return send(self, tensors, to)

        monkeypatch.setattr(ht.Ranks, "send", watched)
        ht.encode(model, random_tokens(500), PREFIX, SUFFIX, config, ranks=ht.Ranks())
        return sent[0]

    assert run_ranks(3, tmp_path, share) == expected
    assert expected[0] == 0
    assert min(expected[1:]) > 0


@pytest.mark.filterwarnings("ignore:The model has no retrieval heads")
@pytest.mark.parametrize(("ranks", "tokens"), [(2, 200), (3, 130), (3, 20)])
def test_ranks_share_the_chunks_of_a_reading(
    model: ht.Llama, tmp_path: Path, ranks: int, tokens: int
) -> None:
    ids, path = random_tokens(tokens), tmp_path / "x.homer"
    alone = ht.read(model, ids, CONFIG)

    def share(rank: int) -> Any:
        once = ht.read(model, ids, CONFIG, path=path, ranks=ht.Ranks())
        copied = ht.read(model, ids, CONFIG, ranks=ht.Ranks(everywhere=True))
        assert copied is not None
        return once is None, copied.find([5, 6, 7])

    found = run_ranks(ranks, tmp_path, share)
    assert found == [(rank > 0, alone.find([5, 6, 7])) for rank in range(ranks)]
    assert ht.Document.load(path, model).find([5, 6, 7]) == alone.find([5, 6, 7])


@pytest.mark.filterwarnings("ignore:The model has no retrieval heads")
def test_ranks_must_read_the_same(model: ht.Llama, tmp_path: Path) -> None:
    def differ(rank: int) -> Any:
        return ht.read(model, random_tokens(100, seed=rank), CONFIG, ranks=ht.Ranks())

    for error in run_ranks(2, tmp_path, differ):
        assert isinstance(error, ValueError)
        assert "must be given the same" in str(error)
