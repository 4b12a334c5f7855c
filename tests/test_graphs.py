"""Steps replayed from graphs. Without a GPU a stand-in takes the graph's place, which runs the
step again on the same memory: what it cannot show is that a GPU captures the step.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import LAYERS, Lengths, peers, random_tokens, to_config
from oracle_tree import Settings
from torch import Tensor

import homer_triton as ht
from homer_triton.demo import CHECKPOINT
from homer_triton.engine import documents, graphs, sequences
from homer_triton.engine.graphs import Captured, Replays, Step
from homer_triton.engine.pool import make_pools
from homer_triton.selection import PAPER

CASE = Lengths(2, 140, 3, LAYERS, Settings(15, 15, 2))


def stand_in(step: Step, inputs: tuple[Tensor, ...], memory: Any, stream: Any) -> Captured:
    """A capture that runs the step at every replay, into the same outputs."""
    places = tuple(torch.empty_like(given) for given in inputs)
    outputs: list[Tensor] = []  # known when it has run once, which a capture does not do

    def replay() -> None:
        made = step(*places)
        if not outputs:
            outputs.extend(torch.empty_like(x).contiguous() for x in made)
        for place, x in zip(outputs, made, strict=True):
            place.copy_(x)

    return Captured(replay, places, outputs)  # type: ignore[arg-type]


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Captured]:
    """Graphs' stand-ins, on a CPU too, each noted when it is captured."""
    noted: list[Captured] = []

    def capture(*args: Any) -> Captured:
        noted.append(stand_in(*args))
        return noted[-1]

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    for module in (documents, sequences):
        monkeypatch.setattr(module, "HAS_GRAPHS", ("cpu",))
    return noted


@pytest.mark.usefixtures("captured")
def test_replayed_steps_give_what_the_steps_do() -> None:
    keys: Counter[object] = Counter()

    class Counted(Replays):
        def __call__(self, key: Any, step: Step, *inputs: Tensor) -> tuple[Tensor, ...]:
            keys[key] += 1
            return super().__call__(key, step, *inputs)

    model, tokens = peers(4, 2)[1], random_tokens(145)
    parts = tokens[2:-3], tokens[:2], tokens[-3:]
    config = replace(to_config(CASE.settings), leaf_batch=1)
    plain = ht.encode(model, *parts, config)
    scheduler = documents.Scheduler

    def with_replays(*args: Any) -> Any:
        return scheduler(*args[:-1], Counted(model.device))

    replayed = ht.encode(model, *parts, config, scheduler=with_replays)
    for name in ("keys", "values", "positions", "source_indices", "pruned_at", "logits"):
        assert torch.equal(getattr(plain, name), getattr(replayed, name)), name
    assert max(keys.values()) > 8, "no shape came often enough to be replayed"


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"selection": PAPER, "recompute": "none"}])
def test_a_second_text_of_the_same_lengths_captures_nothing(
    settings: dict[str, Any], captured: list[Captured]
) -> None:
    model = ht.from_transformers(peers(4, 2)[0], ops="torch")
    config, kept = ht.HomerConfig(32, 16, 1, leaf_batch=1, **settings), ht.Graphs()
    texts = [random_tokens(300, seed) for seed in range(3)]
    plain = [ht.encode(model, x, [1], [2, 3], config) for x in texts]
    counts = []
    for text, expected in zip(texts, plain, strict=True):
        encoded = ht.encode(model, text, [1], [2, 3], config, graphs=kept)
        counts.append(len(captured))
        for name in ("keys", "values", "positions", "source_indices", "pruned_at", "logits"):
            assert torch.equal(getattr(encoded, name), getattr(expected, name)), name
    assert counts[0] > 0
    assert counts[2] == counts[1] <= counts[0] + 2, "what came only once in the first text"
    first = plain[0]
    again = ht.encode(model, texts[0], [1], [2, 3], config, graphs=kept)
    assert torch.equal(again.keys, first.keys)
    for length in (250, 200):  # others, which take the places
        ht.encode(model, texts[0][:length], [1], [2, 3], config, graphs=kept)
    assert len(kept) == graphs.MOST_KEPT
    before = len(captured)
    ht.encode(model, texts[1], [1], [2, 3], config, graphs=kept)
    assert len(captured) > before


def test_one_text_alone_replays_its_own_steps(captured: list[Captured]) -> None:
    model = ht.from_transformers(peers(4, 2)[0], ops="torch")
    config = ht.HomerConfig(32, 16, 1, leaf_batch=1, cuda_graphs=True)
    replayed = ht.encode(model, random_tokens(300), [1], [2, 3], config)
    assert captured
    plain = ht.encode(model, random_tokens(300), [1], [2, 3], replace(config, cuda_graphs=False))
    assert torch.equal(replayed.keys, plain.keys)


def test_graphs_are_not_kept_for_other_weights(captured: list[Captured]) -> None:
    model = ht.from_transformers(peers(4, 2)[0], ops="torch")
    config, kept = ht.HomerConfig(32, 16, 1, leaf_batch=1), ht.Graphs()
    text = random_tokens(300)
    first = ht.encode(model, text, [1], [2, 3], config, graphs=kept)
    layer = model.weights.layers[0]
    model.weights.layers[0] = replace(layer, down=-layer.down)
    second = ht.encode(model, text, [1], [2, 3], config, graphs=kept)
    assert not torch.equal(first.keys, second.keys)
    assert torch.equal(second.keys, ht.encode(model, text, [1], [2, 3], config).keys)


def test_replayed_decoding_gives_what_steps_do(
    captured: list[Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ht.load(CHECKPOINT, "cpu", "float32", ops="torch")
    text = ht.encode(model, random_tokens(60, vocabulary=200), [1], [2, 3], ht.HomerConfig(32, 32))
    prompts = [random_tokens(count, count, vocabulary=200) for count in (1, 6, 3)]
    settings: dict[str, Any] = {"min_new_tokens": 4, "max_new_tokens": 6}
    replayed = ht.generate_batch(model, text, prompts, **settings)
    assert captured, "nothing was replayed"
    monkeypatch.setattr(sequences, "HAS_GRAPHS", ())
    plain = ht.generate_batch(model, text, prompts, **settings)
    assert [x.token_ids for x in plain] == [x.token_ids for x in replayed]


@pytest.mark.gpu
def test_a_second_text_replays_the_first_ones_graphs_on_a_gpu() -> None:
    model = ht.load(CHECKPOINT, "cuda", "float16")
    config = ht.HomerConfig(max_chunk_len=128, layers_warmup=1, leaf_batch=1)
    kept = ht.Graphs()
    for seed in range(3):
        tokens = random_tokens(4000, seed, vocabulary=200)
        replayed = ht.encode(model, tokens, [1], [2, 3], config, graphs=kept)
        plain = ht.encode(model, tokens, [1], [2, 3], config)
        assert torch.equal(plain.keys, replayed.keys)
    assert len(kept) == 1


@pytest.mark.gpu
def test_decoding_by_graphs_on_a_gpu() -> None:
    model = ht.load(CHECKPOINT, "cuda", "float32")
    text = ht.encode(model, random_tokens(900, vocabulary=200), [1], [2, 3])
    prompts = [random_tokens(count, count, vocabulary=200) for count in (1, 6, 3)]
    settings: dict[str, Any] = {"min_new_tokens": 20, "max_new_tokens": 40}
    together = ht.generate_batch(model, text, prompts, **settings)
    plain = ht.load(CHECKPOINT, "cpu", "float32", ops="torch")
    moved = ht.encode(plain, random_tokens(900, vocabulary=200), [1], [2, 3])
    alone = [ht.generate(plain, moved, prompt, **settings) for prompt in prompts]
    assert [x.token_ids for x in together] == [x.token_ids for x in alone]


def test_a_model_on_a_cpu_has_no_graphs() -> None:
    config = ht.HomerConfig(15, 15, 2, cuda_graphs=True)
    for more in ({"config": config}, {"graphs": ht.Graphs()}):
        with pytest.raises(ValueError, match="CUDA graphs need a model on a CUDA device"):
            ht.encode(peers(4, 2)[1], random_tokens(60), [1], [2], **more)


@pytest.mark.gpu
def test_graphs_and_offload_change_no_bit_on_a_gpu() -> None:
    model = ht.load(CHECKPOINT, "cuda", "float16")
    tokens = random_tokens(4000, vocabulary=200)
    settings = {"max_chunk_len": 128, "layers_warmup": 1, "leaf_batch": 1}
    plain, replayed, offloaded = (
        ht.encode(model, tokens, [1], [2, 3], ht.HomerConfig(**settings, **more))
        for more in ({}, {"cuda_graphs": True}, {"offload": "cpu"})
    )
    for other in (replayed, offloaded):
        for name in ("keys", "values", "positions", "pruned_at", "logits"):
            assert torch.equal(getattr(plain, name), getattr(other, name)), name


@pytest.mark.gpu
def test_the_tree_neither_waits_nor_asks_the_driver_for_memory() -> None:
    """The second time, when kernels are compiled and the allocator holds what it needs."""
    model = ht.load(CHECKPOINT, "cuda", "float16")
    plan = ht.plan(model.config, 4000, 2, 3, ht.HomerConfig(128, 128, 1))
    ids = [torch.randint(200, shape, device="cuda") for shape in ((2,), (1, 4000), (1, 3))]

    def walk() -> int:
        pools = make_pools(model, plan)
        scheduler = documents.Scheduler(model, plan, pools, None, PAPER)
        before = torch.cuda.memory_stats()["num_device_alloc"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.no_grad():
                scheduler.run(*ids, lambda node: None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return torch.cuda.memory_stats()["num_device_alloc"] - before

    walk()
    assert walk() == 0
