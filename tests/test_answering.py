"""Answers that come side by side: what one that leaves does to the others."""

import pytest
import torch
from cases import LAYERS, random_tokens
from checkpoints import random_model

import homer_triton as ht
from homer_triton.answering import Answering, Question

CONFIG = ht.HomerConfig(32, 32)
PROMPTS = [random_tokens(count, 10 + count) for count in (1, 5, 2, 7)]


@pytest.fixture(scope="module")
def model() -> ht.Llama:
    hf_model = random_model("llama-3", num_hidden_layers=LAYERS, eos_token_id=None)
    return ht.from_transformers(hf_model, ops="torch")


def ask(context: ht.EncodedContext, prompt: list[int], **settings: int) -> Question:
    return Question(context, torch.tensor(prompt), ht.Decoding(**settings))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("after", [0, 1, 4])
@torch.no_grad()
def test_one_that_is_dropped_changes_no_other(model: ht.Llama, shared: bool, after: int) -> None:
    texts = [
        ht.encode(model, random_tokens(count, count), [1], [2, 3], CONFIG)
        for count in ((40,) if shared else (40, 200, 9, 90))
    ]
    texts *= 4 if shared else 1
    answering = Answering(
        model,
        [ask(text, own, max_new_tokens=8) for text, own in zip(texts, PROMPTS, strict=True)],
    )
    ended: dict[int, ht.Generation] = {}
    for _ in range(after):
        ended |= answering.step()
    answering.drop(1)
    assert sorted(answering.numbers) == [0, 2, 3]
    while answering.numbers:
        ended |= answering.step()
    assert sorted(ended) == [0, 2, 3]
    for number, answer in ended.items():
        alone = ht.generate(model, texts[number], PROMPTS[number], 8)
        assert answer.token_ids == alone.token_ids


@torch.no_grad()
def test_every_answer_has_settings_of_its_own(model: ht.Llama) -> None:
    text = ht.encode(model, random_tokens(50), [1], [2, 3], CONFIG)
    answering = Answering(
        model,
        [
            ask(text, PROMPTS[0], max_new_tokens=3),
            ask(text, PROMPTS[1], max_new_tokens=9, temperature=2, seed=4),
        ],
    )
    steps, ended = 0, {}
    while answering.numbers:
        for number, answer in answering.step().items():
            ended[number] = steps, answer.token_ids
        steps += 1
    sampled = ht.generate(model, text, PROMPTS[1], 9, temperature=2, seed=4)
    assert ended == {
        0: (2, ht.generate(model, text, PROMPTS[0], 3).token_ids),
        1: (8, sampled.token_ids),
    }
