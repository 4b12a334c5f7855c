"""A checkpoint's files: blocks, and what is refused when they are damaged, absent or not finite."""

import json
import re
import resource
from pathlib import Path

import pytest
import torch
from checkpoints import edit_json, edit_tensors, save_checkpoint

import homer_triton as ht
from homer_triton.model.config import load_config
from homer_triton.model.errors import CheckpointError, MissingCheckpointError
from homer_triton.model.weights import Weights, load_weights

INDEX = "model.safetensors.index.json"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Weights:
    return load_weights(folder, load_config(folder), "cpu", dtype)


def test_a_tensor_of_several_blocks_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_checkpoint(tmp_path)
    monkeypatch.setattr("homer_triton.model.checkpoint._BLOCK_BYTES", 5 * 64 * 4)
    weights = load(tmp_path)
    assert torch.equal(weights.embedding, model.model.embed_tokens.weight)
    assert torch.equal(weights.norm, model.model.norm.weight)


def test_overflow_in_the_target_dtype_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    edit_tensors(tmp_path, model__norm__weight=torch.full((64,), 1e6))
    load(tmp_path, torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"NaN or infinity \(read as torch.float16\)"):
        load(tmp_path, torch.float16)


@pytest.mark.parametrize("length", [0, 5, 1000, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, length: int) -> None:
    save_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or corrupt"):
        load(tmp_path)


def test_a_damaged_header_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\xff" * 16 + file.read_bytes()[16:])
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        load(tmp_path)


def test_a_truncated_shard_is_refused_by_name(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, shards=True)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=f"{re.escape(shard.name)} is truncated"):
        load(tmp_path)


def test_an_absent_shard_is_refused_by_name(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, shards=True)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(MissingCheckpointError, match=f"names the shard {re.escape(shard.name)}"):
        load(tmp_path)


def test_a_shard_of_a_name_that_no_file_can_have_is_absent(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, shards=True)
    index = {"weight_map": {"model.norm.weight": "x" * 300}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MissingCheckpointError, match="names the shard xxx"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ({}, "has no weight_map"),
        ({"weight_map": ["model.safetensors"]}, "has no weight_map"),
        ({"weight_map": {"model.norm.weight": 3}}, "has no weight_map"),
        ({"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}, "has no weight_map"),
        ({"weight_map": {"no.such.tensor": "{shard}"}}, "lists no.such.tensor, which no shard"),
    ],
)
def test_a_corrupt_index_is_refused(tmp_path: Path, index: dict, sentence: str) -> None:
    save_checkpoint(tmp_path, shards=True)
    shard = min(tmp_path.glob("model-*.safetensors")).name
    file = tmp_path / INDEX
    edit_json(file, lambda content: index or {"metadata": {}})
    file.write_text(file.read_text().replace("{shard}", shard))
    with pytest.raises(CheckpointError, match=re.escape(sentence)):
        load(tmp_path)
    file.write_text("{")
    with pytest.raises(CheckpointError, match=r"index\.json is not valid JSON"):
        load(tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(MissingCheckpointError, match=r"\.bin or \.pth files are not read"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_hidden_layers": 60_000}, "holds 30 tensors, too few for the 60000 layers"),
        ({"num_hidden_layers": 30}, "lacks model.layers.10."),
        ({"vocab_size": 10**9}, "its config calls for [1000000000, 64]"),
        ({"intermediate_size": 10**9}, "its config calls for [1000000000, 64]"),
        ({"max_position_embeddings": 10**12, "num_key_value_heads": 4}, "its config calls for"),
    ],
)
def test_a_config_that_asks_for_too_much_is_refused_before_memory_is_taken(
    tmp_path: Path, change: dict, sentence: str
) -> None:
    save_checkpoint(tmp_path)
    edit_json(tmp_path / "config.json", lambda content: content | change)
    before = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(CheckpointError, match=re.escape(sentence)):
        load(tmp_path)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 1
    assert after.ru_maxrss - before.ru_maxrss < 64 * 1024


def test_a_limit_without_end_makes_no_tables_for_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    config, said = ht.HomerConfig(64, 16), []
    for limit in (10**12, 2048):
        edit_json(tmp_path / "config.json", lambda c, n=limit: c | {"max_position_embeddings": n})
        model = ht.load(tmp_path, "cpu")
        encoded = ht.encode(model, [5, 6, 7] * 20, suffix=[8], config=config)
        said.append(ht.generate(model, encoded, max_new_tokens=2).token_ids)
    assert said[0] == said[1]


def test_an_index_nested_without_end_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, shards=True)
    (tmp_path / INDEX).write_text('{"weight_map": ' + "[" * 200_000)
    with pytest.raises(CheckpointError, match=r"index\.json is not valid JSON"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.complex64])
def test_a_dtype_that_no_layer_runs_in_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    save_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="weights need a float type of 16 bits or more"):
        load(tmp_path, dtype)
