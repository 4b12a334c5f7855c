"""Random trees for property tests, tiny models to run them on, and both implementations at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from checkpoints import random_model
from hypothesis import settings
from hypothesis import strategies as st
from oracle import Encoding, Oracle
from oracle_tree import Settings
from torch import Tensor
from transformers import LlamaForCausalLM

import homer_triton as ht
from homer_triton.engine import retrieval
from homer_triton.engine.tree import build_plan

# Models this small run ten times faster on one thread, and a hundred times beside other work.
torch.set_num_threads(1)

# The same examples on every machine and in every run: a failure is a bug, never bad luck.
REPEATABLE = settings(
    max_examples=min(60, settings().max_examples),
    derandomize=True,
    deadline=None,
    database=None,
)

# Both sides compute in float64, but with float32 angles: a cosine may differ in its last bit.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}

# Query and key heads of the models that trees are run on.
HEADS = ((4, 4), (4, 2), (4, 1))
LAYERS = 7


@dataclass(frozen=True)
class Lengths:
    """Tokens of each part of an input, with settings that fit a model of `layers` layers."""

    prefix: int
    context: int
    suffix: int
    layers: int
    settings: Settings
    leaf_batch: int = 1
    offload: bool = False

    def plan(self) -> ht.Plan:
        """homer_triton's tree for them."""
        s = self.settings
        return build_plan(
            self.prefix,
            self.context,
            self.suffix,
            self.layers,
            s.max_chunk_len,
            s.target_len,
            s.layers_warmup,
            self.leaf_batch,
            self.offload,
            s.layers_tree,
            s.recompute,
            s.asking,
        )


@st.composite
def lengths(
    draw: st.DrawFn,
    max_height: int = 4,
    layers: int | None = None,
    max_leaf_batch: int = 1,
    may_offload: bool = False,
) -> Lengths:
    """Trees of every height up to `max_height`, often with a short last leaf, with empty trailing
    leaves or without a prefix. layers: the model's, or drawn too.
    """
    prefix, suffix = draw(st.integers(0, 4)), draw(st.integers(1, 4))
    room = draw(st.integers(1, 12))
    height = draw(st.integers(0, max_height))
    smallest = room * 2 ** (height - 1) + 1 if height else 1
    context = draw(st.integers(smallest, room * 2**height))
    count = layers or draw(st.integers(height + 1, 40))
    warmup = draw(st.integers(0, count - height - 1))
    affix = prefix + suffix
    target = draw(st.integers(affix + 1, affix + 2 * room))
    leaf_batch = 2 ** draw(st.integers(0, max_leaf_batch.bit_length() - 1))
    settings = Settings(affix + room, target, warmup)
    offload = may_offload and draw(st.booleans())
    return Lengths(prefix, context, suffix, count, settings, leaf_batch, offload)


@cache
def peers(
    heads: int, kv_heads: int, layers: int = LAYERS
) -> tuple[LlamaForCausalLM, ht.Llama, Oracle]:
    """One random float64 model three times, weights shared: transformers', ours and the oracle."""
    hf_model = random_model(
        dtype=torch.float64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )
    return hf_model, ht.from_transformers(hf_model, ops="torch"), Oracle(hf_model)


def random_tokens(count: int, seed: int = 0, vocabulary: int = 96) -> list[int]:
    """`count` token ids, the same for the same seed."""
    return torch.randint(
        vocabulary, (count,), generator=torch.Generator().manual_seed(seed)
    ).tolist()


def random_bias(distances: int, layers: int = LAYERS, seed: int = 0) -> Tensor:
    """A calibration bias [layers, distances] wide enough to change what is kept."""
    return torch.randn(layers, distances, generator=torch.Generator().manual_seed(seed))


def under_other_defaults(compute: Callable[[], Any]) -> list[Any]:
    """What a function returns under a caller's autocast, default dtype and default device."""
    with torch.autocast("cpu", torch.bfloat16):
        cast = compute()
    torch.set_default_dtype(torch.bfloat16)
    try:
        typed = compute()
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        placed = compute()
    return [cast, typed, placed]


@contextmanager
def retrieving(model: ht.Llama, heads: list[list[float]] | None) -> Iterator[None]:
    """Within it, these are the model's retrieval heads [L][HQ]; None for no such heads."""
    tensor = None if heads is None else torch.tensor(heads)
    with patch.dict(retrieval.measured, {(model.fingerprint, model.dtype): tensor}):
        yield


def encode_both(
    peer: tuple[LlamaForCausalLM, ht.Llama, Oracle], case: Lengths, seed: int = 0
) -> tuple[ht.EncodedContext, Encoding]:
    """One random input of these lengths, encoded by homer_triton and by the oracle."""
    _, model, oracle = peer
    tokens = random_tokens(case.prefix + case.context + case.suffix, seed)
    middle = case.prefix + case.context
    prefix, context, suffix = tokens[: case.prefix], tokens[case.prefix : middle], tokens[middle:]
    offload = "cpu" if case.offload else None
    config = replace(to_config(case.settings), leaf_batch=case.leaf_batch, offload=offload)
    with retrieving(model, case.settings.weights):
        encoded = ht.encode(model, context, prefix, suffix, config)
    return encoded, oracle.encode(prefix, context, suffix, case.settings)


def assert_equal(encoded: ht.EncodedContext, expected: Encoding) -> None:
    """Rows, positions and sources exactly, numbers to rounding."""
    assert encoded.positions.tolist() == expected.positions.tolist()
    assert encoded.source_indices.tolist() == expected.sources.tolist()
    assert encoded.pruned_at.tolist() == expected.pruned_at
    assert encoded.next_position == expected.next_position
    torch.testing.assert_close(encoded.keys, expected.keys, **TOLERANCE)
    torch.testing.assert_close(encoded.values, expected.values, **TOLERANCE)
    torch.testing.assert_close(encoded.logits, expected.logits.float(), **TOLERANCE)


def to_config(s: Settings) -> ht.HomerConfig:
    """The oracle's settings as homer_triton takes them."""
    heads = s.heads if s.weights is None else "retrieval"
    return ht.HomerConfig(
        max_chunk_len=s.max_chunk_len,
        target_len=s.target_len,
        layers_warmup=s.layers_warmup,
        calibration=None if s.bias is None else ht.Calibration(s.bias),
        selection=ht.Selection(s.asking, s.logit, heads, s.layers, s.window),
        recompute=s.recompute,
        layers_tree=s.layers_tree,
    )
