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

# Logits over less overflow, and their likeliest token is the only one long before.
LEAST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen and when an answer ends, under the names of transformers'
    `GenerationConfig`, whose processors do it.

    temperature: 0 takes the likeliest token; above 0 samples, within the `top_k` likeliest, the
    smallest set with probability `top_p`, or those with `min_p` times the likeliest's probability,
    if given; repeatable by `seed`. min_new_tokens: no end token before. repetition_penalty,
    no_repeat_ngram_size: of what the prompt and the answer hold already, the context left out.
    stop_strings: the answer ends with any of them. logprobs: tell each token's. grow: make the
    encoding that goes on behind the answer.
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
        """The stop strings."""
        strings = self.stop_strings
        return [strings] if isinstance(strings, str) else list(strings)

    def processors(self, model: Llama, prompt_len: int) -> LogitsProcessorList:
        """What shapes the logits after a prompt of so many tokens."""
        processors = LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            processors.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.no_repeat_ngram_size:
            processors.append(NoRepeatNGramLogitsProcessor(self.no_repeat_ngram_size))
        ends = list(model.config.eos_token_ids)
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
    """What shapes the logits for these settings of `Decoding`; empty for the likeliest token.

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
