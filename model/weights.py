"""A model's weights: read from safetensors into fused matrices, or shared with transformers.

Sizes in the docstrings: V vocabulary, E hidden size, F intermediate size, HQ query heads and HKV
key heads of D elements.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checkpoint import StoredTensor, catalogue, read_into, some
from .config import ModelConfig, is_computable
from .errors import CheckpointError
from .families import FAMILIES, Family
from .quantized import FourBit, Quantize, is_quantized, quantizer, shared, unpacks

if TYPE_CHECKING:  # its module takes seconds to import
    from transformers import PreTrainedModel

# A layer's matrices that belong side by side, by their names in a checkpoint.
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj")
_FUSED_QKV, _FUSED_MLP = ("self_attn.qkv_proj",), ("mlp.gate_up_proj",)
# Tables that old checkpoints carry and that follow from the config.
_DERIVED = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")


@dataclass
class LayerWeights:
    """One decoder layer. The outputs of a tuple's matrices belong side by side, in that order.

    Loaded weights have one fused matrix in each tuple, shared and quantised ones transformers'
    separate matrices.
    input_norm, post_norm: [E]; qkv: [(HQ + 2 HKV) D, E] in all; output: [E, HQ D];
    gate_up: [2 F, E] in all; down: [E, F]; where the family has them, qkv_bias: [(HQ + 2 HKV) D] in
    all, else empty; q_norm, k_norm: [D]. `q` [HQ D, E] and `kv` [2 HKV D, E] are views of `qkv`,
    and so with the biases.
    """

    input_norm: Tensor
    qkv: tuple[Tensor, ...]
    output: Tensor
    post_norm: Tensor
    gate_up: tuple[Tensor, ...]
    down: Tensor
    qkv_bias: tuple[Tensor, ...] = ()
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    q: tuple[Tensor, ...] = field(init=False)
    kv: tuple[Tensor, ...] = field(init=False)
    q_bias: tuple[Tensor, ...] = field(init=False)
    kv_bias: tuple[Tensor, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.q, self.kv = self._apart(self.qkv)
        self.q_bias, self.kv_bias = self._apart(self.qkv_bias)

    def _apart(self, fused: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What belongs to the queries, and what to keys and values."""
        if not fused:
            return (), ()
        first, rest = fused[0], fused[1:]
        q_rows = self.output.shape[1]
        return ((first,), rest) if rest else ((first[:q_rows],), (first[q_rows:],))


@dataclass
class Weights:
    """All of a model. embedding, lm_head: [V, E], the same tensor when they are tied; norm: [E]."""

    embedding: Tensor
    layers: list[LayerWeights]
    norm: Tensor
    lm_head: Tensor

    @property
    def unpacks(self) -> bool:
        """Whether some matrices are held in fewer bits than they are multiplied in."""
        return any(
            unpacks(matrix)
            for layer in self.layers
            for matrix in (*layer.qkv, layer.output, *layer.gate_up, layer.down)
        )


def load_weights(
    folder: Path,
    config: ModelConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    quantize: Quantize | None = None,
) -> Weights:
    """The weights of the checkpoint in `folder`: one safetensors file, or shards with an index.

    Each tensor goes straight to its place on `device`, converted to `dtype` (any float type);
    beside the result no more than a few megabytes are held. quantize: what the layers' matrices are
    held as (`quantized.quantizer`), each made from its whole matrix in `dtype`. Raises
    `MissingCheckpointError` for files that are not there, `CheckpointError` for corrupt ones, for
    missing, unexpected or misshapen tensors and for NaN or infinity, `ValueError` for a `dtype`
    that is no float type and for what cannot be quantised here.
    """
    if not is_computable(dtype):
        raise ValueError(f"dtype is {dtype} but weights need a float type of 16 bits or more.")
    shrink = None if quantize is None else quantizer(quantize, device)
    # Every header is checked before any memory is allocated.
    stored = check_stored(folder, config)
    if shrink is not None:
        return _assemble(dict(_read_quantized(stored, config, device, dtype, shrink)), config)
    weights = _allocate(config, device, dtype)
    for tensor, place in zip(stored, named_weights(weights, config).values(), strict=True):
        read_into(tensor, place)
    return weights


def check_stored(folder: Path, config: ModelConfig) -> list[StoredTensor]:
    """Where the weights of the checkpoint in `folder` are, in the order of `named_weights`, from
    the headers of its files alone. Raises as `load_weights` does.
    """
    stored = catalogue(folder)
    _check_count(len(stored), config, str(folder))
    expected = named_weights(_allocate(config, "meta", config.dtype), config)
    _check_shapes({name: tensor.shape for name, tensor in stored.items()}, expected, str(folder))
    return [stored[name] for name in expected]


def share_weights(hf_model: PreTrainedModel) -> Weights:
    """The weights of a transformers model without a copy: the same memory, unknown to autograd.

    Matrices that torchao has quantised stay so, and those that bitsandbytes holds in 4 bits.
    Raises `CheckpointError` for other classes and for models that are quantised in another way,
    adapted, spread over devices or dtypes, or without data (on the meta device).
    """
    classes = [family.architecture for family in FAMILIES.values()]
    if not {base.__name__ for base in type(hf_model).__mro__} & {*classes}:
        raise CheckpointError(
            f"The model is a {type(hf_model).__name__}; what can be shared is a "
            f"{', '.join(classes[:-1])} or {classes[-1]}."
        )
    config = ModelConfig.from_hf(hf_model.config)
    found = {
        name: shared(parameter)
        for name, parameter in hf_model.named_parameters(remove_duplicate=False)
    }
    _check_count(len(found), config, "The model")
    expected = named_weights(_allocate(config, "meta", config.dtype), config)
    _check_shapes({name: tensor.shape for name, tensor in found.items()}, expected, "The model")
    _check_uniform(found.values())
    if config.family.fused and any(isinstance(tensor, FourBit) for tensor in found.values()):
        raise CheckpointError(
            "A matrix of queries, keys and values in one cannot be cut where bitsandbytes holds it "
            "in 4 bits; quantise the model by torchao."
        )
    embedding, lm_head = found["model.embed_tokens.weight"], found["lm_head.weight"]
    if not is_quantized(lm_head) and embedding.data_ptr() == lm_head.data_ptr():
        del found["lm_head.weight"]
    return _assemble(found, config)


def _read_quantized(
    stored: Sequence[StoredTensor],
    config: ModelConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    quantize: Callable[[Tensor], Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """All weights by name, one after another, the layers' matrices quantised."""
    for tensor in stored:
        place = torch.empty(tensor.shape, device=device, dtype=dtype)
        read_into(tensor, place)
        is_matrix = len(tensor.shape) == 2 and tensor.name.startswith("model.layers.")
        yield tensor.name, quantize(place) if is_matrix else place


def _assemble(found: Mapping[str, Tensor], config: ModelConfig) -> Weights:
    """Weights of separate tensors, by their names in a checkpoint; without a head, it is tied."""
    embedding = found["model.embed_tokens.weight"]
    return Weights(
        embedding=embedding,
        layers=[_separate_layer(found, i, config.family) for i in range(config.num_hidden_layers)],
        norm=found["model.norm.weight"],
        lm_head=found.get("lm_head.weight", embedding),
    )


def _separate_layer(found: Mapping[str, Tensor], index: int, family: Family) -> LayerWeights:
    """Layer `index` of separate tensors by name."""

    def of(name: str, kind: str = "weight") -> Tensor:
        return found[f"model.layers.{index}.{name}.{kind}"]

    qkv, gate_up = (_FUSED_QKV, _FUSED_MLP) if family.fused else (_QKV, _MLP)
    return LayerWeights(
        input_norm=of("input_layernorm"),
        qkv=tuple(map(of, qkv)),
        output=of("self_attn.o_proj"),
        post_norm=of("post_attention_layernorm"),
        gate_up=tuple(map(of, gate_up)),
        down=of("mlp.down_proj"),
        qkv_bias=tuple(of(name, "bias") for name in qkv) if family.biases else (),
        q_norm=of("self_attn.q_norm") if family.head_norms else None,
        k_norm=of("self_attn.k_norm") if family.head_norms else None,
    )


def _check_uniform(tensors: Collection[Tensor]) -> None:
    """Raise `CheckpointError` unless all are of one float type, on one device that holds data."""
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        raise CheckpointError(f"The model is spread over {', '.join(devices)}; move it to one.")
    if devices == ["meta"]:
        raise CheckpointError("The model is on the meta device, so it has no weights to share.")
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1 or not all(dtype.is_floating_point for dtype in dtypes):
        names = ", ".join(sorted(map(str, dtypes)))
        raise CheckpointError(
            f"The model's weights are of {names}; they must be of one float type."
        )


def _check_count(tensors: int, config: ModelConfig, source: str) -> None:
    """Raise `CheckpointError` where there are fewer tensors than layers, before a list of them all
    is made.
    """
    if tensors < config.num_hidden_layers:
        raise CheckpointError(
            f"{source} holds {tensors} tensors, too few for the {config.num_hidden_layers} layers "
            "that its config calls for."
        )


def _check_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, Tensor], source: str
) -> None:
    """Raise `CheckpointError` unless `found` is just what is expected, in name and shape."""
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise CheckpointError(f"{source} lacks {some(missing)}, which its config calls for.")
    unexpected = sorted(
        name
        for name in found.keys() - expected.keys()
        # Tied embeddings may be stored twice.
        if name != "lm_head.weight" and not name.endswith(_DERIVED)
    )
    if unexpected:
        raise CheckpointError(f"{source} has {some(unexpected)}, which no such model has.")
    for name, place in expected.items():
        if tuple(found[name]) != tuple(place.shape):
            raise CheckpointError(
                f"{source} has {name} of shape {list(found[name])}, "
                f"but its config calls for {list(place.shape)}."
            )


def _allocate(config: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> Weights:
    """Uninitialised weights, with one fused matrix in each tuple."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype)

    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows = config.num_attention_heads * config.head_dim
    kv_rows = config.num_key_value_heads * config.head_dim
    embedding = empty(config.vocab_size, hidden)
    family, dim = config.family, config.head_dim
    return Weights(
        embedding=embedding,
        layers=[
            LayerWeights(
                input_norm=empty(hidden),
                qkv=(empty(q_rows + 2 * kv_rows, hidden),),
                output=empty(hidden, q_rows),
                post_norm=empty(hidden),
                gate_up=(empty(2 * inner, hidden),),
                down=empty(hidden, inner),
                qkv_bias=(empty(q_rows + 2 * kv_rows),) if family.biases else (),
                q_norm=empty(dim) if family.head_norms else None,
                k_norm=empty(dim) if family.head_norms else None,
            )
            for _ in range(config.num_hidden_layers)
        ],
        norm=empty(hidden),
        lm_head=embedding if config.tie_word_embeddings else empty(config.vocab_size, hidden),
    )


def named_weights(weights: Weights, config: ModelConfig) -> dict[str, Tensor]:
    """Weights by their names in a checkpoint: views of the fused matrices, or the shared ones."""
    places = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.norm}
    if not config.tie_word_embeddings:
        places["lm_head.weight"] = weights.lm_head
    for i, layer in enumerate(weights.layers):
        parts: dict[str, Tensor | None] = {"input_layernorm.weight": layer.input_norm}
        if config.family.fused:
            matrices = {_FUSED_QKV[0]: layer.qkv[0]}
            mlp = {_FUSED_MLP[0]: layer.gate_up[0]}
        else:
            matrices = dict(zip(_QKV, (*layer.q, *_halves(layer.kv)), strict=True))
            mlp = dict(zip(_MLP, _halves(layer.gate_up), strict=True))
        matrices |= {"self_attn.o_proj": layer.output}
        parts |= {f"{name}.weight": part for name, part in matrices.items()}
        if layer.qkv_bias:
            biases = (*layer.q_bias, *_halves(layer.kv_bias))
            parts |= {f"{name}.bias": part for name, part in zip(_QKV, biases, strict=True)}
        parts |= {"self_attn.q_norm.weight": layer.q_norm, "self_attn.k_norm.weight": layer.k_norm}
        parts |= {"post_attention_layernorm.weight": layer.post_norm}
        parts |= {f"{name}.weight": part for name, part in mlp.items()}
        parts |= {"mlp.down_proj.weight": layer.down}
        named = {f"model.layers.{i}.{name}": part for name, part in parts.items()}
        places |= {name: part for name, part in named.items() if part is not None}
    return places


def _halves(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Two tensors, fused or not."""
    return parts if len(parts) == 2 else parts[0].chunk(2)
