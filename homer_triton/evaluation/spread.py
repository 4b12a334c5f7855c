"""Survivors read again at their own distances: what closing their ranks brings, or costs."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..context import EncodedContext
from ..model.llama import Llama, Pass


@torch.no_grad()
def read_spread(model: Llama, encoded: EncodedContext, new_tokens: int) -> EncodedContext:
    """The kept tokens as one prompt with gaps where others were dropped, prefix and suffix whole.

    Each token stands at its index in the input; where the input and the new tokens are longer than
    the model's context limit, the context's indices are shrunk by one factor until they fit.
    """
    plan, kept = encoded.plan, encoded.source_indices
    limit = model.config.context_limit
    end = min(limit - new_tokens, plan.input_len)
    room = end - plan.prefix_len - plan.suffix_len
    context_end = plan.prefix_len + plan.context_len
    shrunk = plan.prefix_len + (kept - plan.prefix_len) * room // max(plan.context_len, 1)
    positions = torch.where(kept < plan.prefix_len, kept, shrunk)
    positions = torch.where(kept >= context_end, kept - plan.input_len + end, positions)

    rows = torch.arange(len(kept), device=kept.device)[None]
    cache = model.new_cache(len(kept))
    run = Pass(model, positions[None], list(cache), rows, rotary=model.rotary(limit))
    layers = range(model.config.num_hidden_layers)
    hidden = run.layers(layers, model.embed(encoded.token_ids[kept][None]), rows[:, -1:])
    keys, values = cache.transpose(2, 3).unbind(1)
    return replace(
        encoded,
        keys=keys,
        values=values,
        positions=positions,
        next_position=end,
        logits=model.logits(hidden[0, -1]),
    )
