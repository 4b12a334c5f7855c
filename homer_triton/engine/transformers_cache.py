"""To and from transformers: finished caches for its models, and its loaded models for ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..checks import whole_number


def continuation(
    keys: Tensor,
    values: Tensor,
    next_position: int,
    new_ids: Tensor | Sequence[int] | Sequence[Sequence[int]],
    copies: int = 1,
) -> dict[str, Any]:
    """Keyword arguments that let a transformers model go on from a cache whose positions are not
    its row numbers.

    keys, values: [L, HKV, T, D]; new_ids: [n] or [B, n]; copies: of the cache for each row of
    `new_ids`. The cache is copied, since transformers appends to it. Raises `ValueError` for other
    `new_ids`.
    """
    try:
        ids = torch.as_tensor(new_ids, device=keys.device)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"new_ids must be token ids, [n] or [batch, n], all rows equally long: {error}."
        ) from error
    if ids.numel() == 0:
        raise ValueError("new_ids is empty; transformers goes on from at least one new token.")
    if ids.ndim > 2 or ids.ndim == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"new_ids must be token ids, [n] or [batch, n], not {ids.dtype} {list(ids.shape)}."
        )
    copies = whole_number("copies", copies, 1)
    ids = ids.long().reshape(-1, ids.shape[-1])
    (batch, count), rows = ids.shape, keys.shape[2]
    cache = DynamicCache()
    for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
        cache.update(k[None].clone(), v[None].clone(), layer)
    if batch * copies > 1:
        cache.batch_repeat_interleave(batch * copies)
    positions = torch.arange(next_position, next_position + count, device=keys.device)
    return {
        "input_ids": ids,
        "past_key_values": cache,
        "attention_mask": ids.new_ones(batch, rows + count),
        "position_ids": positions.repeat(batch, 1),
    }
