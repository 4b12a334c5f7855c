"""Turning what users give, text or token ids, into checked tensors of token ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_text
from ..model.llama import Llama
from .controls import affix_ids, opening_ids, plain_ids

TokensLike = str | Sequence[int] | Tensor


def tokenize(
    model: Llama, text_or_ids: TokensLike, name: str, special_tokens: bool = False
) -> Tensor:
    """Token ids [tokens] int64 on the CPU; text gets no special tokens of its own.

    special_tokens: what spells a control token is one, as in a template; else it is text like any
    other, so that a document cannot end its turn (`controls`). Raises `ValueError`, naming the
    argument `name`, for text that is not Unicode or has no tokenizer, ids that are not a flat list
    of whole numbers, and ids outside the vocabulary.
    """
    check_model(model)
    if isinstance(text_or_ids, str):
        if model.tokenizer is None:
            raise ValueError(
                f"{name} is text, but the checkpoint has no tokenizer; give token ids."
            )
        check_text(text_or_ids, name)
        read = affix_ids if special_tokens else plain_ids
        ids = torch.tensor(read(model.tokenizer, text_or_ids), dtype=torch.int64, device="cpu")
    else:
        ids = _as_tensor(text_or_ids, name)
        if ids.ndim != 1:
            raise ValueError(
                f"{name} must be text or a flat list of token ids, not {ids.ndim}-dimensional."
            )
        if len(ids) and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
            raise ValueError(f"{name} must hold whole numbers (token ids), not {ids.dtype}.")
        ids = ids.long()
    if len(ids):
        low, high = (int(bound) for bound in ids.aminmax())
        size = model.config.vocab_size
        if low < 0 or high >= size:
            wrong = low if low < 0 else high
            raise ValueError(
                f"{name} holds token id {wrong}, outside the vocabulary of {size} tokens."
            )
    return ids


def check_model(model: object) -> None:
    """Raise `ValueError` for a model that is not one of ours."""
    if not isinstance(model, Llama):
        raise ValueError(
            f"The model is a {type(model).__name__}; wrap it with homer_triton.from_transformers, "
            "or load it with homer_triton.load."
        )


def _as_tensor(ids: Sequence[int] | Tensor, name: str) -> Tensor:
    try:
        return torch.as_tensor(ids, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(ids).__name__
        raise ValueError(
            f"{name} must be text or a flat list of token ids, not this {kind}: {error}."
        ) from error


def split_input(
    model: Llama,
    context: TokensLike,
    prefix: TokensLike | None,
    suffix: TokensLike | None,
    max_chunk_len: int,
    special_tokens: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids of prefix, context and suffix, with their defaults.

    A prefix left out is what the tokenizer puts before a text (`beginning`). A suffix left out is
    taken from the end of the context: 100 tokens, or an eighth of a chunk if that is less. Control
    tokens count in prefix and suffix, in the context only with `special_tokens`. Raises
    `ValueError` for an empty context.
    """
    ids = tokenize(model, context, "context", special_tokens)
    if len(ids) == 0:
        raise ValueError("The context is empty; give at least one token.")
    if suffix is None:
        count = min(100, max(max_chunk_len // 8, 1), len(ids) - 1)
        if count < 1:
            raise ValueError("The context is one token long; give a suffix too, or more context.")
        ids, last = ids[:-count], ids[-count:]
    else:
        last = tokenize(model, suffix, "suffix", special_tokens=True)
    if prefix is None:
        prefix = beginning(model)
    return tokenize(model, prefix, "prefix", special_tokens=True), ids, last


def beginning(model: Llama) -> list[int]:
    """The ids that a text begins with: what the tokenizer puts before a text, which is often the
    beginning-of-sequence token (Llama, Mistral) and often nothing (Qwen, SmolLM2).

    Without a tokenizer it is the config's beginning-of-sequence token, if there is one.
    """
    if model.tokenizer is not None:
        return opening_ids(model.tokenizer)
    bos = model.config.bos_token_id
    return [] if bos is None else [bos]
