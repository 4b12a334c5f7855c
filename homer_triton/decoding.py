"""How the tokens of an answer are chosen, and when it ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .checks import SEEDS, whole_number
from .model.llama import Llama

# Logits divided by less would overflow. Well above it, sampling already gives the likeliest token.
LEAST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class Decoding:
    """How to choose the tokens of an answer, and when to end it.

    `generate` takes these as keyword arguments. What transformers' `GenerationConfig` has too, has
    the same name here, and transformers' processors do the work.

    Attributes:
        max_new_tokens: The most tokens in the answer.
        temperature: 0 always takes the likeliest token; above 0, tokens are sampled.
        top_k: Sample from the k likeliest tokens only.
        top_p: Sample from the smallest set of tokens with this total probability.
        min_p: Sample only from tokens whose probability is at least this fraction of the likeliest
            one's.
        seed: Makes sampling repeatable.
        min_new_tokens: Choose no end token before this many tokens.
        repetition_penalty: Above 1, tokens that the prompt or the answer already has become less
            likely. The encoded context does not count.
        no_repeat_ngram_size: Never repeat this many tokens in a row, of prompt and answer; the
            encoded context does not count. 0: no such limit.
        stop_strings: End the answer once it contains one of these strings, which stays in the text.
        logprobs: Return each new token's log-probability: the natural logarithm, from the model's
            own logits, before any of these settings change them.
        grow: Return the context with prompt and answer added, as the answer's `encoded`.

    Raises:
        ValueError: A setting is out of range, or `top_k`, `top_p` or `min_p` is given without a
            temperature.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    stop_strings: str | Sequence[str] = ()
    logprobs: bool = False
    grow: bool = False

    def __post_init__(self) -> None:
        whole_number("max_new_tokens", self.max_new_tokens, 1)
        whole_number("min_new_tokens", self.min_new_tokens, 0, self.max_new_tokens)
        whole_number("no_repeat_ngram_size", self.no_repeat_ngram_size, 0)
        if self.seed is not None:
            whole_number("seed", self.seed, *SEEDS)
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty} must be a number above 0."
            )
        if not all(isinstance(stop, str) and stop for stop in self.stops):
            raise ValueError(f"stop_strings={self.stop_strings!r} must be texts, none empty.")
        make_warpers(self.temperature, self.top_k, self.top_p, self.min_p)

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        strings = self.stop_strings
        return [strings] if isinstance(strings, str) else list(strings)

    def processors(self, model: Llama, prompt_len: int) -> LogitsProcessorList:
        """The processors that shape the logits after a prompt of `prompt_len` tokens."""
        processors = LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            processors.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.no_repeat_ngram_size:
            processors.append(NoRepeatNGramLogitsProcessor(self.no_repeat_ngram_size))
        ends = list(model.end_tokens)
        if self.min_new_tokens and ends:
            least = MinNewTokensLengthLogitsProcessor(
                prompt_len, self.min_new_tokens, ends, device=str(model.device)
            )
            processors.append(least)
        processors.extend(make_warpers(self.temperature, self.top_k, self.top_p, self.min_p))
        return processors


def make_warpers(
    temperature: float, top_k: int | None, top_p: float | None, min_p: float | None = None
) -> LogitsProcessorList:
    """The processors that shape the logits for sampling; none for the likeliest token.

    The arguments are settings of `Decoding`.

    Raises:
        ValueError: A setting is out of range.
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
        if top_k is not None or top_p is not None or min_p is not None:
            raise ValueError("top_k, top_p and min_p shape sampling; set temperature above 0 too.")
        return warpers
    if top_k is not None:
        top_k = whole_number("top_k", top_k, 1)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1.")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p={min_p} must be from 0 to 1.")
    warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        warpers.append(TopPLogitsWarper(float(top_p)))
    if min_p is not None:
        warpers.append(MinPLogitsWarper(float(min_p)))
    return warpers
