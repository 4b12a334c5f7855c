"""Tiny random checkpoints of every supported family and shape, made by transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

# The context limit of the tiny models, short enough for tests to go beyond it.
LIMIT = 64

_BASE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": LIMIT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Wide enough for attention to be peaked and logits to be far apart.
    "initializer_range": 0.2,
}

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": LIMIT // 4},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": LIMIT // 8,
    },
}

_LLAMA3_ROPE = {"rope_theta": 500000.0, **ROPES["llama3"]}

_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}

FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
    "mistral 0.1": {"model_type": "mistral", "head_dim": 24, "num_key_value_heads": 4},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2},
    "qwen2.5": {
        "model_type": "qwen2",
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 1000000.0, **ROPES["yarn"]},
    },
    "qwen3": {
        "model_type": "qwen3",
        "num_key_value_heads": 2,
        "head_dim": 24,
        "tie_word_embeddings": True,
    },
    "qwen3 yarn": {
        "model_type": "qwen3",
        "num_key_value_heads": 4,
        "head_dim": 16,
        "rope_parameters": {"rope_theta": 1000000.0, **ROPES["yarn"]},
    },
    "smollm3": {
        "model_type": "smollm3",
        "num_key_value_heads": 1,
        "no_rope_layers": [1, 0, 1, 1, 1, 0, 1],
    },
    "phi3": {"model_type": "phi3", "num_key_value_heads": 4},
    "phi3.5": {
        "model_type": "phi3",
        "num_key_value_heads": 2,
        "original_max_position_embeddings": LIMIT - 4,
        "rope_parameters": {"rope_theta": 10000.0, **_LONGROPE},
    },
}

SHAPES: dict[str, dict[str, Any]] = {
    **FAMILIES,
    "llama-1": {"rms_norm_eps": 1e-6},
    "llama-2": {"rms_norm_eps": 1e-5},
    "llama-3": {"num_key_value_heads": 2, "rope_parameters": {"rope_theta": 500000.0}},
    "llama-3.1": {"num_key_value_heads": 2, "rope_parameters": _LLAMA3_ROPE},
    "llama-3.2": {
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rope_parameters": _LLAMA3_ROPE,
    },
    "explicit head_dim": {"num_key_value_heads": 2, "head_dim": 24},
}


TIED = [shape for shape in SHAPES if shape in ("llama-3.2", "qwen2.5", "qwen3", "smollm3")]


def matrices(layer: Any) -> tuple[Tensor, ...]:
    """The weights for q, k and v, gate and up of a transformers layer, apart even where they are
    fused.
    """
    attention, mlp, config = layer.self_attn, layer.mlp, layer.self_attn.config
    if config.model_type == "phi3":
        heads = [config.num_attention_heads, *[config.num_key_value_heads] * 2]
        sizes = [attention.head_dim * count for count in heads]
        return *attention.qkv_proj.weight.split(sizes), *mlp.gate_up_proj.weight.chunk(2)
    apart = attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj
    return tuple(part.weight for part in apart)


def random_model(
    shape: str = "llama-3", dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any
) -> PreTrainedModel:
    """A transformers model of one of `SHAPES`, random weights; `settings` override its config."""
    wanted = {"model_type": "llama", **_BASE, **_copy(SHAPES[shape]), **_copy(settings)}
    config = CONFIG_MAPPING[wanted.pop("model_type")](**{"pad_token_id": None, **wanted})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model.to(dtype)


def save_checkpoint(
    folder: Path,
    shape: str = "llama-3",
    dtype: torch.dtype = torch.float32,
    shards: bool = False,
    old_style: bool = False,
    **settings: Any,
) -> PreTrainedModel:
    """Save a `random_model` in `folder` and return it.

    shards: as several safetensors files with an index; old_style: with the config.json that
    transformers wrote before version 5 (`rope_theta`, `rope_scaling`, `torch_dtype`).
    """
    model = random_model(shape, dtype, **settings)
    model.save_pretrained(folder, max_shard_size="100KB" if shards else "1GB")
    if old_style:
        edit_json(folder / "config.json", _to_old_style)
    return model


def edit_json(file: Path, edit: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Replace the object in a JSON file by what `edit` returns, or keep what it did in place."""
    content = json.loads(file.read_text())
    file.write_text(json.dumps(edit(content) or content))


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Replace, add or (None) remove tensors of a checkpoint in one file; `__` stands for a dot."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, file)


def _to_old_style(config: dict[str, Any]) -> None:
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    rope.pop("partial_rotary_factor", None)
    config["rope_scaling"] = None if rope == {"type": "default"} else rope
    config["torch_dtype"] = config.pop("dtype")


def _copy(settings: dict[str, Any]) -> dict[str, Any]:
    """A copy that transformers may write into."""
    return json.loads(json.dumps(settings))
