"""Going on from encoded contexts: greedy decoding or sampling, one prompt or many side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TextStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .checks import SEEDS, whole_number
from .context import EncodedContext
from .engine.sequences import Sequences
from .model.llama import Llama
from .text.tokens import TokensLike, tokenize

# Logits over less overflow, and their likeliest token is the only one long before.
LEAST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class Generation:
    """text: the new tokens decoded ("" without a tokenizer); token_ids: the new tokens, an end
    token included.

    finish_reason: "stop" for an end token or a stop string, "length" for as many tokens as were
    asked for. seconds_to_first: from the call to the first new token, its prompt included; seconds:
    until its last. logprobs: of each new token, natural logarithms, where they were asked for.
    encoded: the context with prompt and answer, to go on from, where it was to grow.
    """

    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    seconds_to_first: float
    seconds: float
    logprobs: list[float] | None = None
    encoded: EncodedContext | None = None


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


def generate(
    model: Llama,
    encoded: EncodedContext,
    prompt: TokensLike | None = None,
    max_new_tokens: int = 64,
    on_text: Callable[[str], None] | None = None,
    **settings: Any,
) -> Generation:
    """Continue after an encoded context, which stays as it is.

    prompt: text or token ids to append at `encoded.next_position` first; control tokens count in
    it, as in a suffix. on_text: called with each finished piece of text as it comes. settings:
    those of `Decoding`, such as `temperature=0.7, top_p=0.9, stop_strings=["\\n"]`. Stops at the
    model's end tokens. With `grow=True`, the answer's `encoded` goes on behind it, as one long run
    would.

    Raises `ValueError` for settings out of range, for more tokens than the model's window has room
    for, or than its RoPE leaves as it is (longrope), and for a context that another model encoded.
    """
    hear = None if on_text is None else lambda number, text: on_text(text)
    settings["max_new_tokens"] = max_new_tokens
    return generate_batch(model, encoded, [prompt], on_text=hear, **settings)[0]


@torch.no_grad()
def generate_batch(
    model: Llama,
    encoded: EncodedContext | Sequence[EncodedContext],
    prompts: Sequence[TokensLike | None] | None = None,
    samples: int = 1,
    on_text: Callable[[int, str], None] | None = None,
    **settings: Any,
) -> list[Generation]:
    """Answers to many prompts side by side: all after one encoding, whose rows are then shared, or
    each after one of its own.

    encoded: one for all, or as many as prompts; prompts: as in `generate`, none at all for every
    encoding by itself; samples: answers to each, one after the other in the result. on_text: called
    with the answer's index and each piece of its text. settings: those of `Decoding`; answers are
    seeded one by one (`seed`, `seed + 1`, …), so that sampling, too, gives what one at a time does.
    Raises as `generate` does, and `ValueError` where numbers of encodings and prompts differ.
    """
    start = perf_counter()
    decoding = _settings(settings)
    samples = whole_number("samples", samples, 1)
    contexts, asked = _pairs(encoded, prompts, samples)
    ids = [
        tokenize(model, [] if prompt is None else prompt, "prompt", special_tokens=True)
        for prompt in asked
    ]
    fingerprint = model.fingerprint
    for context, own in zip(contexts, ids, strict=True):
        context.check_maker(fingerprint)
        new = len(own) + decoding.max_new_tokens
        remedy = "max_new_tokens, or encode to a smaller target_len"
        model.config.check_window(len(context) + new, remedy)
        model.config.check_switch(context.next_position, new)
    answers = [
        _Answer(model, number, own.to(model.device), decoding, on_text)
        for number, own in enumerate(ids)
    ]
    room = [len(own) + decoding.max_new_tokens for own in ids]
    sequences = Sequences(model, contexts, room)
    logits = [
        sequences.read(number, answer.ids) if len(answer.ids) else context.logits.to(model.device)
        for number, (answer, context) in enumerate(zip(answers, contexts, strict=True))
    ]
    done: dict[int, Generation] = {}
    following = torch.stack(logits)
    while True:
        for place in reversed(range(len(sequences.numbers))):
            number = sequences.numbers[place]
            answer, context = answers[number], contexts[number]
            answer.add(following[place], perf_counter() - start)
            if answer.finish_reason is not None:
                grown = _grow(sequences, context, answer) if decoding.grow else None
                done[number] = answer.finished(perf_counter() - start, grown)
                sequences.end(number)
        if not sequences.numbers:
            return [done[number] for number in range(len(answers))]
        last = [answers[number].ids[-1:] for number in sequences.numbers]
        following = sequences.step(torch.cat(last))


def _settings(settings: dict[str, Any]) -> Decoding:
    """Raises `ValueError` for a setting that there is not."""
    known = Decoding.__dataclass_fields__
    for wrong in (name for name in settings if name not in known):
        raise ValueError(f"{wrong} is no setting of generate; known are {', '.join(known)}.")
    return Decoding(**settings)


def _pairs(
    encoded: EncodedContext | Sequence[EncodedContext],
    prompts: Sequence[TokensLike | None] | None,
    samples: int,
) -> tuple[list[EncodedContext], list[TokensLike | None]]:
    """An encoding and a prompt for every answer."""
    if isinstance(prompts, str | Tensor):
        raise ValueError("prompts is one text; give a list of them.")
    contexts = [encoded] if isinstance(encoded, EncodedContext) else list(encoded)
    asked = [None] * len(contexts) if prompts is None else list(prompts)
    if not contexts or not asked:
        raise ValueError("There is nothing to go on from; give an encoding and a prompt.")
    if isinstance(encoded, EncodedContext):
        contexts *= len(asked)
    if len(contexts) != len(asked):
        raise ValueError(
            f"There are {len(contexts)} encodings and {len(asked)} prompts; give as many, or one "
            "encoding for all prompts."
        )
    for context in contexts:
        if not isinstance(context, EncodedContext):
            raise ValueError(f"encoded holds a {type(context).__name__}, not an EncodedContext.")
    return [x for x in contexts for _ in range(samples)], [x for x in asked for _ in range(samples)]


def _grow(sequences: Sequences, context: EncodedContext, answer: _Answer) -> EncodedContext:
    """The context with prompt and answer in it, whose last token has not been run yet."""
    logits = sequences.read(answer.number, answer.ids[-1:])
    keys, values = sequences.rows_of(answer.number)
    return context.grown(answer.ids, keys, values, logits)


class _Answer:
    """One of the answers, while it comes. ids: the prompt's and its own, on the model's device."""

    def __init__(
        self,
        model: Llama,
        number: int,
        prompt: Tensor,
        decoding: Decoding,
        on_text: Callable[[int, str], None] | None,
    ) -> None:
        self.number, self.ids = number, prompt
        self.finish_reason: Literal["stop", "length"] | None = None
        self._model, self._decoding, self._prompt_len = model, decoding, len(prompt)
        self._processors = decoding.processors(model, len(prompt))
        if decoding.stops and model.tokenizer is None:
            raise ValueError("stop_strings needs a tokenizer, which the checkpoint has not.")
        self._generator = torch.Generator(model.device)
        if decoding.seed is not None:
            self._generator.manual_seed((decoding.seed + number) % (SEEDS[1] + 1))
        elif decoding.temperature:
            self._generator.seed()
        self._stream = None
        if on_text is not None:
            self._stream = _stream(model, lambda text: on_text(number, text))
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._first = 0.0

    def add(self, logits: Tensor, seconds: float) -> None:
        """Choose the next token by its logits [V]."""
        shaped = logits[None]
        if self._processors:
            shaped = self._processors(self.ids[None], shaped)  # type: ignore[arg-type]
        if self._decoding.temperature:
            fresh = torch.multinomial(shaped.softmax(-1)[0], 1, generator=self._generator)
        else:
            fresh = shaped[0].argmax()[None]
        if self._decoding.logprobs:
            self._logprobs.append(float(logits.log_softmax(-1)[fresh]))
        self.ids = torch.cat([self.ids, fresh])
        self._token_ids.append(int(fresh))
        self._first = self._first or seconds
        if self._stream is not None:
            self._stream.put(fresh.cpu())
        if self._token_ids[-1] in self._model.config.eos_token_ids or self._stops():
            self.finish_reason = "stop"
        elif len(self._token_ids) == self._decoding.max_new_tokens:
            self.finish_reason = "length"

    def finished(self, seconds: float, grown: EncodedContext | None) -> Generation:
        """What has come."""
        if self._stream is not None:
            self._stream.end()
        assert self.finish_reason is not None
        tokenizer, text = self._model.tokenizer, ""
        if tokenizer is not None:
            text = str(tokenizer.decode(self._token_ids, skip_special_tokens=True))
        logprobs = self._logprobs if self._decoding.logprobs else None
        return Generation(
            text, self._token_ids, self.finish_reason, self._first, seconds, logprobs, grown
        )

    def _stops(self) -> bool:
        """Whether the answer has come to a stop string, in its last tokens: a letter has at most
        four. (transformers' own criterion knows byte-level vocabularies and few others.)
        """
        stops, tokenizer = self._decoding.stops, self._model.tokenizer
        if not stops or tokenizer is None:
            return False
        tail = self._token_ids[-4 * max(map(len, stops)) - 8 :]
        said = str(tokenizer.decode(tail, skip_special_tokens=True))
        return any(stop in said for stop in stops)


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


def _stream(model: Llama, on_text: Callable[[str], None]) -> _CallbackStreamer:
    if model.tokenizer is None:
        raise ValueError("on_text needs a tokenizer, which the checkpoint has not.")
    return _CallbackStreamer(model.tokenizer, on_text)
