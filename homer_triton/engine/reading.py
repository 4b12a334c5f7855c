"""Reads a text once for any question: of each token, the keys of the few heads that find things.

The text is cut into chunks that run alone, only as far as the last layer that has such a head.
`finding` lets a question attend to the stored keys.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..model.llama import Llama, Pass
from .retrieval import LEAST_ATTENTION, known_attention

# How many of the best retrieval heads a document keeps the keys for.
MOST_HEADS = 12
# How many tokens before a chunk run with it, so that no sentence at its start stands without what
# leads to it.
OVERLAP = 32


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
    if attention is None or not attention.max() >= LEAST_ATTENTION:
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
    best = attention.flatten().topk(min(MOST_HEADS, attention.numel()))
    found = sorted(
        (divmod(index, attention.shape[1]), value)
        for index, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        if value > 0
    )
    total = sum(value for _, value in found)
    return ReadHeads(tuple(own for own, _ in found), tuple(x / total for _, x in found), groups)


@torch.no_grad()
def read_keys(
    model: Llama, heads: ReadHeads, tokens: Tensor, opening: Tensor, chunk_len: int, first: int = 0
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Read a text chunk by chunk.

    Args:
        model: The model.
        heads: Whose keys to keep.
        tokens: [N], the text's token ids.
        opening: [P], ids that stand before every chunk. Attention that finds nothing goes there.
        chunk_len: Tokens of a chunk. Chunks begin at multiples of it.
        first: The first token to read.

    Yields:
        The first token of each chunk, and the keys of its tokens from there on: int8 [n, G, D] on
        the CPU, and float16 scales [n, G]. Their product is the rotated key.
    """
    for begin in range(first // chunk_len * chunk_len, len(tokens), chunk_len):
        overlap = min(OVERLAP, begin)
        body = tokens[begin - overlap : begin + chunk_len]
        chunk = torch.cat([opening, body]).to(model.device)
        start = max(begin, first)
        keys = _keys_of(model, heads, chunk)[len(chunk) - len(body) + overlap + start - begin :]
        yield start, *quantize(keys)


def _keys_of(model: Llama, heads: ReadHeads, chunk: Tensor) -> Tensor:
    """The keys [T, G, D] of one chunk's tokens [T]."""
    rows = torch.arange(len(chunk), device=model.device)[None]
    run = Pass(model, rows, model.new_cache(0), rotary=model.rotary(len(chunk)))
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
