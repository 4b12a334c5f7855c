"""Going on from an encoded context: greedy decoding or sampling, one prompt or many from one
encoding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TextStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .checks import SEEDS, whole_number
from .context import EncodedContext
from .model.llama import Llama
from .text.tokens import TokensLike, tokenize

# Logits over less overflow, and their likeliest token is the only one long before.
LEAST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class Generation:
    """text: the new tokens decoded ("" without a tokenizer); token_ids: the new tokens, an end
    token included.

    seconds_to_first: from the call to the first new token, its prompt included; seconds: the whole
    call.
    """

    text: str
    token_ids: list[int]
    seconds_to_first: float
    seconds: float


@torch.no_grad()
def generate(
    model: Llama,
    encoded: EncodedContext,
    prompt: TokensLike | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue after an encoded context, which stays as it is.

    prompt: text or token ids to append at `encoded.next_position` first; control tokens count in
    it, as in a suffix. temperature: 0 takes the
    likeliest token; above 0 samples, within the `top_k` likeliest or the smallest set with
    probability `top_p` if given, repeatable by `seed`. on_text: called with each finished piece of
    text as it comes. Stops at the model's end tokens.

    Raises `ValueError` for settings out of range, for more tokens than the model's window has room
    for, or than its RoPE leaves as it is (longrope), and for a context that another model encoded.
    """
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, 1)
    warpers = make_warpers(temperature, top_k, top_p)
    generator = torch.Generator(model.device)
    if seed is not None:
        generator.manual_seed(whole_number("seed", seed, *SEEDS))
    elif temperature:
        generator.seed()
    stream = _stream(model, on_text)
    start = perf_counter()
    prompt_ids = tokenize(model, [] if prompt is None else prompt, "prompt", special_tokens=True)
    prompt_ids = prompt_ids.to(model.device)
    longest = len(encoded) + len(prompt_ids) + max_new_tokens
    model.config.check_window(longest, "max_new_tokens, or encode to a smaller target_len")
    model.config.check_switch(encoded.next_position, longest - len(encoded))
    cache = encoded.open_cache(model, room=len(prompt_ids) + max_new_tokens)
    filled, position = len(encoded), encoded.next_position
    logits = encoded.logits.to(model.device)
    model.rotary(position + len(prompt_ids) + max_new_tokens)
    fresh = prompt_ids
    token_ids: list[int] = []
    first = 0.0
    while True:
        if len(fresh):
            logits = model.forward(fresh, cache, filled, position)
            filled, position = filled + len(fresh), position + len(fresh)
        fresh = _choose(logits, warpers, generator)
        token_ids.append(int(fresh))
        first = first or perf_counter() - start
        if stream is not None:
            stream.put(fresh.cpu())
        if token_ids[-1] in model.config.eos_token_ids or len(token_ids) == max_new_tokens:
            break
    if stream is not None:
        stream.end()
    text = ""
    if model.tokenizer is not None:
        text = str(model.tokenizer.decode(token_ids, skip_special_tokens=True))
    return Generation(text, token_ids, first, perf_counter() - start)


def _choose(logits: Tensor, warpers: LogitsProcessorList, generator: torch.Generator) -> Tensor:
    """The next token [1] from logits [V]: the likeliest, or a sample where there are warpers."""
    if not warpers:
        return logits.argmax()[None]
    # The warpers shape the last logits alone, so the ids that processors also take are never read.
    no_ids = torch.empty(1, 0, dtype=torch.int64)
    warped = warpers(no_ids, logits[None])  # type: ignore[arg-type]
    return torch.multinomial(warped.softmax(-1)[0], 1, generator=generator)


def make_warpers(temperature: float, top_k: int | None, top_p: float | None) -> LogitsProcessorList:
    """What shapes the logits for these settings of `generate`; empty for the likeliest token.

    Raises `ValueError` for settings out of range.
    """
    warpers = LogitsProcessorList()
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be a number from 0 on.")
    if 0 < temperature < LEAST_TEMPERATURE:
        raise ValueError(
            f"temperature={temperature} must be at least {LEAST_TEMPERATURE}, or 0 for the "
            "likeliest token."
        )
    if not temperature:
        if top_k is not None or top_p is not None:
            raise ValueError("top_k and top_p shape sampling; set temperature above 0 too.")
        return warpers
    if top_k is not None:
        top_k = whole_number("top_k", top_k, 1)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1.")
    warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        warpers.append(TopPLogitsWarper(float(top_p)))
    return warpers


class _CallbackStreamer(TextStreamer):
    """transformers' word-wise decoding of a token stream, handed to a function instead of the
    terminal.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)


def _stream(model: Llama, on_text: Callable[[str], None] | None) -> _CallbackStreamer | None:
    if on_text is None:
        return None
    if model.tokenizer is None:
        raise ValueError("on_text needs a tokenizer, which the checkpoint has not.")
    return _CallbackStreamer(model.tokenizer, on_text)
