"""Families beside Llama: trees against the oracle, what transformers makes of a finished cache, and
what each of them refuses.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import LAYERS, Lengths, assert_equal, encode_both, random_tokens
from checkpoints import FAMILIES, LIMIT, random_model, save_checkpoint
from command_line import checkpoint, run
from oracle import Oracle
from oracle_tree import Settings
from transformers import PreTrainedModel

import homer_triton as ht
from homer_triton.model.families import FAMILIES as KNOWN

# The oracle has default RoPE alone.
PLAIN = [name for name, shape in FAMILIES.items() if "rope_parameters" not in shape]
TREE = Lengths(2, 40, 3, LAYERS, Settings(16, 16, 1))
PROMPT = random_tokens(30)


@cache
def peers(family: str) -> tuple[PreTrainedModel, ht.Llama, Oracle]:
    hf_model = random_model(family, torch.float64, num_hidden_layers=LAYERS)
    return hf_model, ht.from_transformers(hf_model, ops="torch"), Oracle(hf_model)


def test_every_family_is_tested() -> None:
    assert {shape["model_type"] for shape in FAMILIES.values()} == KNOWN.keys() - {"llama"}


@pytest.mark.parametrize("recompute", ["none", "suffix", "all"])
@pytest.mark.parametrize("family", PLAIN)
def test_a_tree_is_the_oracles(family: str, recompute: Any) -> None:
    votes = replace(TREE.settings, asking=3, logit="softmax", heads="sum", target_len=12)
    for settings in (TREE.settings, votes):
        settings = replace(settings, recompute=recompute, layers_tree=LAYERS)
        for leaf_batch in (1, 2):
            case = replace(TREE, settings=settings, leaf_batch=leaf_batch)
            assert_equal(*encode_both(peers(family), case))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_chunk_is_the_plain_prefill_and_transformers_goes_on(family: str) -> None:
    hf_model = random_model(family, num_hidden_layers=LAYERS)
    encoded = ht.encode(ht.from_transformers(hf_model, ops="torch"), PROMPT)
    prompt = encoded.token_ids[None]
    assert len(encoded) == len(prompt[0]) >= len(PROMPT)
    expected = hf_model(prompt).logits[0, -1]
    torch.testing.assert_close(encoded.logits, expected, rtol=0, atol=1e-4)
    go_on = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    whole = hf_model.generate(prompt, **go_on)[0, len(prompt[0]) :]
    first = encoded.logits.argmax()[None]
    rest = hf_model.generate(**encoded.to_transformers(first), **{**go_on, "max_new_tokens": 19})
    assert rest[0].tolist() == whole.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_text_goes_on_in_the_familys_own_class(family: str) -> None:
    hf_model = random_model(family, num_hidden_layers=LAYERS)
    model = ht.from_transformers(hf_model, ops="torch")
    encoded = ht.encode(model, random_tokens(300), random_tokens(2), random_tokens(5))
    assert len(encoded) < LIMIT // 2 < 300
    ours = ht.generate(model, encoded, max_new_tokens=12).token_ids
    first = encoded.logits.argmax()[None]
    kwargs = encoded.to_transformers(first)
    theirs = hf_model.generate(**kwargs, max_new_tokens=11, do_sample=False, eos_token_id=None)
    stop = next((i + 1 for i, token in enumerate(ours) if token == 2), 12)
    assert ours == theirs[0].tolist()[:stop]


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_shards_have_the_shared_models_fingerprint(tmp_path: Path, family: str) -> None:
    hf_model = save_checkpoint(tmp_path, family, shards=True)
    loaded = ht.load(tmp_path, device="cpu", ops="torch")
    shared = ht.from_transformers(hf_model, ops="torch")
    assert loaded.fingerprint == shared.fingerprint == ht.loading.fingerprint_of(tmp_path)
    named = dict(hf_model.named_parameters())
    for name in (name for name in named if name.endswith(("bias", "q_norm.weight"))):
        named[name].data.neg_()
        assert shared.fingerprint != loaded.fingerprint, name
        named[name].data.neg_()


def test_longrope_takes_its_factors_by_the_length() -> None:
    hf_model = random_model("phi3.5")
    model = ht.from_transformers(hf_model, ops="torch")
    for length in (3 * LIMIT, LIMIT // 2, LIMIT - 4, LIMIT - 3):
        tokens = torch.tensor(random_tokens(length))
        ours = model.forward(tokens, model.new_cache(length), all_logits=True)
        with torch.no_grad():
            theirs = hf_model(tokens[None]).logits[0]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_an_answer_that_crosses_longropes_switch_is_refused() -> None:
    model = ht.from_transformers(random_model("phi3.5"), ops="torch")
    encoded = ht.encode(model, random_tokens(29), [1], config=ht.HomerConfig(LIMIT, LIMIT))
    most = ht.generate(model, encoded, max_new_tokens=30, min_new_tokens=30)
    assert len(most.token_ids) == 30
    with pytest.raises(ValueError, match=r"31 new tokens after position 30 go past 60, where"):
        ht.generate(model, encoded, max_new_tokens=31)


WINDOW = 24


@pytest.fixture
def windowed() -> ht.Llama:
    """Attention is limited to 24 tokens in every layer, the context to 64."""
    hf_model = random_model("mistral 0.1", sliding_window=WINDOW, num_hidden_layers=LAYERS)
    return ht.from_transformers(hf_model, ops="torch")


def test_a_window_that_chunks_fit_changes_nothing(windowed: ht.Llama) -> None:
    assert windowed.config.window == windowed.config.context_limit == WINDOW
    tokens = random_tokens(200)
    free = ht.from_transformers(
        random_model("mistral 0.1", sliding_window=None, num_hidden_layers=LAYERS), ops="torch"
    )
    config = ht.HomerConfig(WINDOW, 16)
    encoded, expected = (ht.encode(x, tokens[6:], config=config) for x in (windowed, free))
    assert torch.equal(encoded.source_indices, expected.source_indices)
    assert torch.equal(encoded.keys, expected.keys)
    assert encoded.plan.max_chunk_len == WINDOW
    # Left out, chunks are short enough.
    assert ht.encode(windowed, tokens).plan.max_chunk_len <= WINDOW


def test_more_than_a_window_is_refused_with_what_to_change(windowed: ht.Llama) -> None:
    with pytest.raises(ValueError, match=r"the window of 24 .* lower max_chunk_len\."):
        ht.encode(windowed, random_tokens(200), config=ht.HomerConfig(30, 16))
    with pytest.raises(ValueError, match=r"30 tokens .* the window of 24 .* lower the length"):
        windowed.forward(torch.tensor(random_tokens(30)), windowed.new_cache(30))
    encoded = ht.encode(windowed, random_tokens(200), config=ht.HomerConfig(WINDOW, 16))
    assert ht.generate(windowed, encoded, max_new_tokens=8).token_ids
    with pytest.raises(ValueError, match=r"25 tokens .* lower max_new_tokens, or encode"):
        ht.generate(windowed, encoded, max_new_tokens=9)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"use_sliding_window": False, "sliding_window": 8}, None),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}, None),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, 8),
    ],
)
def test_qwens_windows_count_where_a_layer_has_one(settings: Any, expected: int | None) -> None:
    for family in ("qwen2", "qwen3"):
        config = ht.ModelConfig.from_hf(random_model(family, **settings).config)
        assert config.window == expected


def test_plan_needs_a_config_alone(tmp_path: Path) -> None:
    for number, family in enumerate(FAMILIES):
        folder = tmp_path / str(number)
        random_model(family, num_hidden_layers=LAYERS).config.save_pretrained(folder)
        result = run("plan", "--model", folder, "--context-len", 100, "--suffix-len", 8)
        assert result.exit_code == 0, result.stderr
        assert "tokens in the cache" in result.stdout


def test_a_family_is_refused_by_name_on_the_command_line(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"llama"', '"gemma2"'))
    result = run("plan", "--model", folder, "--context-len", 1000)
    assert result.exit_code == 2
    assert "'gemma2', which needs another layer" in result.stderr
    assert len(result.stderr.splitlines()) == 1
