"""The sizes and settings of a checkpoint, read through transformers' own config classes."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from .errors import CheckpointError, MissingCheckpointError
from .families import FAMILIES, Family, why_unknown

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
# Far beyond any model: a config that asks for more is damaged or malicious.
_MOST_LAYERS = 2**16
_MOST_NUMBERS = 2**48
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_ROPE_NUMBERS = (
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "low_freq_factor",
    "high_freq_factor",
)
# One factor for each pair of a head's elements.
_ROPE_LISTS = ("short_factor", "long_factor")


@dataclass(frozen=True)
class ModelConfig:
    """A model's sizes and settings, under the names that transformers gives them.

    Attributes:
        vocab_size: Token ids in the vocabulary.
        hidden_size: Size of the hidden states.
        intermediate_size: Size inside the MLP.
        num_hidden_layers: Layers.
        num_attention_heads: Query heads.
        num_key_value_heads: Key-value heads.
        head_dim: Elements of a head.
        max_position_embeddings: The most tokens that the model was made to read.
        rms_norm_eps: The norms' epsilon.
        tie_word_embeddings: Whether the output head is the embedding.
        dtype: The checkpoint's dtype; float32 if it names none.
        eos_token_ids: The ids that end an answer.
        bos_token_id: The id that a text begins with, or None.
        window: Sliding window: the most tokens that some layer attends to at once, the query's own
            included. None: no limit.
        unrotated: The layers without RoPE.
        hf: The transformers config that all of this came from, with the RoPE parameters.
        unpacks: Whether some matrices are held in fewer bits than they are multiplied in.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    dtype: torch.dtype
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    window: int | None
    unrotated: frozenset[int]
    hf: PreTrainedConfig = field(repr=False, compare=False)
    unpacks: bool = False

    @property
    def family(self) -> Family:
        """What this model's layers do differently from Llama's."""
        return FAMILIES[self.hf.model_type]

    @property
    def head_norms(self) -> bool:
        """Whether queries and keys are normalised, head by head."""
        return self.family.head_norms

    @property
    def unpacked(self) -> int:
        """Elements of the largest matrix that is unpacked for a product; 0 if none is."""
        heads = self.num_attention_heads * self.head_dim
        inner = self.intermediate_size
        if self.family.fused:
            heads, inner = heads + 2 * self.num_key_value_heads * self.head_dim, 2 * inner
        return self.hidden_size * max(heads, inner) if self.unpacks else 0

    @property
    def context_limit(self) -> int:
        """The most tokens that the model was made to read at once: its limit or its window."""
        return min(self.max_position_embeddings, self.window or self.max_position_embeddings)

    @property
    def rope_type(self) -> str:
        """The type of RoPE scaling, one of `ROPE_TYPES`."""
        return _rope(self.hf)["rope_type"]

    @property
    def reaches_beyond_limit(self) -> bool:
        """Whether RoPE is rescaled for positions beyond the context limit."""
        return self.rope_type not in ("default", "llama3", "longrope")

    def check_window(self, rows: int, setting: str) -> None:
        """Raise `ValueError` if `rows` tokens do not fit the sliding window.

        setting: what the message says to lower.
        """
        if self.window is not None and rows > self.window:
            raise ValueError(
                f"{rows} tokens at once are more than the window of {self.window} that the model "
                f"attends to; lower {setting}."
            )

    @property
    def rope_switches_at(self) -> int | None:
        """The length beyond which the RoPE frequencies of all positions change; None for never."""
        if self.rope_type == "longrope":
            return int(_rope(self.hf)["original_max_position_embeddings"])
        return self.max_position_embeddings if self.rope_type == "dynamic" else None

    def check_switch(self, position: int, new_tokens: int) -> None:
        """Raise `ValueError` if longrope changes its frequencies within the new tokens.

        The keys in the cache were rotated with the old frequencies and would not fit the new ones.

        position: of the first new token.
        """
        original = self.rope_switches_at
        if self.rope_type != "longrope" or original is None:
            return
        if position <= original < position + new_tokens:
            raise ValueError(
                f"{new_tokens} new tokens after position {position} go past {original}, where the "
                "model's RoPE changes for all positions; lower max_new_tokens, or encode to a "
                f"target_len beyond {original}."
            )

    @property
    def rope_theta(self) -> float:
        """The base of the RoPE frequencies, before any scaling."""
        return _rope(self.hf)["rope_theta"]

    @classmethod
    def from_hf(
        cls, hf_config: PreTrainedConfig, eos_token_id: int | list[int] | None = None
    ) -> "ModelConfig":
        """The settings in a transformers config.

        Args:
            hf_config: The config of a model of a known family.
            eos_token_id: That of the model's generation config, which takes precedence over the
                model config's.

        Raises:
            CheckpointError: The layers here cannot compute this model. It is a `ValueError`.
        """
        if hf_config.model_type not in FAMILIES:
            raise CheckpointError(f"the model is of {why_unknown(hf_config.model_type)}.")
        sizes: dict[str, Any] = {name: getattr(hf_config, name, None) for name in _SIZES}
        if sizes["head_dim"] is None and sizes["num_attention_heads"]:
            sizes["head_dim"] = hf_config.hidden_size // hf_config.num_attention_heads
        _refuse_sizes(sizes)
        _refuse_unsupported(hf_config, sizes)
        if eos_token_id is None:
            eos_token_id = hf_config.eos_token_id
        return cls(
            **sizes,
            rms_norm_eps=hf_config.rms_norm_eps,
            tie_word_embeddings=hf_config.tie_word_embeddings,
            dtype=_dtype(hf_config.dtype or torch.float32),
            eos_token_ids=_token_ids(eos_token_id),
            bos_token_id=_bos(hf_config.bos_token_id, sizes["vocab_size"]),
            window=_window(hf_config),
            unrotated=_unrotated(hf_config),
            hf=hf_config,
        )

    def with_rope(self, rope_scaling: Mapping[str, Any]) -> "ModelConfig":
        """The same settings with other RoPE parameters.

        rope_scaling: in either of transformers' styles, `{"rope_type": "yarn", "factor": 4.0}` or
        `{"type": ...}`. The rope_theta stays unless it is named.

        Raises:
            ValueError: The parameters cannot be used.
        """
        named = {
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_ids) or None,
        }
        raw = {**self.hf.to_dict(), **named}
        raw.pop("rope_scaling", None)
        try:
            raw["rope_parameters"] = {"rope_theta": self.rope_theta, **rope_scaling}
            return _parse(raw)
        except (CheckpointError, TypeError) as error:
            raise ValueError(f"rope_scaling={rope_scaling!r} cannot be used: {error}") from error


def load_config(folder: Path, rope_scaling: Mapping[str, Any] | None = None) -> ModelConfig:
    """The config of the checkpoint in `folder`.

    It is read from config.json, with the end-of-sequence ids of generation_config.json where there
    is one. If neither names a first or last token of a text, there is none, whatever transformers'
    default is.

    rope_scaling: RoPE parameters that replace the checkpoint's, in either of transformers' styles,
    `{"rope_type": "yarn", "factor": 4.0}` or `{"type": ...}`. Its rope_theta stays unless they name
    one. original_max_position_embeddings defaults to max_position_embeddings.

    Raises:
        MissingCheckpointError: There is no config.json.
        CheckpointError: The config cannot be used.
        ValueError: `rope_scaling` cannot be used.
    """
    file = folder / "config.json"
    raw = read_json(file)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(f"{file} describes a model of {why_unknown(model_type)}.")
    generation_file = folder / "generation_config.json"
    generation = read_json(generation_file) if generation_file.exists() else {}
    named = {"bos_token_id": generation.get("bos_token_id"), "eos_token_id": None}
    if raw.get("quantization_config") is not None:
        method = _quantized_by(raw["quantization_config"])
        raise CheckpointError(
            f"{file} cannot be used: quantization_config is set, the weights are quantised (by "
            f"{method}); use the original checkpoint, and quantize='int8' if it is too large."
        )
    try:
        config = _parse({**named, **raw}, generation.get("eos_token_id"))
    except CheckpointError as error:
        raise CheckpointError(f"{file} cannot be used: {error}") from error
    return config if rope_scaling is None else config.with_rope(rope_scaling)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a checkpoint's JSON file.

    Raises:
        MissingCheckpointError: There is no such file.
        CheckpointError: It holds anything else.
    """
    if not file.is_file():
        raise MissingCheckpointError(f"{file.parent} is not a checkpoint: it has no {file.name}.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"Cannot read {file}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not a {type(content).__name__}.")
    return content


def _parse(raw: dict[str, Any], eos_token_id: Any = None) -> ModelConfig:
    """The config in a parsed config.json."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters")
    if isinstance(rope, dict):
        _refuse_rope(rope)  # transformers would only warn
    # transformers allocates lists of the length that some of these name.
    _refuse_sizes({name: raw[name] for name in _SIZES if raw.get(name) is not None})
    try:
        hf_config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    except Exception as error:  # the type depends on the field and on transformers' version
        sentence = " ".join(str(error).split())
        raise CheckpointError(f"transformers refuses it ({sentence})") from error
    return ModelConfig.from_hf(hf_config, eos_token_id)


def _refuse_sizes(sizes: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for sizes that no model has. Some may be missing."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise CheckpointError(f"{name} is {size!r} but must be a positive whole number.")
        most = _MOST_LAYERS if name == "num_hidden_layers" else _MOST_NUMBERS
        if size > most:
            raise CheckpointError(f"{name} is more than {most}, which no model has.")


def _refuse_unsupported(hf_config: PreTrainedConfig, sizes: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for a model that the layers here cannot compute."""
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    wide = (heads + 2 * kv_heads) * sizes["head_dim"]
    numbers = sizes["hidden_size"] * max(sizes["vocab_size"], 2 * sizes["intermediate_size"], wide)
    if numbers > _MOST_NUMBERS:
        raise CheckpointError(f"its sizes make a matrix of more than {_MOST_NUMBERS} numbers.")
    if heads % kv_heads:
        raise CheckpointError(
            f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})."
        )
    if sizes["head_dim"] % 2:
        raise CheckpointError(f"head_dim is {sizes['head_dim']} but RoPE needs an even one.")
    epsilon = hf_config.rms_norm_eps
    if not _is_number(epsilon) or not 0 <= epsilon < 1:
        raise CheckpointError(f"rms_norm_eps is {epsilon!r} but must be a small number.")
    for name in ("attention_bias", "mlp_bias"):
        if getattr(hf_config, name, False):
            raise CheckpointError(f"{name} is true; such biases are not supported.")
    if hf_config.hidden_act != "silu":
        raise CheckpointError(f"hidden_act is {hf_config.hidden_act!r}; only 'silu' is supported.")
    method = _quantized_by(getattr(hf_config, "quantization_config", None))
    if method not in (None, "torchao", "bitsandbytes"):
        raise CheckpointError(
            f"its weights are quantised by {method}, which is not supported; use the original, and "
            "quantize='int8', or torchao."
        )
    rope = _rope(hf_config)
    _refuse_rope(rope)
    if rope.get("rope_type") == "longrope":
        for name in _ROPE_LISTS:
            _refuse_factors(name, rope.get(name), sizes["head_dim"] // 2)
    if rope.get("rope_theta") is None:
        raise CheckpointError("rope_theta is missing.")


def _rope(hf_config: PreTrainedConfig) -> dict[str, Any]:
    """The RoPE parameters. transformers always fills them in, in its new style."""
    return cast(dict[str, Any], hf_config.rope_parameters)


def _refuse_rope(rope: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for RoPE parameters that cannot be used here."""
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise CheckpointError(f"the RoPE type is {rope_type!r}; known are {', '.join(ROPE_TYPES)}.")
    for name in _ROPE_NUMBERS:
        value = rope.get(name)
        if value is not None and not (_is_number(value) and value > 0):
            raise CheckpointError(
                f"the RoPE parameter {name} is {value!r} but must be positive and finite."
            )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError("partial_rotary_factor is set; only whole heads are rotated here.")


def _refuse_factors(name: str, factors: Any, pairs: int) -> None:
    """Raise `CheckpointError` unless there is a positive number for each pair of a head."""
    numbers = isinstance(factors, list) and all(_is_number(x) and x > 0 for x in factors)
    if not numbers or len(factors) != pairs:
        raise CheckpointError(f"the RoPE parameter {name} must be {pairs} positive numbers.")


def _quantized_by(quantization: Any) -> str | None:
    """The name of the quantisation method in a config, or None."""
    if quantization is None:
        return None
    known = quantization.get if isinstance(quantization, dict) else vars(quantization).get
    method = known("quant_method")
    return str(getattr(method, "value", method))


def _window(hf_config: PreTrainedConfig) -> int | None:
    """The sliding window in a config, or None.

    It holds for all layers, unless the config names some.
    """
    size = getattr(hf_config, "sliding_window", None)
    layers = getattr(hf_config, "layer_types", None) or ["sliding_attention"]
    used = getattr(hf_config, "use_sliding_window", True) and "sliding_attention" in layers
    if size is None or not used:
        return None
    if type(size) is not int or size < 1:
        raise CheckpointError(f"sliding_window is {size!r} but must be a positive whole number.")
    return size


def _unrotated(hf_config: PreTrainedConfig) -> frozenset[int]:
    """The layers for which a config turns RoPE off."""
    rotated = getattr(hf_config, "no_rope_layers", None)
    if rotated is None:
        return frozenset()
    layers = hf_config.num_hidden_layers
    if not isinstance(rotated, list) or len(rotated) < layers or not set(rotated) <= {0, 1}:
        raise CheckpointError(f"no_rope_layers must be a list of {layers} zeros and ones.")
    return frozenset(index for index in range(layers) if not rotated[index])


def _dtype(value: Any) -> torch.dtype:
    """A float type, given as one or by its name."""
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or not is_computable(dtype):
        raise CheckpointError(f"dtype is {value!r} but must be a float type of 16 bits or more.")
    return dtype


def is_computable(dtype: torch.dtype) -> bool:
    """Whether the layers can run in a dtype."""
    return dtype in _DTYPES


def _is_number(value: Any) -> bool:
    """Whether it is a finite number that fits a float. True and false are not."""
    try:
        return not isinstance(value, bool) and math.isfinite(value)
    except (TypeError, OverflowError):
        return False


def _bos(value: Any, vocabulary: int) -> int | None:
    """The token that a text begins with, or None."""
    if value is None or (type(value) is int and 0 <= value < vocabulary):
        return value
    raise CheckpointError(
        f"bos_token_id is {value!r} but must be a token id of the vocabulary of {vocabulary}."
    )


def _token_ids(value: Any) -> tuple[int, ...]:
    """One id, a list of ids or nothing, as a tuple."""
    if value is None:
        return ()
    ids = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(type(i) is int for i in ids):
        raise CheckpointError(
            f"eos_token_id is {value!r} but must be a token id or a list of them."
        )
    return ids
