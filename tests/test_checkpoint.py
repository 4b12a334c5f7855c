"""A checkpoint's files: blocks, and what is refused when they are damaged, absent or not finite."""

import re
from pathlib import Path

import pytest
import torch
from checkpoints import edit_json, edit_tensors, save_checkpoint

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
