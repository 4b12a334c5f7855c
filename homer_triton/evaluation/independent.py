"""Independent chunks: the baseline that shows what merging is for.

Every chunk `prefix ‖ part of the context ‖ suffix` runs through all layers alone and is pruned
once, by HOMER's score at the last layer, to an equal share of the target; the survivors' keys and
values are put side by side. This is how key-value cache compression is applied to chunks without a
hierarchy.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..config import HomerConfig
from ..context import EncodedContext
from ..encoding import encode
from ..engine.recompute import read_again_
from ..model.llama import Llama


@torch.no_grad()
def encode_independently(
    model: Llama, prefix: Tensor, context: Tensor, suffix: Tensor, config: HomerConfig
) -> EncodedContext:
    """Read chunks one by one into one cache of at most `config.target_len` rows.

    prefix, context, suffix: token ids [tokens]. The suffix reads the joined cache once more, since
    no chunk's own copy has seen the others. Source indices are the input's; `plan` and `stats` are
    those of the first chunk. Raises `ValueError` where a chunk's share of the target is less than a
    token.
    """
    chunk_len = config.chunk_len(model.config)
    affix = len(prefix) + len(suffix)
    room = chunk_len - affix
    if room < 1:
        raise ValueError(
            f"prefix and suffix ({affix} tokens) leave a chunk of {chunk_len} no room for context."
        )
    chunks = -(-len(context) // room)
    part_len = -(-len(context) // chunks)
    share = (config.most_rows(model.config, affix) - affix) // chunks
    if share < 1:
        raise ValueError(
            f"{chunks} independent chunks leave each less than one token of the target; raise "
            "target_len or max_chunk_len."
        )
    alone = replace(
        config,
        max_chunk_len=chunk_len,
        target_len=affix + share,
        recompute="none",
        layers_tree=None,
    )
    parts = [encode(model, part, prefix, suffix, alone) for part in context.split(part_len)]
    joined = _join(parts, len(prefix), len(suffix), part_len)
    start = joined.next_position - len(suffix)
    logits = read_again_(model, suffix.to(model.device), joined.keys, joined.values, start)
    return replace(joined, logits=logits)


def _join(parts: list[EncodedContext], prefix: int, suffix: int, part_len: int) -> EncodedContext:
    """The prefix of the first part, the context of all, and the suffix of the first, at the
    positions of the first part's: a shorter last part is the only one whose suffix stands earlier.
    """
    first = parts[0]
    end = len(first) - suffix
    after_context = (len(parts) - 1) * part_len + len(parts[-1].token_ids) - len(first.token_ids)

    def rows(name: str, dim: int) -> Tensor:
        pieces = [getattr(first, name).narrow(dim, 0, end)]
        for index, part in enumerate(parts[1:], 1):
            kept = len(part) - prefix - suffix
            piece = getattr(part, name).narrow(dim, prefix, kept)
            pieces.append(piece + index * part_len if name == "source_indices" else piece)
        last = getattr(first, name).narrow(dim, end, suffix)
        pieces.append(last + after_context if name == "source_indices" else last)
        return torch.cat(pieces, dim)

    def tokens(name: str) -> Tensor:
        inner = [getattr(part, name)[prefix : len(part.token_ids) - suffix] for part in parts]
        whole = getattr(first, name)
        return torch.cat([whole[:prefix], *inner, whole[len(whole) - suffix :]])

    return replace(
        first,
        keys=rows("keys", 2),
        values=rows("values", 2),
        positions=rows("positions", 0),
        source_indices=rows("source_indices", 0),
        token_ids=tokens("token_ids"),
        pruned_at=tokens("pruned_at"),
    )
