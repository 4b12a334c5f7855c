"""Reads a text once for any question: of each token, the keys of the few heads that find things.

The text is cut into chunks that run alone, only as far as the last layer that has such a head.
`finding` lets a question attend to the stored keys.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..config import HomerConfig
from ..model.config import ModelConfig
from ..model.llama import Llama, Pass
from .costs import ReadingCosts, reading_costs
from .retrieval import known_attention, retrieval_heads

# Tokens of a chunk that is read alone.
CHUNK_LEN = 1024
# How many of the best retrieval heads a document keeps the keys for.
MOST_HEADS = 12
# The deepest layer is not read for heads that hold less than this share of what all find.
LEAST_DEEP = 0.15
# How many tokens before a chunk run with it, so that no sentence at its start stands without what
# leads to it.
OVERLAP = 32
# About how many tokens stand before every chunk.
OPENING_LEN = 8


@dataclass(frozen=True)
class ReadHeads:
    """The heads whose attention finds what a question asks for.

    Attributes:
        heads: The layer and the query head of each, by layer.
        weights: How much each one's attention counts. They add up to 1.
        groups: How many query heads share a key head in this model.
    """

    heads: tuple[tuple[int, int], ...]
    weights: tuple[float, ...]
    groups: int

    @cached_property
    def key_heads(self) -> list[tuple[int, int]]:
        """The layers and the key heads that they read."""
        return sorted({(layer, head // self.groups) for layer, head in self.heads})

    @property
    def last_layer(self) -> int:
        """The last layer that has one of them."""
        return self.heads[-1][0]

    def fit(self, model: Llama) -> bool:
        """Whether a model has these heads."""
        config = model.config
        heads = config.num_attention_heads
        inside = (0 <= x < config.num_hidden_layers and 0 <= h < heads for x, h in self.heads)
        return (
            bool(self.heads)
            and self.groups == heads // config.num_key_value_heads
            and all(inside)
            and sorted(self.heads) == list(self.heads)
            and len(self.weights) == len(self.heads)
        )

    def in_layer(self, layer: int) -> tuple[list[int], list[int]]:
        """A layer's key heads and query heads among them."""
        keys = [head for own, head in self.key_heads if own == layer]
        return keys, [head for own, head in self.heads if own == layer]


def choose_heads(model: Llama) -> ReadHeads:
    """The heads to read a text by: the best retrieval heads, by how much each retrieves.

    A model without retrieval heads gets the heads of the layer at three fifths of its depth, with a
    warning.
    """
    config, attention = model.config, known_attention(model)
    groups = config.num_attention_heads // config.num_key_value_heads
    if attention is None or retrieval_heads(model) is None:
        warnings.warn(
            "The model has no retrieval heads, which find what a question asks for; all heads of "
            "one middle layer take their place and find less.",
            stacklevel=3,
        )
        layer = 3 * config.num_hidden_layers // 5
        count = min(MOST_HEADS, config.num_attention_heads)
        return ReadHeads(
            tuple((layer, head) for head in range(count)), (1 / count,) * count, groups
        )
    return best_heads(attention, groups)


def best_heads(
    attention: Tensor, groups: int, most: int = MOST_HEADS, least_deep: float = LEAST_DEEP
) -> ReadHeads:
    """The best retrieval heads, by how much each retrieves.

    Args:
        attention: [L, HQ], what each head gives to what a question repeats: `known_attention`.
        groups: How many query heads share a key head.
        most: How many heads.
        least_deep: The deepest layer of them is given up, and others take the place of its heads,
            as long as they hold less than this share of the attention: reading ends above it.
    """
    layers = len(attention)
    while True:
        best = attention[:layers].flatten().topk(min(most, layers * attention.shape[1]))
        found = sorted(
            (divmod(index, attention.shape[1]), value)
            for index, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            if value > 0
        )
        total = sum(value for _, value in found)
        deepest = found[-1][0][0]
        held = sum(value for (layer, _), value in found if layer == deepest)
        if held >= least_deep * total:
            break
        layers = deepest
    return ReadHeads(tuple(own for own, _ in found), tuple(x / total for _, x in found), groups)


@dataclass(frozen=True)
class Chunks:
    """How a text is cut: chunks begin at multiples of `length`, and `overlap` tokens before each
    run with it.
    """

    length: int
    overlap: int

    @classmethod
    def fitting(cls, limit: int, length: int, opening: int) -> Chunks:
        """Chunks of at most so many tokens that fit a model's context limit behind an opening.

        Raises `ValueError` if there is no room for any.
        """
        room = limit - opening
        if room < 2:
            raise ValueError(f"The model's context limit of {limit} has no room for a chunk.")
        overlap = min(OVERLAP, room // 4)
        return cls(min(length, room - overlap), overlap)

    def end(self, opening: int) -> int:
        """The position after a whole chunk."""
        return opening + self.overlap + self.length


def chunk_len_of(config: HomerConfig, model: ModelConfig) -> int:
    """How many tokens of a text a chunk has: `max_chunk_len`, or the default for this model."""
    return config.max_chunk_len or min(CHUNK_LEN, config.chunk_len(model))


def plan_reading(
    model: ModelConfig, tokens: int, config: HomerConfig, itemsize: int, on_gpu: bool
) -> ReadingCosts:
    """What reading a text of so many tokens takes at most. Raises as `Chunks.fitting` does."""
    around = OPENING_LEN
    chunks = Chunks.fitting(model.context_limit, chunk_len_of(config, model), around)
    around += chunks.overlap
    return reading_costs(model, tokens, chunks.length, around, MOST_HEADS, itemsize, on_gpu)


def rotary_for(model: Llama, length: int) -> tuple[Tensor, Tensor]:
    """RoPE's tables for texts and questions alike, for positions below `length`: where frequencies
    depend on the length, both have those of the context limit.
    """
    if model.config.rope_switches_at is None:
        return model.rotary(length)
    return model.rotary(max(length, model.config.context_limit))


@torch.no_grad()
def read_chunk(
    model: Llama, heads: ReadHeads, tokens: Tensor, opening: Tensor, chunks: Chunks, begin: int
) -> Tensor:
    """Read one chunk of a text.

    Args:
        model: The model.
        heads: Whose keys to keep.
        tokens: [N], the text's token ids.
        opening: [P], ids that stand before every chunk. Attention that finds nothing goes there.
        chunks: How the text is cut.
        begin: The chunk's first token, a multiple of the chunks' length.

    Returns:
        The rotated keys of its tokens, [n, G, D].
    """
    overlap = min(chunks.overlap, begin)
    body = tokens[begin - overlap : begin + chunks.length]
    chunk = torch.cat([opening, body]).to(model.device)
    return _keys_of(model, heads, chunk, chunks.end(len(opening)))[len(opening) + overlap :]


def _keys_of(model: Llama, heads: ReadHeads, chunk: Tensor, end: int) -> Tensor:
    """The keys [T, G, D] of one chunk's tokens [T]; end: the position after a whole chunk."""
    rows = torch.arange(len(chunk), device=model.device)[None]
    run = Pass(model, rows, model.new_cache(0), rotary=rotary_for(model, end))
    hidden = model.embed(chunk[None])
    kept: list[Tensor] = []
    for layer in range(heads.last_layer):
        q, k, v = run.project(layer, hidden)
        own, _ = heads.in_layer(layer)
        if own:
            kept.append(k[0, :, own])
        hidden = run.attend(layer, hidden, q, k, v)
        del q, k, v
        run.feed_forward_(layer, hidden)
    k, _ = run.project_keys(heads.last_layer, hidden)
    kept.append(k[0, :, heads.in_layer(heads.last_layer)[0]])
    return torch.cat(kept, dim=1)


def quantize(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [n, G, D] as int8, with a scale for each token and head, float16 [n, G]; on the CPU.

    Raises `ValueError` for keys that are not finite.
    """
    keys = keys.float()
    largest = keys.abs().amax(-1)
    if not largest.isfinite().all():
        raise ValueError(
            "The keys are not finite: the weights hold NaN or overflow in this dtype; try another "
            "dtype."
        )
    scales = (largest / 127).half().clamp_(min=2**-24)  # float16's smallest number
    return (keys / scales[..., None]).round_().clamp_(-127, 127).char().cpu(), scales.cpu()
