"""The ways to read a long text that are compared, and what follows from a text once it is read.

Whatever a method does, it leaves an `EncodedContext` behind, so that answers are generated and
texts are scored by the same few lines for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import HomerConfig
from ..context import EncodedContext
from ..document import read
from ..encoding import encode
from ..growing import append
from ..loading import with_rope
from ..model.llama import Llama
from .bm25 import require_bm25s, retrieve
from .independent import encode_independently
from .sequential import encode_sequentially

# How much longer HOMER's chunks are where RoPE is rescaled: by default, twice the context limit
# where they were half of it.
CHUNK_EXTENSION = 4
# Into how many parts a text is cut that grows.
PARTS = 4


@dataclass(frozen=True)
class Reading:
    """A text that was read: what is left of it, and the model that has to go on from there."""

    model: Llama
    encoded: EncodedContext


# Token ids of prefix, context and suffix, and how many tokens are to follow.
Reader = Callable[[Tensor, Tensor, Tensor, int], Reading]


def make_readers(names: tuple[str, ...], model: Llama, config: HomerConfig) -> Mapping[str, Reader]:
    """The methods of these names on a model.

    config: HOMER's settings; the target is also that of retrieval and of independent and sequential
    chunks, the chunks those of the latter two, the score that of independent ones. Raises
    `ValueError` for no name, an unknown one, the same one twice, and a method whose package is
    missing.
    """
    if not names:
        raise ValueError(f"No method is named; choose from {', '.join(METHODS)}.")
    if "retrieval" in names:
        require_bm25s()
    for name in names:
        if name not in METHODS:
            raise ValueError(f"The method {name!r} is not known; choose from {', '.join(METHODS)}.")
        if names.count(name) > 1:
            raise ValueError(f"The method {name!r} is named twice.")
    return {name: partial(METHODS[name], model, config) for name in names}


def rescaled(model: Llama, scaling: str, length: int) -> Llama:
    """The model with its RoPE rescaled so that `length` positions fit its context limit.

    scaling: "pi" (position interpolation, Chen et al. 2023), "ntk" or "yarn" (Peng et al. 2023).
    The factor is `length / limit`; a model that needs none is returned as it is. The rescaling
    takes the place of one that the checkpoint has itself.
    """
    limit = model.config.context_limit
    if length <= limit:
        return model
    factor = length / limit
    if scaling == "pi":
        return with_rope(model, {"rope_type": "linear", "factor": factor})
    if scaling == "yarn":
        return with_rope(model, {"rope_type": "yarn", "factor": factor})
    # The base of transformers' dynamic NTK at this length, which moves with every new token there:
    # held fixed here, so that a query and the keys before it are rotated alike.
    dim = model.config.head_dim
    stretched = model.config.rope_theta * (factor * factor - (factor - 1)) ** (dim / (dim - 2))
    return with_rope(model, {"rope_type": "default", "rope_theta": stretched})


def read_whole(
    model: Llama,
    config: HomerConfig,
    prefix: Tensor,
    context: Tensor,
    suffix: Tensor,
    new_tokens: int,
    scaling: str | None = None,
) -> Reading:
    """The plain model, with its RoPE rescaled if asked: a tree of one chunk is a plain prefill."""
    length = len(prefix) + len(context) + len(suffix)
    if scaling is not None:
        model = rescaled(model, scaling, length + new_tokens)
    whole = HomerConfig(max_chunk_len=length, target_len=length)
    return Reading(model, encode(model, context, prefix, suffix, whole))


def read_window(
    model: Llama,
    config: HomerConfig,
    prefix: Tensor,
    context: Tensor,
    suffix: Tensor,
    new_tokens: int,
) -> Reading:
    """The plain model on the prefix and the last tokens that fit its context limit."""
    limit = model.config.context_limit
    room = limit - len(prefix) - len(suffix) - new_tokens
    if room < 1:
        raise ValueError(
            f"prefix ({len(prefix)} tokens), suffix ({len(suffix)}) and {new_tokens} new tokens "
            f"leave a window of {limit} no room for context."
        )
    return read_whole(model, config, prefix, context[-room:], suffix, new_tokens)


def read_retrieved(
    model: Llama,
    config: HomerConfig,
    prefix: Tensor,
    context: Tensor,
    suffix: Tensor,
    new_tokens: int,
) -> Reading:
    """The plain model on the passages that the suffix asks for, as many as fit the target."""
    target = config.most_rows(model.config, len(prefix) + len(suffix))
    passages = retrieve(model, context, suffix, target - len(prefix) - len(suffix))
    return read_whole(model, config, prefix, passages, suffix, new_tokens)


def read_merged(
    model: Llama,
    config: HomerConfig,
    prefix: Tensor,
    context: Tensor,
    suffix: Tensor,
    new_tokens: int,
    scaling: str | None = None,
) -> Reading:
    """HOMER; under a rescaled RoPE with longer chunks and a larger target (HOMER, section 4).

    The rescaling is what lets chunks be longer: `CHUNK_EXTENSION` times the settings' length, with
    the factor that this needs. A calibration belongs to the model's own RoPE and is not used there.
    """
    if scaling is not None:
        chunk_len = CHUNK_EXTENSION * config.chunk_len(model.config)
        target_len = CHUNK_EXTENSION * config.most_rows(model.config, len(prefix) + len(suffix))
        if config.reread == "all":  # one prompt, of no more than the model reads
            target_len = min(target_len, model.config.context_limit)
        length = len(prefix) + len(context) + len(suffix)
        model = rescaled(model, scaling, min(chunk_len, length) + new_tokens)
        config = replace(config, max_chunk_len=chunk_len, target_len=target_len, calibration=None)
    return Reading(model, encode(model, context, prefix, suffix, config))


def read_by(
    model: Llama,
    config: HomerConfig,
    prefix: Tensor,
    context: Tensor,
    suffix: Tensor,
    new_tokens: int,
    how: Callable[[Llama, Tensor, Tensor, Tensor, HomerConfig], EncodedContext],
) -> Reading:
    """What another way of encoding leaves."""
    return Reading(model, how(model, prefix, context, suffix, config))


def encode_in_parts(
    model: Llama, prefix: Tensor, context: Tensor, suffix: Tensor, config: HomerConfig
) -> EncodedContext:
    """HOMER on a text that comes in `PARTS`, each appended to what survived of those before."""
    first, *others = context.chunk(PARTS)
    encoded = encode(model, first, prefix, suffix, config)
    for part in others:
        encoded = append(model, encoded, part, config)
    return encoded


def encode_read(
    model: Llama, prefix: Tensor, context: Tensor, suffix: Tensor, config: HomerConfig
) -> EncodedContext:
    """A document that was read without the question, asked once."""
    return read(model, context, config).encode(suffix, prefix, config)


METHODS: dict[str, Callable[..., Reading]] = {
    "plain": read_whole,
    "pi": partial(read_whole, scaling="pi"),
    "ntk": partial(read_whole, scaling="ntk"),
    "yarn": partial(read_whole, scaling="yarn"),
    "window": read_window,
    "retrieval": read_retrieved,
    "independent": partial(read_by, how=encode_independently),
    "sequential": partial(read_by, how=encode_sequentially),
    "homer": read_merged,
    "read": partial(read_by, how=encode_read),
    "appended": partial(read_by, how=encode_in_parts),
    "homer+pi": partial(read_merged, scaling="pi"),
    "homer+ntk": partial(read_merged, scaling="ntk"),
    "homer+yarn": partial(read_merged, scaling="yarn"),
}


@torch.no_grad()
def token_losses(reading: Reading, token_ids: Tensor) -> list[float]:
    """The negative log-likelihood, in nats, of each of the tokens that follow a text.

    token_ids: [n] on the CPU, n at least 1.
    """
    model, encoded = reading.model, reading.encoded
    targets = token_ids.to(model.device)
    logits = encoded.logits[None]
    if len(targets) > 1:
        cache = encoded.open_cache(model, room=len(targets) - 1)
        rest = model.forward(
            targets[:-1], cache, len(encoded), encoded.next_position, all_logits=True
        )
        logits = torch.cat([logits, rest])
    return F.cross_entropy(logits, targets, reduction="none").tolist()
