"""The config of a checkpoint: what is read, what a RoPE override does, what is refused."""

import re
from pathlib import Path

import pytest
import torch
from checkpoints import (
    LIMIT,
    ROPES,
    SHAPES,
    TIED,
    edit_json,
    matrices,
    random_model,
    save_checkpoint,
)

from homer_triton.model.config import ModelConfig, load_config
from homer_triton.model.errors import CheckpointError, MissingCheckpointError


@pytest.mark.parametrize("old_style", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_are_those_of_the_checkpoint(tmp_path: Path, shape: str, old_style: bool) -> None:
    model = save_checkpoint(tmp_path, shape, dtype=torch.bfloat16, old_style=old_style)
    config = load_config(tmp_path)
    first = model.model.layers[0]
    q, k, _, _, up = matrices(first)
    assert (config.vocab_size, config.hidden_size) == model.model.embed_tokens.weight.shape
    assert config.intermediate_size == len(up)
    assert config.num_hidden_layers == len(model.model.layers)
    assert config.num_attention_heads * config.head_dim == len(q)
    assert config.num_key_value_heads * config.head_dim == len(k)
    assert config.max_position_embeddings == LIMIT
    assert config.rms_norm_eps == first.input_layernorm.variance_epsilon
    assert config.tie_word_embeddings == (shape in TIED)
    assert config.dtype == torch.bfloat16
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    assert config.rope_type == model.config.rope_parameters["rope_type"]
    assert config.hf.rope_parameters["rope_theta"] == model.config.rope_parameters["rope_theta"]


def test_end_of_sequence_ids_of_the_generation_config_come_first(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    generation = tmp_path / "generation_config.json"
    edit_json(generation, lambda content: {"eos_token_id": [5, 7]})
    assert load_config(tmp_path).eos_token_ids == (5, 7)
    edit_json(generation, lambda content: {"do_sample": False})
    assert load_config(tmp_path).eos_token_ids == (2,)
    generation.unlink()
    edit_json(tmp_path / "config.json", lambda content: content | {"eos_token_id": [3, 4]})
    assert load_config(tmp_path).eos_token_ids == (3, 4)


@pytest.mark.parametrize("style", ["type", "rope_type"])
@pytest.mark.parametrize("shape", ["llama-2", "llama-3.1"])
def test_rope_scaling_replaces_all_but_theta(tmp_path: Path, shape: str, style: str) -> None:
    model = save_checkpoint(tmp_path, shape)
    given = {style: "yarn", "factor": 4.0}
    rope = load_config(tmp_path, given).hf.rope_parameters
    assert rope["rope_type"] == "yarn"
    assert rope["factor"] == 4.0
    assert rope["original_max_position_embeddings"] == LIMIT
    assert rope["rope_theta"] == model.config.rope_parameters["rope_theta"]
    assert "low_freq_factor" not in rope
    assert given == {style: "yarn", "factor": 4.0}


def test_rope_scaling_may_name_theta_and_the_original_limit(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama-3", old_style=True)
    given = {**ROPES["yarn"], "rope_theta": 1234.0}
    rope = load_config(tmp_path, given).hf.rope_parameters
    assert rope["rope_theta"] == 1234.0
    assert rope["original_max_position_embeddings"] == LIMIT // 4


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"rope_type": "spiral", "factor": 2.0}, "'spiral'; known are default, linear"),
        ({"rope_type": "yarn"}, "factor"),
        ({"rope_type": "linear", "factor": -1.0}, "factor is -1.0 but must be positive"),
        ({"rope_type": "yarn", "factor": float("inf")}, "factor is inf but must be positive"),
        ({"rope_type": "linear", "factor": float("nan")}, "factor is nan but must be positive"),
        ({"rope_type": "linear", "factor": 10**400}, "but must be positive and finite"),
        ({"rope_type": "linear", "factor": True}, "factor is True but must be positive"),
        ({"rope_type": "dynamic", "factor": "two"}, "factor is 'two' but must be positive"),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "whole heads"),
        ("yarn", "rope_scaling='yarn' cannot be used"),
    ],
)
def test_bad_rope_scaling_is_refused(tmp_path: Path, given: object, sentence: str) -> None:
    save_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="rope_scaling") as error:
        load_config(tmp_path, given)  # type: ignore[arg-type]
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "bert"}, "type 'bert'; known are llama, mistral, qwen2"),
        ({"model_type": None}, "type None; known are llama"),
        ({"model_type": ["llama"]}, "type ['llama']; known are llama"),
        ({"model_type": "gemma2"}, "'gemma2', which needs another layer (its norms add one"),
        ({"model_type": "olmo2"}, "'olmo2', which needs another layer (its norms stand behind"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0 but must be"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "config.json cannot be used"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.5}, "only whole heads are rotated"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias is true"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "(4) is not a multiple of"),
        ({"hidden_size": 66}, "hidden size (66) is not a multiple"),
        ({"head_dim": 15}, "an even"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0"),
        ({"intermediate_size": -112}, "intermediate_size is -112"),
        ({"head_dim": float("nan")}, "head_dim is nan"),
        ({"max_position_embeddings": float("inf")}, "max_position_embeddings is inf"),
        ({"max_position_embeddings": 10**400}, "max_position_embeddings is more than"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is more than 65536"),
        ({"num_attention_heads": 10**9, "num_key_value_heads": 10**9}, "1000000000"),
        ({"head_dim": 10**14}, "a matrix of more than"),
        ({"hidden_size": 10**9, "vocab_size": 10**9}, "a matrix of more than"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05"),
        ({"bos_token_id": 96}, "bos_token_id is 96"),
        ({"bos_token_id": "<s>"}, "bos_token_id"),
        ({"bos_token_id": [1, 2]}, "bos_token_id"),
        ({"num_attention_heads": 0}, "config.json cannot be used"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is set"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "'spiral'; known are default"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "rope_theta"),
        ({"rope_scaling": {"type": "longrope"}}, "longrope"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"eos_token_id": "stop"}, "eos_token_id"),
        ({"dtype": "int8"}, "int8"),
        ({"dtype": "quick"}, "quick"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        # Of a value of any length, only the ends are shown.
        ({"hidden_act": "gelu" * 10_000}, "elu'; only 'silu' is supported."),
    ],
)
def test_unsupported_configs_are_refused_by_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], change: dict, sentence: str
) -> None:
    save_checkpoint(tmp_path)
    edit_json(tmp_path / "config.json", lambda content: content | change)
    capfd.readouterr()
    with pytest.raises(CheckpointError, match=re.escape(sentence)) as error:
        load_config(tmp_path)
    assert "config.json" in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1500
    assert capfd.readouterr().err == ""  # no warning beside the one sentence


def test_a_transformers_config_of_another_architecture_is_refused() -> None:
    hf_config = random_model().config
    assert ModelConfig.from_hf(hf_config, eos_token_id=9).eos_token_ids == (9,)
    hf_config.dtype = "bfloat16"  # transformers leaves the name there when it has saved a model
    assert ModelConfig.from_hf(hf_config).dtype == torch.bfloat16
    hf_config.model_type = "bert"
    with pytest.raises(CheckpointError, match="'bert'; known are"):
        ModelConfig.from_hf(hf_config)


def test_what_names_no_first_or_last_token_has_none(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    config, generation = tmp_path / "config.json", tmp_path / "generation_config.json"
    edit_json(generation, lambda content: {"do_sample": False})
    names = ("bos_token_id", "eos_token_id")
    edit_json(config, lambda raw: {key: raw[key] for key in raw if key not in names})
    found = load_config(tmp_path, {"rope_type": "linear", "factor": 2.0})
    assert (found.bos_token_id, found.eos_token_ids) == (None, ())
    edit_json(generation, lambda content: {"bos_token_id": 7})
    assert load_config(tmp_path).bos_token_id == 7
    edit_json(config, lambda raw: raw | {"bos_token_id": None})
    assert load_config(tmp_path).bos_token_id is None


NESTED = b'{"model_type": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"


@pytest.mark.parametrize(
    "content", [b'{"model_type": "lla', b"\xff\xfe\x00", b"[1, 2]", b"", NESTED]
)
def test_a_corrupt_config_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_config(tmp_path)


def test_a_missing_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingCheckpointError, match=r"has no config\.json"):
        load_config(tmp_path)
