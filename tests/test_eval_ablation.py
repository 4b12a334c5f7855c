"""What the ablation changes, against the definition of each change."""

import json
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from checkpoints import random_model
from command_line import run
from eval_model import LAYERS, LIMIT, save_model
from torch import Tensor

import homer_triton as ht
from homer_triton.evaluation.ablation import as_readers, calibrate_on_filler, make_variants
from homer_triton.evaluation.schedulers import LayerwiseScheduler, RandomScheduler
from homer_triton.evaluation.spread import read_spread
from homer_triton.kernels.reference import score_rows
from homer_triton.model.llama import Pass

CONFIG = ht.HomerConfig.paper(max_chunk_len=32, target_len=17, layers_warmup=0)


@pytest.fixture(scope="module")
def model() -> ht.Llama:
    return ht.from_transformers(random_model(num_hidden_layers=LAYERS, dtype=torch.float64))


def parts(context: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.randint(3, 96, (context + 5,), generator=torch.Generator().manual_seed(context))
    return tokens[:2], tokens[2:-3], tokens[-3:]


def observe(model: ht.Llama, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The plain model's keys [L, T, HKV, D], and what its last row makes of all others [L, T]."""
    rows = torch.arange(len(tokens))[None]
    cache = model.new_cache(len(tokens))
    Pass(model, rows, cache, rows).layers(range(LAYERS), model.embed(tokens[None]))
    scores = [score_rows(q, k)[0] for _, q, k in model.queries_and_keys(tokens, 1)]
    return cache[:, 0], torch.stack(scores)


@pytest.mark.parametrize("biased", [False, True])
def test_without_refinement_every_layer_keeps_what_it_scores_best(
    model: ht.Llama, biased: bool
) -> None:
    prefix, context, suffix = parts(25)
    noise = torch.randn(LAYERS, 32, generator=torch.Generator().manual_seed(0))
    bias = ht.Calibration(noise) if biased else None
    config = ht.HomerConfig.paper(max_chunk_len=32, target_len=17, calibration=bias)
    encoded = ht.encode(model, context, prefix, suffix, config, scheduler=LayerwiseScheduler)
    keys, scores = observe(model, torch.cat([prefix, context, suffix]))
    if biased:
        scores = scores - noise.flip(1)[:, -30:]
    chosen = []
    for layer in range(LAYERS):
        best = 2 + scores[layer, 2:27].topk(12).indices.sort().values
        rows = torch.cat([torch.arange(2), best, torch.arange(27, 30)])
        assert torch.allclose(encoded.keys[layer], keys[layer, rows].transpose(0, 1))
        chosen.append(rows.tolist())
    assert len(set(map(tuple, chosen))) > 1
    assert encoded.source_indices.tolist() == chosen[-1]


def test_a_layer_without_retrieval_heads_asks_all_of_its_heads(
    model: ht.Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrieving = torch.zeros(LAYERS, model.config.num_attention_heads)
    retrieving[1, 0] = 1
    monkeypatch.setattr("homer_triton.engine.scheduler.retrieval_heads", lambda _: retrieving)
    prefix, context, suffix = parts(25)
    votes = ht.HomerConfig(
        max_chunk_len=32, target_len=17, selection="votes,rows=1,window=1", recompute="suffix"
    )
    encoded = ht.encode(model, context, prefix, suffix, votes, scheduler=LayerwiseScheduler)
    tokens = torch.cat([prefix, context, suffix])
    keys, _ = observe(model, tokens)
    for layer, q, k in islice(model.queries_and_keys(tokens, 1), 2):
        weights = retrieving[1] if layer == 1 else None
        seen = score_rows(q, k, None, "softmax", "sum", weights)[0]
        best = 2 + seen[2:27].topk(12).indices.sort().values
        assert torch.allclose(encoded.keys[layer][:, 2:14], keys[layer, best].transpose(0, 1))


def test_without_refinement_a_tree_keeps_as_much_of_every_layer(model: ht.Llama) -> None:
    prefix, context, suffix = parts(200)
    full = ht.encode(model, context, prefix, suffix, CONFIG)
    layerwise = ht.encode(model, context, prefix, suffix, CONFIG, scheduler=LayerwiseScheduler)
    assert layerwise.plan.height == 3
    assert torch.equal(layerwise.pruned_at, full.pruned_at)
    assert layerwise.keys.shape == full.keys.shape
    assert torch.allclose(layerwise.keys[-1], full.keys[-1])
    assert not torch.allclose(layerwise.keys[0], full.keys[0])
    # Every key of the first layer is still that of some token, none twice.
    first = layerwise.keys[0].transpose(0, 1).flatten(1)[2:-3]
    assert len(first.unique(dim=0)) == len(first)


def test_without_refinement_siblings_may_run_as_a_batch(model: ht.Llama) -> None:
    prefix, context, suffix = parts(200)
    one, four = (
        ht.encode(
            model,
            context,
            prefix,
            suffix,
            replace(CONFIG, leaf_batch=leaf_batch),
            scheduler=LayerwiseScheduler,
        )
        for leaf_batch in (1, 4)
    )
    assert torch.allclose(one.keys, four.keys)


def test_nothing_to_prune_leaves_nothing_to_change(model: ht.Llama) -> None:
    prefix, context, suffix = parts(20)
    roomy = ht.HomerConfig.paper(max_chunk_len=32)
    plain = ht.encode(model, context, prefix, suffix, roomy)
    for scheduler in (LayerwiseScheduler, partial(RandomScheduler, seed=0)):
        other = ht.encode(model, context, prefix, suffix, roomy, scheduler=scheduler)
        assert torch.allclose(other.keys, plain.keys)


@pytest.mark.parametrize("scheduler", [RandomScheduler, LayerwiseScheduler])
def test_random_choices_follow_their_seed(
    model: ht.Llama, scheduler: type[RandomScheduler] | type[LayerwiseScheduler]
) -> None:
    prefix, context, suffix = parts(200)
    first, again, other = (
        ht.encode(
            model, context, prefix, suffix, CONFIG, scheduler=partial(scheduler, seed=seed)
        ).keys
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.slow
def test_random_pruning_spares_the_affix_and_spreads_over_the_text(model: ht.Llama) -> None:
    prefix, context, suffix = parts(200)
    kept = torch.zeros(205)
    for seed in range(40):
        random = partial(RandomScheduler, seed=seed)
        encoded = ht.encode(model, context, prefix, suffix, CONFIG, scheduler=random)
        sources = encoded.source_indices
        assert sources.tolist() == sorted(sources.tolist())
        kept[sources] += 1
    assert kept[:2].tolist() == [40, 40]
    assert kept[-3:].tolist() == [40, 40, 40]
    quarters = kept[2:-3].unflatten(0, (4, 50)).sum(1)
    assert quarters.sum() == 40 * 12
    assert quarters.min() > 80


@pytest.mark.slow
def test_variants_differ_from_the_settings_in_one_thing(tmp_path: Path) -> None:
    model = ht.load(save_model(tmp_path))
    bias = calibrate_on_filler(model, LIMIT // 2)
    assert bias.bias.shape == (LAYERS, LIMIT // 2)
    config = ht.HomerConfig()
    variants = make_variants(model, config, bias, seed=0)
    assert len({variant.name for variant in variants}) == len(variants)
    assert {variant.group for variant in variants} == {
        *("selection", "recompute", "positions", "refinement", "layers_tree", "W", "M", "T")
    }
    prefix, context, suffix = parts(200)
    results = {
        name: reader(prefix, context, suffix, 1).encoded
        for name, reader in as_readers(model, variants).items()
    }
    plain = results["selection: votes"]
    same = {name for name, e in results.items() if torch.equal(e.keys, plain.keys)}
    assert same >= {"selection: votes", "recompute: all", "positions: closed up"}
    # What has the defaults' own value, in a model and chunks this small.
    own = {
        f"layers_tree: {4 * LAYERS // 5}",
        f"layers_tree: {LAYERS}",
        f"M: {LIMIT // 2}",
        f"T: {LIMIT // 2}",
        "W: 0",
        "W: 1",
    }
    # So small a model has no retrieval heads.
    own |= {"selection: all heads", "selection: last layers"}
    alike = {"selection: window 1", "selection: window 7", "selection: last row asks"}
    assert same <= {"selection: votes", "recompute: all", "positions: closed up", *own, *alike}


@pytest.mark.slow
def test_the_table_comes_from_one_command(tmp_path: Path) -> None:
    output = tmp_path / "run"
    result = run(
        *("eval", "ablation", "--model", save_model(tmp_path / "model"), "-o", output),
        *("--lengths", "2x", "--depths", "0.5", "--samples", 1),
    )
    assert result.exit_code == 0, result.output
    metrics = json.loads((output / "metrics.json").read_text())
    names = [row["method"] for row in metrics["by_length"]]
    assert names[:4] == [
        "selection: paper, calibrated",
        "selection: paper, uncalibrated",
        "selection: votes",
        "selection: last row asks",
    ]
    assert all(name in result.stdout for name in names)
    assert all(row["low"] <= row["accuracy"] <= row["high"] for row in metrics["by_length"])
    assert (output / "variants.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("context", [20, 300])
def test_survivors_at_their_own_distances(context: int) -> None:
    """As transformers reads the kept tokens at those positions, shrunk into the limit."""
    peer = random_model(num_hidden_layers=LAYERS, dtype=torch.float64)
    model = ht.from_transformers(peer)
    limit = model.config.max_position_embeddings
    prefix, middle, suffix = parts(context)
    config = ht.HomerConfig(max_chunk_len=32, target_len=17)
    encoded = ht.encode(model, middle, prefix, suffix, config)
    spread = read_spread(model, encoded, new_tokens=8)

    positions, kept = spread.positions, encoded.source_indices
    assert (positions.diff() >= 0).all()
    assert positions[:2].tolist() == [0, 1]
    assert positions[-3:].tolist() == list(range(spread.next_position - 3, spread.next_position))
    if context == 20:
        assert torch.equal(positions, kept)
    else:
        assert spread.next_position == limit - 8
    ids = encoded.token_ids[kept][None]
    logits = peer(ids, position_ids=positions[None]).logits[0, -1]
    torch.testing.assert_close(spread.logits, logits.float())
