"""Contexts that grow: more text behind what has been read, and a new choice where it became too
much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .checks import whole_number
from .config import HomerConfig
from .context import EncodedContext
from .encoding import encode
from .engine.recompute import read_again_
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
    prefix, middle, suffix = split_rows(encoded, encoded.plan.suffix_len)
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
        recent = recent_of(model, config, most)
    recent = whole_number("recent", recent, 1, most)
    prefix, middle, suffix = split_rows(encoded, recent)
    return encode(model, middle, prefix, suffix, config, progress)


def recent_of(model: Llama, config: HomerConfig, most: int) -> int:
    """How many of `most` last tokens choose what stays of those before, if nobody says."""
    return max(min(RECENT, config.chunk_len(model.config) // 4, most), 1)


def split_rows(encoded: EncodedContext, last: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of a cache's rows, on the CPU: the prefix, what stands between, and the last."""
    ids = encoded.kept_ids.cpu()
    before = encoded.plan.prefix_len
    return ids[:before], ids[before : len(ids) - last], ids[len(ids) - last :]


@torch.no_grad()
def close_up(model: Llama, encoded: EncodedContext) -> EncodedContext:
    """The same rows at the positions 0 … T' - 1, as those of an ordinary prompt: what an engine
    needs that numbers rows by their place in the cache.

    Keys are turned from where they stand to where they shall (RoPE, Su et al. 2021), and the last
    token is read once more for its logits. What `recompute="all"` made, the default, stands so
    already, and is returned as it is. Raises `ValueError` for a context that another model encoded,
    and for a model whose RoPE follows the length (dynamic NTK, longrope).
    """
    encoded.check_maker(model.fingerprint)
    rows = torch.arange(len(encoded), device=model.device)
    encoded = encoded.to(model.device)
    if torch.equal(encoded.positions, rows) and encoded.next_position == len(rows):
        return encoded
    config = model.config
    if config.rope_switches_at is not None:
        raise ValueError(
            "This model's RoPE follows the length, so that its keys cannot be moved; encode with "
            'recompute="all".'
        )
    turn = rows - encoded.positions
    cos, sin = (table[turn.abs()] for table in model.rotary(int(turn.abs().max()) + 1))
    # Some kinds of RoPE stretch what they turn, which has been done.
    stretch = torch.hypot(cos, sin)
    cos, sin = cos / stretch, sin / stretch * turn.sign()[:, None]
    keys, values = encoded.keys.clone(), encoded.values.clone()
    for layer, own in enumerate(keys):
        if layer not in config.unrotated:
            moved = own.transpose(0, 1).contiguous()[None]
            model.ops.apply_rotary_(moved, rows[None], cos, sin)
            own.copy_(moved[0].transpose(0, 1))
    logits = read_again_(model, encoded.kept_ids[-1:], keys, values, len(rows) - 1)
    return replace(
        encoded, keys=keys, values=values, positions=rows, next_position=len(rows), logits=logits
    )
