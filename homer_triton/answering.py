"""Answers that come side by side, a token of each at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor

from .context import EncodedContext
from .decoding import Decoding
from .engine.sequences import Sequences
from .model.llama import Llama
from .text.stream import TextStream


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
class Question:
    """What an answer is wanted to.

    context: what it goes on from; prompt: [n] int64 on the CPU, the tokens to append first, which
    may be none; on_text: called with each finished piece of the answer's text as it comes.
    """

    context: EncodedContext
    prompt: Tensor
    decoding: Decoding
    on_text: Callable[[str], None] | None = None

    def check(self, model: Llama) -> None:
        """Raise `ValueError` where the model has no room for as many tokens, and no tokenizer that
        pieces or stop strings need.
        """
        new = len(self.prompt) + self.decoding.max_new_tokens
        remedy = "max_new_tokens, or encode to a smaller target_len"
        model.config.check_window(len(self.context) + new, remedy)
        model.config.check_switch(self.context.next_position, new)
        if self.decoding.stops and model.tokenizer is None:
            raise ValueError("stop_strings needs a tokenizer, which the checkpoint has not.")
        if self.on_text is not None and model.tokenizer is None:
            raise ValueError("on_text needs a tokenizer, which the checkpoint has not.")


class Answering:
    """The answers to some questions, side by side: of one encoding, whose rows are then shared, or
    each of one of its own. They are numbered as their questions were given, and more can join.

    The model must have made all encodings, and have room (`Question.check`). Gradients are the
    caller's to switch off.
    """

    def __init__(
        self, model: Llama, questions: Sequence[Question], start: float | None = None
    ) -> None:
        """Reads the prompts. start: by `perf_counter`, what the answers' times count from: now, if
        left out.
        """
        self._model = model
        # Of those that have not ended, by number.
        self._answers = {
            number: _Answer(model, question, start) for number, question in enumerate(questions)
        }
        self._sequences = Sequences(
            model, [each.context for each in questions], [_room(each) for each in questions]
        )
        # What the prompts leave behind; afterwards every step makes its own.
        self._logits: dict[int, Tensor] | None = {
            number: self._read(number) for number in self._answers
        }
        self._ended: dict[int, Generation] = {}

    @property
    def numbers(self) -> list[int]:
        """The answers that have not ended."""
        return list(self._sequences.numbers)

    @property
    def room(self) -> int:
        """Rows that there are for each answer, those of its encoding included where that is its
        own.
        """
        return self._sequences.room

    @property
    def shared_context(self) -> EncodedContext | None:
        """The encoding whose rows all see, where there is one."""
        return self._sequences.shared_context

    def add(self, question: Question) -> int:
        """Begin one more answer beside those that come, which must go on from the encoding that
        they share, if they do; returns its number. It reads the prompt, and where the others have
        begun, the first token has come.
        """
        answer = _Answer(self._model, question)
        number = self._sequences.add(question.context, _room(question))
        self._answers[number] = answer
        try:
            logits = self._read(number)
        except BaseException:
            self._end(number)
            raise
        if self._logits is None:
            self._choose([number], logits[None])
        else:
            self._logits[number] = logits
        return number

    def step(self) -> dict[int, Generation]:
        """One more token of each answer; returns those that ended with it, by number."""
        numbers = self.numbers
        before, self._logits = self._logits, None
        if before is not None and numbers:
            self._choose(numbers, torch.stack([before[number] for number in numbers]))
        elif numbers:
            last = [self._answers[number].token_ids[-1] for number in numbers]
            fresh = torch.tensor(last, device=self._model.device)
            self._choose(numbers, self._sequences.step(fresh))
        ended, self._ended = self._ended, {}
        return ended

    def drop(self, number: int) -> None:
        """Let an answer end where it is, unheard."""
        if self._ended.pop(number, None) is None:
            self._end(number)

    def _end(self, number: int) -> None:
        self._sequences.end(number)
        del self._answers[number]

    def _read(self, number: int) -> Tensor:
        """Run an answer's prompt; returns logits [V] behind it."""
        answer = self._answers[number]
        if len(answer.prompt):
            return self._sequences.read(number, answer.prompt)
        return answer.context.logits.to(self._model.device)

    def _choose(self, numbers: list[int], logits: Tensor) -> None:
        """Take the next token of some answers by their logits [B, V]; they may end with it. The
        device is waited for once for all that take the likeliest.
        """
        answers = [self._answers[number] for number in numbers]
        likeliest = [-1] * len(answers)
        if any(answer.takes_likeliest for answer in answers):
            likeliest = logits.argmax(-1).tolist()
        for number, answer, own, token in zip(numbers, answers, logits, likeliest, strict=True):
            answer.add(own, token)
            if answer.finish_reason is not None:
                grown = self._grow(number) if answer.decoding.grow else None
                self._ended[number] = answer.finished(grown)
                self._end(number)

    def _grow(self, number: int) -> EncodedContext:
        """The context with prompt and answer in it, whose last token has not been run yet."""
        answer = self._answers[number]
        ids = answer.ids
        logits = self._sequences.read(number, ids[-1:])
        keys, values = self._sequences.rows_of(number)
        return answer.context.grown(ids, keys, values, logits)


def _room(question: Question) -> int:
    """The most tokens that an answer adds to its encoding."""
    return len(question.prompt) + question.decoding.max_new_tokens


class _Answer:
    """One of the answers, while it comes.

    prompt: [n] on the model's device; token_ids: its own so far; takes_likeliest: the next token is
    the one with the largest logit.
    """

    def __init__(self, model: Llama, question: Question, start: float | None = None) -> None:
        """start: by `perf_counter`, what its times count from: now, if left out."""
        self._start = perf_counter() if start is None else start
        self.context, self.decoding = question.context, question.decoding
        self.prompt = question.prompt.to(model.device)
        self.token_ids: list[int] = []
        self.finish_reason: Literal["stop", "length"] | None = None
        self._model = model
        self._processors = self.decoding.processors(model, len(question.prompt))
        self.takes_likeliest = not self._processors and not self.decoding.temperature
        self._generator = torch.Generator(model.device)
        if self.decoding.seed is not None:
            self._generator.manual_seed(self.decoding.seed)
        elif self.decoding.temperature:
            self._generator.seed()
        self._stream = None
        if question.on_text is not None:
            assert model.tokenizer is not None
            self._stream = TextStream(model.tokenizer, question.on_text)
        self._logprobs: list[float] = []
        self._first = 0.0

    @property
    def ids(self) -> Tensor:
        """The prompt's and its own, on the model's device."""
        return torch.cat([self.prompt, self.prompt.new_tensor(self.token_ids)])

    def add(self, logits: Tensor, likeliest: int) -> None:
        """Choose the next token by its logits [V], whose largest is known where that is taken."""
        fresh = likeliest
        if not self.takes_likeliest:
            shaped = logits[None]
            if self._processors:
                shaped = self._processors(self.ids[None], shaped)  # type: ignore[arg-type]
            if self.decoding.temperature:
                drawn = torch.multinomial(shaped.softmax(-1)[0], 1, generator=self._generator)
                fresh = int(drawn)
            else:
                fresh = int(shaped[0].argmax())
        if self.decoding.logprobs:
            self._logprobs.append(float(logits.log_softmax(-1)[fresh]))
        self.token_ids.append(fresh)
        self._first = self._first or self._seconds()
        if self._stream is not None:
            self._stream.put(self.token_ids[-1])
        if self.token_ids[-1] in self._model.config.eos_token_ids or self._stops():
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.decoding.max_new_tokens:
            self.finish_reason = "length"

    def finished(self, grown: EncodedContext | None) -> Generation:
        """What has come."""
        if self._stream is not None:
            self._stream.end()
        assert self.finish_reason is not None
        tokenizer, text = self._model.tokenizer, ""
        if tokenizer is not None:
            text = str(tokenizer.decode(self.token_ids, skip_special_tokens=True))
        logprobs = self._logprobs if self.decoding.logprobs else None
        seconds = self._seconds()
        return Generation(
            text, self.token_ids, self.finish_reason, self._first, seconds, logprobs, grown
        )

    def _seconds(self) -> float:
        return perf_counter() - self._start

    def _stops(self) -> bool:
        """Whether the answer has come to a stop string, in its last tokens: a letter has at most
        four. (transformers' own criterion knows byte-level vocabularies and few others.)
        """
        stops, tokenizer = self.decoding.stops, self._model.tokenizer
        if not stops or tokenizer is None:
            return False
        tail = self.token_ids[-4 * max(map(len, stops)) - 8 :]
        said = str(tokenizer.decode(tail, skip_special_tokens=True))
        return any(stop in said for stop in stops)
