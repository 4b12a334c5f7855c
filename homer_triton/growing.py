"""Contexts that grow: more text behind what has been read, and a new choice where it became too
much.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .checks import whole_number
from .config import HomerConfig
from .context import EncodedContext
from .encoding import encode
from .engine.tree import Node
from .model.llama import Llama
from .text.tokens import TokensLike, tokenize

# The last tokens of a conversation that `compact` keeps, and chooses the others by, where nobody
# says another number: these, but at most a quarter of a chunk.
RECENT = 256


def append(
    model: Llama,
    encoded: EncodedContext,
    text: TokensLike,
    config: HomerConfig | None = None,
    progress: bool | Callable[[Node], None] = False,
    special_tokens: bool = False,
) -> EncodedContext:
    """Read more of a text that grows (a log, a transcript) into an encoding of what came before.

    The tokens that survived so far are read with the new text, in its order and under the same
    prefix and suffix: what it costs depends on these alone, not on all that was read before. What
    was pruned stays so, and the result knows no more of it: its `token_ids` are those survivors and
    the new text. text, config, progress, special_tokens: as `encode` takes them.

    Raises `ValueError` as `encode` does, for an encoding of another model, and for one that has
    prompts and answers behind its text already.
    """
    encoded.check_maker(model.fingerprint)
    if encoded.appended:
        raise ValueError(
            f"There are {encoded.appended} tokens of prompts and answers behind the text; append "
            "to the encoding that they go on from."
        )
    more = tokenize(model, text, "text", special_tokens)
    if not len(more):
        raise ValueError("The text is empty; give at least one token.")
    prefix, middle, suffix = _rows(encoded, encoded.plan.suffix_len)
    return encode(model, torch.cat([middle, more]), prefix, suffix, config, progress)


def compact(
    model: Llama,
    encoded: EncodedContext,
    config: HomerConfig | None = None,
    recent: int | None = None,
    progress: bool | Callable[[Node], None] = False,
) -> EncodedContext:
    """Make room in an encoding that prompts and answers have made too long, by the same selection.

    Its last `recent` tokens (256, but at most a quarter of a chunk, if left out) are the suffix:
    they stay, and choose what stays of all others, the prefix excepted, which stays whole. The
    result's `token_ids` are the rows' alone. config, progress: as `encode` takes them;
    `config.target_len` says how much is left.

    Raises `ValueError` as `encode` does, for an encoding of another model, and for one of so few
    rows that nothing stands before the recent ones.
    """
    encoded.check_maker(model.fingerprint)
    config = config or HomerConfig()
    most = max(len(encoded) - encoded.plan.prefix_len - 1, 1)
    if recent is None:
        recent = max(min(RECENT, config.chunk_len(model.config) // 4, most), 1)
    recent = whole_number("recent", recent, 1, most)
    prefix, middle, suffix = _rows(encoded, recent)
    return encode(model, middle, prefix, suffix, config, progress)


def _rows(encoded: EncodedContext, last: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of a cache's rows: the prefix, what stands between, and the last ones."""
    ids = encoded.token_ids[encoded.source_indices].cpu()
    before = encoded.plan.prefix_len
    return ids[:before], ids[before : len(ids) - last], ids[len(ids) - last :]
