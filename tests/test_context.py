"""Encoded contexts: what is saved comes back, what goes on from one goes on right."""

import json
from pathlib import Path

import pytest
import torch
from cases import LAYERS, peers, random_tokens, to_config
from checkpoints import random_model
from oracle_tree import Settings
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import homer_triton as ht

TENSORS = ("keys", "values", "positions", "source_indices", "token_ids", "pruned_at", "logits")


@pytest.fixture(scope="module")
def encoded() -> ht.EncodedContext:
    """Six leaves, one of them short, of a float64 model."""
    tokens = random_tokens(75)
    settings = to_config(Settings(max_chunk_len=18, target_len=16, layers_warmup=2))
    return ht.encode(peers(4, 2)[1], tokens[2:72], tokens[:2], tokens[72:], settings)


def test_what_is_saved_comes_back(encoded: ht.EncodedContext, tmp_path: Path) -> None:
    encoded.save(tmp_path / "kept.safetensors")
    loaded = ht.EncodedContext.load(tmp_path / "kept.safetensors")
    for name in TENSORS:
        assert torch.equal(getattr(loaded, name), getattr(encoded, name)), name
        assert getattr(loaded, name).dtype == getattr(encoded, name).dtype, name
    for name in ("next_position", "plan", "stats", "model"):
        assert getattr(loaded, name) == getattr(encoded, name), name
    model, prompt = peers(4, 2)[1], random_tokens(4)
    again = ht.generate(model, loaded, prompt, 6)
    assert again.token_ids == ht.generate(model, encoded, prompt, 6).token_ids
    assert [path.name for path in tmp_path.iterdir()] == ["kept.safetensors"]


def test_a_path_that_cannot_be_written_is_refused(
    encoded: ht.EncodedContext, tmp_path: Path
) -> None:
    for path in (tmp_path, tmp_path / "missing" / "kept.safetensors"):
        with pytest.raises(ValueError, match="Cannot write"):
            encoded.save(path)
    assert not any(tmp_path.iterdir())


def test_it_is_named_in_a_line_and_moves(encoded: ht.EncodedContext) -> None:
    assert repr(encoded) == (
        f"EncodedContext(75 tokens in {len(encoded)} rows; {LAYERS} layers, 2 heads of 8, "
        "torch.float64, cpu)"
    )
    moved = encoded.to("meta")
    assert {getattr(moved, name).device.type for name in TENSORS} == {"meta"}
    assert (moved.plan, moved.model) == (encoded.plan, encoded.model)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no encoded context"):
        ht.EncodedContext.load(tmp_path / "kept.safetensors")


@pytest.mark.parametrize(
    "damage",
    [
        "truncated",
        "empty",
        "text",
        "no metadata",
        "no tensor",
        "no plan",
        "broken json",
        "no stats",
        "a row short",
    ],
)
def test_a_damaged_file_is_refused(encoded: ht.EncodedContext, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "kept.safetensors"
    encoded.save(path)
    damage_file(path, damage)
    with pytest.raises(ValueError, match="is not an encoded context, or is damaged"):
        ht.EncodedContext.load(path)


def damage_file(path: Path, damage: str) -> None:
    """Spoil a saved encoding in one of the ways that `test_a_damaged_file_is_refused` names."""
    content = path.read_bytes()
    if damage in ("truncated", "empty", "text"):
        path.write_bytes({"truncated": content[:-8], "empty": b"", "text": b"once upon"}[damage])
        return
    with safe_open(path, "pt") as file:
        described = json.loads(file.metadata()["homer_triton.encoded"])
        tensors = {name: file.get_tensor(name) for name in TENSORS}
    if damage == "no tensor":
        del tensors["values"]
    if damage == "a row short":
        tensors["positions"] = tensors["positions"][1:]
    if damage in ("no plan", "no stats"):
        del described[damage.removeprefix("no ")]
    text = json.dumps(described)[: -5 if damage == "broken json" else None]
    save_file(tensors, path, None if damage == "no metadata" else {"homer_triton.encoded": text})


@pytest.mark.parametrize("recompute", ["none", "suffix", "all"])
def test_transformers_goes_on_as_we_do(recompute: str) -> None:
    hf_model, model, _ = peers(4, 2)
    tokens, new = random_tokens(90), random_tokens(5, seed=1)
    tree = 6 if recompute == "all" else None
    settings = to_config(Settings(18, 16, 2, recompute=recompute, layers_tree=tree))
    encoded = ht.encode(model, tokens[2:87], tokens[:2], tokens[87:], settings)
    with torch.no_grad():
        theirs = hf_model(**encoded.to_transformers(new)).logits[0]
        ours = model.forward(
            torch.tensor(new),
            encoded.open_cache(model, room=len(new)),
            filled=len(encoded),
            position=encoded.next_position,
            all_logits=True,
        )
    # transformers computes its norms in float32 even in a float64 model.
    torch.testing.assert_close(ours, theirs.float(), atol=1e-4, rtol=1e-4)


def test_transformers_generates_what_we_generate(encoded: ht.EncodedContext) -> None:
    hf_model, model, _ = peers(4, 2)
    prompt = random_tokens(3, seed=2)
    ours = ht.generate(model, encoded, prompt, max_new_tokens=12)
    theirs = hf_model.generate(
        **encoded.to_transformers(prompt), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert ours.token_ids == theirs[0, len(prompt) :].tolist()


def test_one_encoding_answers_many_prompts_and_stays_as_it_is(encoded: ht.EncodedContext) -> None:
    hf_model, model, _ = peers(4, 2)
    before = {name: getattr(encoded, name).clone() for name in TENSORS}
    prompts = [random_tokens(4, seed) for seed in range(3)]
    alone = [ht.generate(model, encoded, prompt, 5).token_ids for prompt in prompts]
    assert len({tuple(ids) for ids in alone}) > 1
    assert [ht.generate(model, encoded, prompt, 5).token_ids for prompt in prompts] == alone
    with torch.no_grad():
        hf_model(**encoded.to_transformers(prompts[0]))
    for name, tensor in before.items():
        assert torch.equal(getattr(encoded, name), tensor), name


def test_encode_changes_neither_its_inputs_nor_the_model() -> None:
    hf_model, model, _ = peers(4, 1)
    parts = [torch.tensor(random_tokens(count)) for count in (60, 2, 3)]
    given = [part.clone() for part in parts]
    weights = {name: weight.clone() for name, weight in hf_model.state_dict().items()}
    ht.encode(model, *parts, to_config(Settings(16, 16, 2)))
    assert all(torch.equal(a, b) for a, b in zip(parts, given, strict=True))
    for name, weight in hf_model.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_another_models_encoding_is_refused(encoded: ht.EncodedContext) -> None:
    other = ht.from_transformers(random_model(num_hidden_layers=LAYERS, seed=5), ops="torch")
    with pytest.raises(ValueError, match="another model"):
        ht.generate(other, encoded)


@pytest.mark.parametrize("none", [[], torch.empty(1, 0, dtype=torch.int64)])
def test_going_on_without_a_token_is_refused(
    encoded: ht.EncodedContext, none: Tensor | list[int]
) -> None:
    with pytest.raises(ValueError, match="new_ids is empty"):
        encoded.to_transformers(none)
