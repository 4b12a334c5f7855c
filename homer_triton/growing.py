"""Contexts that grow: more text after what has been read, and pruning again when it is too much."""

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

# How many of the last tokens `compact` takes as its suffix by default, but at most a quarter of a
# chunk.
RECENT = 256


def append(
    model: Llama,
    encoded: EncodedContext,
    text: TokensLike,
    config: HomerConfig | None = None,
    progress: bool | Callable[[Node], None] = False,
    special_tokens: bool = False,
) -> EncodedContext:
    """Read more of a text that grows, such as a log or a transcript, into an encoding.

        encoded = ht.append(model, encoded, new_lines, config)

    The new text is read together with the tokens that have survived so far, in their order and
    under the same prefix and suffix (the start and the end of the encoded input; the suffix is
    usually the question). The cost depends on these tokens alone, not on everything that was read
    before. What was pruned earlier stays lost: the result's `token_ids` are the survivors and the
    new text.

    Args:
        model: The model that made the encoding.
        encoded: The encoding of the earlier text. It does not change.
        text: The new text, or its token ids.
        config: The settings; the defaults of `HomerConfig` if left out.
        progress: As in `encode`.
        special_tokens: As in `encode`, for `text`.

    Returns:
        The encoding of the longer text.

    Raises:
        ValueError: As in `encode`; also if another model made the encoding, if `text` is empty, or
            if prompts and answers were already added with `grow=True`.
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
    """Shrink an encoding that prompts and answers have made too long, by pruning it again.

        encoded = ht.generate(model, encoded, question, grow=True).encoded
        encoded = ht.compact(model, encoded, config)

    The last `recent` tokens become the suffix, the end of the new input: they are kept, and their
    attention decides which of the other tokens stay. The prefix, the start of the input, is kept
    too. `config.target_len` is the most that are left.

    Args:
        model: The model that made the encoding.
        encoded: The encoding to shrink. It does not change.
        config: The settings; the defaults of `HomerConfig` if left out.
        recent: How many of the last tokens become the suffix. Default: 256, but at most a quarter
            of a chunk.
        progress: As in `encode`.

    Returns:
        The shorter encoding. Its `token_ids` are the tokens that were in the cache before.

    Raises:
        ValueError: As in `encode`; also if another model made the encoding, or if it has no token
            between the prefix and the recent ones.
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
    """The default of `recent`, where at most `most` tokens can be recent."""
    return max(min(RECENT, config.chunk_len(model.config) // 4, most), 1)


def split_rows(encoded: EncodedContext, last: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ids of a cache's tokens, on the CPU: the prefix, the middle, and the `last` ones."""
    ids = encoded.kept_ids.cpu()
    before = encoded.plan.prefix_len
    return ids[:before], ids[before : len(ids) - last], ids[len(ids) - last :]


@torch.no_grad()
def close_up(model: Llama, encoded: EncodedContext) -> EncodedContext:
    """Move the kept tokens to the positions 0 … T' - 1, like those of an ordinary prompt.

    Some engines number tokens by their place in the cache and need this. The keys are rotated from
    their old positions to the new ones (RoPE, Su et al. 2021), and the last token is read once more
    for its logits. What `recompute="all"` made, the default, has these positions already and is
    returned as it is.

    Args:
        model: The model that made the encoding.
        encoded: The encoding. It does not change.

    Returns:
        An encoding of the same tokens, on the model's device.

    Raises:
        ValueError: Another model made the encoding, or the model's RoPE depends on the length of
            the text (dynamic NTK, longrope).
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
    # Some kinds of RoPE also scale the keys, which must not happen twice.
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
