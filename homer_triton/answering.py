"""Answers that are generated side by side, one token of each per step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .context import EncodedContext
from .decoding import Decoding
from .engine.sequences import Sequences
from .model.llama import Llama
from .text.stream import TextStream, plain_end, text_behind

if TYPE_CHECKING:
    from .document import Source

# How many tokens before an answer its text is decoded behind.
_BEFORE = 16


@dataclass(frozen=True)
class Generation:
    """An answer, as `generate` returns it.

    Attributes:
        text: The new tokens as text, without special tokens; "" if the model has no tokenizer.
        token_ids: The new tokens. An end token, if one came, is the last.
        finish_reason: "stop" for an end token or a stop string, "length" if the answer reached
            `max_new_tokens`.
        seconds_to_first: Time to first token: from the call to the first new token, with the
            reading of the prompt.
        seconds: From the call to the end of the answer.
        logprobs: The log-probability of each new token (natural logarithm), if `logprobs=True`
            asked for them.
        encoded: The context with prompt and answer added, to continue from, if `grow=True` asked
            for it.
        sources: The places of a document that the answer was made from, best first
            (`Document.ask`).
    """

    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    seconds_to_first: float
    seconds: float
    logprobs: list[float] | None = None
    encoded: EncodedContext | None = None
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True)
class Question:
    """What to answer.

    Attributes:
        context: The encoding to continue from.
        prompt: [n] int64 on the CPU, the tokens to append first; n may be 0.
        decoding: How the tokens of the answer are chosen.
        on_text: Called with each finished piece of the answer's text.
    """

    context: EncodedContext
    prompt: Tensor
    decoding: Decoding
    on_text: Callable[[str], None] | None = None

    def check(self, model: Llama) -> None:
        """Raise `ValueError` if the model cannot answer this.

        That is so where the tokens do not fit its window or cross a change of its RoPE, or where a
        tokenizer is needed and missing.
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
    """Generates answers to several questions side by side.

    Either all questions continue from the same encoding, which is then in the cache only once, or
    each has a copy of its own. The answers are numbered in the order of their questions, and more
    can join later.

    The model must have made all encodings, and every question must pass `Question.check`. The
    caller switches off gradients.
    """

    def __init__(
        self, model: Llama, questions: Sequence[Question], start: float | None = None
    ) -> None:
        """Read the prompts.

        start: the `perf_counter` time that the answers' times count from. Default: now.
        """
        self._model = model
        # The answers that have not ended, by number.
        self._answers = {
            number: _Answer(model, question, start) for number, question in enumerate(questions)
        }
        self._sequences = Sequences(
            model, [each.context for each in questions], [_room(each) for each in questions]
        )
        # The logits after the prompts; after the first step, every step computes its own.
        self._logits: dict[int, Tensor] | None = {
            number: self._read(number) for number in self._answers
        }
        self._ended: dict[int, Generation | ValueError] = {}

    @property
    def numbers(self) -> list[int]:
        """The numbers of the answers that have not ended."""
        return list(self._sequences.numbers)

    @property
    def room(self) -> int:
        """Capacity in tokens for each answer, with its encoding where that is a copy of its own."""
        return self._sequences.room

    @property
    def shared_context(self) -> EncodedContext | None:
        """The encoding that all answers share, or None."""
        return self._sequences.shared_context

    def add(self, question: Question) -> int:
        """Start one more answer; returns its number.

        Its prompt is read now. If the others have begun, its first token is chosen now too. Where
        the answers share an encoding, the question must continue from that one. If this fails, the
        others go on.
        """
        answer = _Answer(self._model, question)
        number = self._sequences.add(question.context, _room(question))
        self._answers[number] = answer
        try:
            logits = self._read(number)
            if self._logits is None:
                self._choose([number], logits[None])
            else:
                self._logits[number] = logits
        except BaseException:
            self.drop(number)
            raise
        return number

    def step(self) -> dict[int, Generation | ValueError]:
        """Choose one more token of each answer; returns those that ended with it, by number.

        An answer whose logits are not finite ends with a `ValueError` in its place.
        """
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
        """Stop an answer without a result."""
        self._ended.pop(number, None)
        if number in self._answers:
            self._end(number)

    def _end(self, number: int) -> None:
        self._sequences.end(number)
        del self._answers[number]

    def _read(self, number: int) -> Tensor:
        """Read an answer's prompt; returns the logits [V] after it."""
        answer = self._answers[number]
        if len(answer.prompt):
            return self._sequences.read(number, answer.prompt)
        return answer.context.logits.to(self._model.device)

    def _choose(self, numbers: list[int], logits: Tensor) -> None:
        """Choose the next token of some answers by their logits [B, V]; it may end them.

        All wait for the device once, together.
        """
        best, likeliest = logits.max(-1)  # NaN where one of them is
        told = torch.stack([likeliest, best.isfinite().long()]).tolist()
        for number, own, token, is_finite in zip(numbers, logits, *told, strict=True):
            answer = self._answers[number]
            if not is_finite:
                self._ended[number] = _not_finite()
                self._end(number)
                continue
            answer.add(own, token)
            if answer.finish_reason is not None:
                try:
                    grown = self._grow(number) if answer.decoding.grow else None
                    self._ended[number] = answer.finished(grown)
                except ValueError as error:
                    self._ended[number] = error
                self._end(number)

    def _grow(self, number: int) -> EncodedContext:
        """The context with prompt and answer added. The answer's last token is run for it."""
        answer = self._answers[number]
        ids = answer.ids
        logits = self._sequences.read(number, ids[-1:])
        if not logits.isfinite().all():
            raise _not_finite()
        keys, values = self._sequences.rows_of(number)
        return answer.context.grown(ids, keys, values, logits)


def _not_finite() -> ValueError:
    return ValueError(
        "The logits after the prompt are not finite: its tokens overflow in this dtype; try "
        "float32 or bfloat16."
    )


def _room(question: Question) -> int:
    """The most tokens that an answer adds to its encoding."""
    return len(question.prompt) + question.decoding.max_new_tokens


class _Answer:
    """One answer while it is generated.

    prompt: [n] on the model's device; token_ids: the new tokens so far; takes_likeliest: whether
    the next token is always the one with the largest logit.
    """

    def __init__(self, model: Llama, question: Question, start: float | None = None) -> None:
        """start: the `perf_counter` time that its times count from. Default: now."""
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
        self._before: list[int] = []
        if model.tokenizer is not None:
            kept = self.context.source_indices[-_BEFORE:]
            last = torch.cat([self.context.token_ids[kept].to(model.device), self.prompt])
            self._before = plain_end(model.tokenizer, last[-_BEFORE:].tolist())
        self._stream = None
        if question.on_text is not None:
            assert model.tokenizer is not None
            self._stream = TextStream(model.tokenizer, question.on_text, self._before)
        self._ends = model.end_tokens
        self._special = set() if model.tokenizer is None else set(model.tokenizer.all_special_ids)
        self._logprobs: list[float] = []
        self._first = 0.0

    @property
    def ids(self) -> Tensor:
        """The tokens of prompt and answer so far, on the model's device."""
        return torch.cat([self.prompt, self.prompt.new_tensor(self.token_ids)])

    def add(self, logits: Tensor, likeliest: int) -> None:
        """Choose the next token by its logits [V]; `likeliest` is their argmax, if it is needed."""
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
        if self.token_ids[-1] in self._ends or self._stops():
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.decoding.max_new_tokens:
            self.finish_reason = "length"

    def finished(self, grown: EncodedContext | None) -> Generation:
        """The finished answer."""
        if self._stream is not None:
            self._stream.end()
        assert self.finish_reason is not None
        tokenizer, text = self._model.tokenizer, ""
        if tokenizer is not None:
            text = text_behind(tokenizer, self._before, self.token_ids)
        logprobs = self._logprobs if self.decoding.logprobs else None
        seconds = self._seconds()
        return Generation(
            text, self.token_ids, self.finish_reason, self._first, seconds, logprobs, grown
        )

    def _seconds(self) -> float:
        return perf_counter() - self._start

    def _stops(self) -> bool:
        """Whether the answer now contains a stop string.

        Only its last tokens are decoded: a character takes at most four. (transformers' own
        stopping criterion supports byte-level vocabularies and few others.)
        """
        stops, tokenizer = self.decoding.stops, self._model.tokenizer
        if not stops or tokenizer is None:
            return False
        tail = self.token_ids[-4 * max(map(len, stops)) - 8 :]
        # A stop string may be a special token, which no answer's text has.
        for without in {True, not self._special.intersection(tail)}:
            said = str(tokenizer.decode(tail, skip_special_tokens=without))
            if any(stop in said for stop in stops):
                return True
        return False
