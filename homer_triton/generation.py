"""Going on from encoded contexts: greedy decoding or sampling, one prompt or many side by side."""

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
    questions = []
    for number, (context, own) in enumerate(zip(contexts, ids, strict=True)):
        context.check_maker(fingerprint)
        hear = None if on_text is None else partial(on_text, number)
        questions.append(Question(context, own, _seeded(decoding, number), hear))
        questions[-1].check(model)
    answering = Answering(model, questions, start)
    done: dict[int, Generation] = {}
    while answering.numbers:
        done |= answering.step()
    return [done[number] for number in range(len(questions))]


def _seeded(decoding: Decoding, number: int) -> Decoding:
    """The settings of one answer of several, which draws otherwise than the others."""
    if decoding.seed is None:
        return decoding
    return replace(decoding, seed=(decoding.seed + number) % (SEEDS[1] + 1))


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
