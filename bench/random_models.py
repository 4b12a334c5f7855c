"""Llamas with random weights at known shapes; ours and transformers' share the same memory."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from homer_triton.engine import retrieval
from homer_triton.loading import DTYPES, choose_ops
from homer_triton.model.config import ModelConfig
from homer_triton.model.llama import Llama
from homer_triton.model.weights import LayerWeights, Weights


@dataclass(frozen=True)
class Shape:
    """A model's sizes by transformers' names; affix: tokens of the prefix, and of the suffix."""

    sizes: dict[str, int]
    affix: int = 16

    def config(self, dtype: torch.dtype) -> LlamaConfig:
        # Without an end token, no generation ends early.
        return LlamaConfig(**self.sizes, dtype=dtype, tie_word_embeddings=False, eos_token_id=None)


def sizes(
    layers: int, width: int, heads: int, kv_heads: int, inner: int, words: int, limit: int
) -> dict[str, int]:
    """Named as in a transformers config."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": words,
        "max_position_embeddings": limit,
    }


SHAPES = {
    "tiny": Shape(sizes(2, 32, 2, 1, 32, 64, 32), 4),  # for Triton's interpreter
    "50M": Shape(sizes(16, 512, 8, 8, 1376, 1024, 1024)),
    "SmolLM2-135M": Shape(sizes(30, 576, 9, 3, 1536, 49152, 8192)),
    "Llama-2-7B": Shape(sizes(32, 4096, 32, 32, 11008, 32000, 4096)),
    "Llama-3-8B": Shape(sizes(32, 4096, 32, 8, 14336, 128256, 8192)),
}
# One retrieval head in so many, as in SmolLM2: 12 of 270.
HEADS_TO_RETRIEVAL = 22


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_llama(name: str, dtype: str, ops: str, layers: int | None = None) -> Llama:
    """A model with random weights, made on the device; a shape has the same ones in every process.

    layers: how many to make, all of the shape's by default.
    """
    shape, where = SHAPES[name], device()
    if layers is not None:
        shape = replace(shape, sizes={**shape.sizes, "num_hidden_layers": layers})
    config = ModelConfig.from_hf(shape.config(DTYPES[dtype]))
    generator = torch.Generator(where).manual_seed(0)
    width, inner = config.hidden_size, config.intermediate_size
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))

    def normal(rows: int, columns: int) -> Tensor:
        made = torch.randn(rows, columns, generator=generator, device=where, dtype=DTYPES[dtype])
        return made.mul_(0.02)

    def ones() -> Tensor:
        return torch.ones(width, device=where, dtype=DTYPES[dtype])

    made_layers = [
        LayerWeights(
            ones(),
            (normal(q + 2 * kv, width),),
            normal(width, q),
            ones(),
            (normal(2 * inner, width),),
            normal(width, inner),
        )
        for _ in range(config.num_hidden_layers)
    ]
    words = config.vocab_size
    weights = Weights(normal(words, width), made_layers, ones(), normal(words, width))
    model = Llama(config, weights, choose_ops(ops, where))
    take_for_retrieval(model)
    return model


def take_for_retrieval(model: Llama) -> None:
    """Declare some heads retrieval heads, as large a share as in SmolLM2.

    None would be found among random heads, and without any HOMER's defaults ask fewer layers.
    """
    heads = torch.zeros(model.config.num_hidden_layers, model.config.num_attention_heads)
    heads.view(-1)[::HEADS_TO_RETRIEVAL] = 1
    retrieval.measured[model.fingerprint, model.dtype] = heads


def as_transformers(model: Llama) -> LlamaForCausalLM:
    """The same weights in transformers' model: its parameters are views of ours."""
    with torch.device("meta"):
        peer = LlamaForCausalLM(model.config.hf)
    w, state = model.weights, {}
    state["model.embed_tokens.weight"] = w.embedding
    state["model.norm.weight"], state["lm_head.weight"] = w.norm, w.lm_head
    kv = model.config.num_key_value_heads * model.config.head_dim
    for i, layer in enumerate(w.layers):
        name = f"model.layers.{i}."
        q_rows, inner = layer.output.shape[1], layer.down.shape[1]
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        for part, tensor in zip(names, layer.qkv[0].split([q_rows, kv, kv]), strict=True):
            state[f"{name}{part}.weight"] = tensor
        for part, tensor in zip(("gate", "up"), layer.gate_up[0].split(inner), strict=True):
            state[f"{name}mlp.{part}_proj.weight"] = tensor
        state[f"{name}self_attn.o_proj.weight"] = layer.output
        state[f"{name}mlp.down_proj.weight"] = layer.down
        state[f"{name}input_layernorm.weight"] = layer.input_norm
        state[f"{name}post_attention_layernorm.weight"] = layer.post_norm
    peer.load_state_dict(state, assign=True)
    peer.model.rotary_emb = type(peer.model.rotary_emb)(model.config.hf).to(model.device)
    return peer.eval()
