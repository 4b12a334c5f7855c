"""Drawn answers that begin, join, are dropped and end side by side, each against the same alone."""

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from cases import HEADS, LAYERS, peers, random_tokens
from checkpoints import random_model

import homer_triton as ht
from homer_triton.answering import Answering, Question

from .attempts import FaultError

MOST_TEXTS, MOST_ASKED, LONGEST_TEXT, LONGEST_PROMPT, MOST_NEW = 4, 8, 150, 9, 12
RECOMPUTES = ("none", "suffix", "all")
# What rounding may move, of rows and of logarithms in float64.
CLOSE = 1e-9


@dataclass(frozen=True)
class Asked:
    """One question. context: what it goes on from; settings: those of `generate`."""

    context: ht.EncodedContext
    prompt: list[int]
    settings: dict[str, Any]

    def question(self) -> Question:
        return Question(
            self.context, torch.tensor(self.prompt, dtype=torch.int64), ht.Decoding(**self.settings)
        )


class Answers:
    """Models of a few layers in float64, with end tokens and without, one of them with frequencies
    that follow each text's own length.
    """

    name, together, seconds = "answers", 20, 60.0

    def __init__(self, folder: Path) -> None:
        self.models = [peers(*heads)[1] for heads in HEADS]
        dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
        own: dict[str, Any]
        for own in ({"rope_parameters": dynamic}, {"eos_token_id": [5, 17, 40, 61, 88]}):
            own |= {"dtype": torch.float64, "num_hidden_layers": LAYERS}
            made = random_model(max_position_embeddings=64, **own)
            self.models.append(ht.from_transformers(made, ops="torch"))

    @torch.no_grad()
    def attempt(self, draw: Random, folder: Path) -> None:
        model = draw.choice(self.models)
        texts = [_draw_text(draw, model) for _ in range(draw.randint(1, MOST_TEXTS))]
        if draw.random() < 0.3:  # an answer may go on behind another
            before = ht.generate(model, texts[0], _draw_prompt(draw), 3, grow=True)
            assert before.encoded is not None
            texts.append(before.encoded)
        if draw.random() < 0.4:  # one that all share
            texts = texts[-1:]
        asked = [_draw_asked(draw, texts) for _ in range(draw.randint(1, MOST_ASKED))]
        first = draw.randint(1, len(asked))
        answering = Answering(model, [one.question() for one in asked[:first]])
        waiting, asked = asked[first:], asked[:first]
        dropped, ended = set[int](), dict[int, ht.Generation]()
        while answering.numbers or waiting:
            what = draw.random()
            if waiting and (what < 0.3 or not answering.numbers):
                if _joins(answering, waiting[0], len(asked)):
                    asked.append(waiting[0])
                waiting.pop(0)
            elif what < 0.4 and answering.numbers:
                number = draw.choice(answering.numbers)
                answering.drop(number)
                dropped.add(number)
            else:
                ended |= answering.step()
        ended |= answering.step()
        if ended.keys() | dropped != set(range(len(asked))) or ended.keys() & dropped:
            raise FaultError("an answer that is lost, or comes twice", f"{ended.keys()}, {dropped}")
        for number, found in ended.items():
            _compare(model, asked[number], found)


def _joins(answering: Answering, one: Asked, number: int) -> bool:
    """Let a question join, with this number. It does not where the others share another encoding:
    that is said, and changes nothing.
    """
    is_strange = answering.shared_context not in (None, one.context)
    try:
        if answering.add(one.question()) != number:
            raise FaultError("another number than its place")
    except ValueError as error:
        if not is_strange:
            raise FaultError("one that may join is refused", str(error)) from error
        return False
    if is_strange:
        raise FaultError("a stranger joins those who share")
    return True


def _compare(model: ht.Llama, asked: Asked, found: ht.Generation) -> None:
    """Raise `FaultError` unless it is the answer that comes alone."""
    alone = ht.generate(model, asked.context, asked.prompt, **asked.settings)
    about = f"{asked.prompt}, {asked.settings}: {found.token_ids}, alone {alone.token_ids}"
    if (found.token_ids, found.finish_reason) != (alone.token_ids, alone.finish_reason):
        raise FaultError("another answer than alone", about)
    if not _close(found.logprobs or [], alone.logprobs or []):
        raise FaultError("other logarithms than alone", about)
    one, other = found.encoded, alone.encoded
    if one is None or other is None:
        if one is not other:
            raise FaultError("no context behind an answer", about)
        return
    if one.token_ids.tolist() != other.token_ids.tolist():
        raise FaultError("other tokens in the context behind an answer", about)
    pairs = ((one.keys, other.keys), (one.values, other.values), (one.logits, other.logits))
    if not all(_close(a, b) for a, b in pairs):
        raise FaultError("other rows in the context behind an answer", about)


def _close(one: Any, other: Any) -> bool:
    one, other = torch.as_tensor(one), torch.as_tensor(other)
    return one.shape == other.shape and bool(torch.allclose(one, other, CLOSE, CLOSE))


def _draw_text(draw: Random, model: ht.Llama) -> ht.EncodedContext:
    config = ht.HomerConfig(32, draw.randint(10, 32), 0, recompute=draw.choice(RECOMPUTES))
    count, seed = draw.randint(1, LONGEST_TEXT), draw.randrange(2**32)
    return ht.encode(model, random_tokens(count, seed), [1], [2, 3], config)


def _draw_prompt(draw: Random) -> list[int]:
    return random_tokens(draw.randint(0, LONGEST_PROMPT), draw.randrange(2**32))


def _draw_asked(draw: Random, texts: list[ht.EncodedContext]) -> Asked:
    """Settings that fit each other; most are left out."""
    new = draw.randint(1, MOST_NEW)
    settings: dict[str, Any] = {"max_new_tokens": new}
    if draw.random() < 0.4:
        settings |= {"temperature": draw.choice([0.3, 1.0, 3.0]), "seed": draw.randrange(2**32)}
        settings |= draw.choice([{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}])
    settings |= draw.choice([{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}])
    settings |= draw.choice([{}, {"logprobs": True}])
    settings |= draw.choice([{}, {"min_new_tokens": draw.randint(0, new)}])
    settings |= draw.choice([{}, {"grow": True}])
    return Asked(draw.choice(texts), _draw_prompt(draw), settings)
