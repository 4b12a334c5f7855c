"""Reading once more what survived: the suffix over the tree's cache, or all of it as one prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.llama import Llama, Pass


def read_again_(
    model: Llama, tokens: Tensor, keys: Tensor, values: Tensor, position: int
) -> Tensor:
    """Run the last tokens of a cache through all layers, in place, over what stands before them.

    tokens: [R] ids on the model's device; keys, values: [L, HKV, T, D], of which the last R rows
    are written anew; position: RoPE index of the first of the tokens. Returns logits [V] of the
    last. Layers take turns in one layer's memory.
    """
    rows = torch.arange(len(tokens), device=tokens.device)[None]
    before = keys.shape[2] - len(tokens)
    cache = model.new_cache(keys.shape[2], 1)[0]
    last = len(keys) - 1
    rotary = model.rotary(position + len(tokens))
    run = Pass(model, rows + position, [cache] * len(keys), rows + before, before, rotary)
    hidden = model.embed(tokens[None])
    for layer, halves in enumerate(zip(keys, values, strict=True)):
        for place, half in zip(cache, halves, strict=True):
            place[:before] = half[:, :before].transpose(0, 1)
        hidden = run.layer(layer, hidden, rows[:, -1:] if layer == last else None)
        for place, half in zip(cache, halves, strict=True):
            half[:, before:] = place[before:].transpose(0, 1)
    return model.logits(hidden[0, -1])
