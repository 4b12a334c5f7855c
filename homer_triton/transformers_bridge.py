"""To and from transformers: finished caches for its models, and its loaded models for ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


def continuation(
    keys: Tensor, values: Tensor, next_position: int, new_ids: Tensor | list[int]
) -> dict[str, Any]:
    """Keyword arguments that let a transformers model go on from a cache whose positions are not
    its row numbers.

    keys, values: [L, HKV, T, D]; new_ids: [n] or [1, n]. The cache is copied, since transformers
    appends to it.
    """
    ids = torch.as_tensor(new_ids, dtype=torch.int64, device=keys.device).reshape(1, -1)
    count, rows = ids.shape[1], keys.shape[2]
    if count == 0:
        raise ValueError("new_ids is empty; transformers goes on from at least one new token.")
    cache = DynamicCache()
    for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
        cache.update(k[None].clone(), v[None].clone(), layer)
    return {
        "input_ids": ids,
        "past_key_values": cache,
        "attention_mask": torch.ones(1, rows + count, dtype=torch.int64, device=keys.device),
        "position_ids": torch.arange(next_position, next_position + count, device=keys.device)[
            None
        ],
    }
