"""Generate text from encoded contexts: one prompt, or many side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from .answering import Answering, Generation, Question
from .checks import SEEDS, whole_number
from .context import EncodedContext
from .decoding import Decoding
from .model.llama import Llama
from .text.tokens import TokensLike, tokenize


class AnswersError(ValueError):
    """Some of several answers have failed.

    Attributes:
        answers: The answers in the order of their prompts; None for those that failed.
    """

    def __init__(self, message: str, answers: list[Generation | None]) -> None:
        super().__init__(message)
        self.answers = answers


def generate(
    model: Llama,
    encoded: EncodedContext,
    prompt: TokensLike | None = None,
    max_new_tokens: int = 64,
    on_text: Callable[[str], None] | None = None,
    **settings: Any,
) -> Generation:
    """Generate text that continues an encoded context. The context does not change.

        answer = ht.generate(model, encoded, " Who is she?", max_new_tokens=40, temperature=0.7)
        print(answer.text)

    An encoding answers the question that it was encoded for. A prompt that asks something else only
    finds what that question kept.

    Args:
        model: The model that made the encoding.
        encoded: What to continue from.
        prompt: Text or token ids to append first. Default: nothing; the answer then follows the
            encoding's suffix. Special tokens count in it, as in a suffix.
        max_new_tokens: The most tokens in the answer.
        on_text: Called with each finished piece of the answer's text, for streaming.
        settings: Any field of `Decoding`, such as `top_p=0.9` or `stop_strings=["\\n"]`. Default:
            always the likeliest token. With `grow=True`, the answer's `encoded` is the context with
            prompt and answer added, as one long run would have made it.

    Returns:
        The answer, a `Generation`. It ends with one of the model's end tokens, with a stop string,
        or after `max_new_tokens`.

    Raises:
        ValueError: A setting is out of range, another model made the encoding, the tokens do not
            fit the model's sliding window or cross the length where its RoPE changes (longrope),
            the logits are not finite, or a text prompt, `on_text` or `stop_strings` needs a
            tokenizer and the model has none.
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
    """Generate answers to many prompts side by side.

    Either all prompts continue from one encoding, which is then in memory only once, or each
    continues from an encoding of its own.

        answers = ht.generate_batch(model, encoded, [" Who is she?", " Where is she?"])

    Args:
        model: The model that made the encodings.
        encoded: One encoding for all prompts, or a list with one for each.
        prompts: A list of prompts as in `generate`. Default: none; every encoding is continued as
            it is.
        samples: How many answers to generate for each prompt. They follow each other in the result.
        on_text: Called with an answer's index and each finished piece of its text.
        settings: Any field of `Decoding`. With a `seed`, the answer with index i is sampled with
            `seed + i`, which gives the same as `generate` with that seed.

    Returns:
        The answers: `samples` for the first prompt, then for the second, and so on.

    Raises:
        ValueError: As in `generate`; also if there are not as many encodings as prompts.
        AnswersError: The logits of some of several answers are not finite. The other answers are
            in its `answers`.
    """
    start = perf_counter()
    decoding = decoding_of(settings)
    samples = whole_number("samples", samples, 1)
    contexts, asked = _pairs(encoded, prompts, samples)
    ids = [
        tokenize(model, [] if prompt is None else prompt, "prompt", special_tokens=True)
        for prompt in asked
    ]
    fingerprint = model.fingerprint
    questions = []
    for number, (context, own) in enumerate(zip(contexts, ids, strict=True)):
        context.check_maker(fingerprint)
        hear = None if on_text is None else partial(on_text, number)
        questions.append(Question(context, own, _seeded(decoding, number), hear))
        questions[-1].check(model)
    answering = Answering(model, questions, start)
    done: dict[int, Generation | ValueError] = {}
    while len(done) < len(questions):
        done |= answering.step()
    ended = [done[number] for number in range(len(questions))]
    failed = {number: x for number, x in enumerate(ended) if isinstance(x, ValueError)}
    if failed and len(ended) == 1:
        raise failed[0]
    answers = [one if isinstance(one, Generation) else None for one in ended]
    if failed:
        told = "; ".join(f"Answer {number} failed: {error}" for number, error in failed.items())
        raise AnswersError(told, answers)
    return [one for one in answers if one is not None]


def _seeded(decoding: Decoding, number: int) -> Decoding:
    """The settings of one answer of several, with a seed of its own."""
    if decoding.seed is None:
        return decoding
    return replace(decoding, seed=(decoding.seed + number) % (SEEDS[1] + 1))


def decoding_of(settings: dict[str, Any]) -> Decoding:
    """The `Decoding` with these settings. Raises `ValueError` for one that does not exist."""
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
