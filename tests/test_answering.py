"""Answers that come side by side: what one that leaves does to the others."""

from unittest import mock

import pytest
import torch
from cases import LAYERS, random_tokens
from checkpoints import random_model

import homer_triton as ht
from homer_triton.answering import Answering, Question
from homer_triton.engine.sequences import Sequences

CONFIG = ht.HomerConfig(32, 32)
PROMPTS = [random_tokens(count, 10 + count) for count in (1, 5, 2, 7)]


@pytest.fixture(scope="module")
def model() -> ht.Llama:
    hf_model = random_model("llama-3", num_hidden_layers=LAYERS, eos_token_id=None)
    return ht.from_transformers(hf_model, ops="torch")


def ask(context: ht.EncodedContext, prompt: list[int], **settings: int) -> Question:
    return Question(context, torch.tensor(prompt), ht.Decoding(**settings))


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("after", [0, 1, 4])
@pytest.mark.parametrize("gone", [False, True])
@torch.no_grad()
def test_one_that_joins_changes_no_other(
    model: ht.Llama, shared: bool, after: int, gone: bool
) -> None:
    """Some come while others are there or are gone, with more room than these had."""
    lengths = (40,) if shared else (40, 9, 90, 200)
    texts = [ht.encode(model, random_tokens(n, n), [1], [2, 3], CONFIG) for n in lengths]
    texts *= 4 if shared else 1
    new = [8, 6, 1, 11]
    asked = [
        ask(text, own, max_new_tokens=count)
        for text, own, count in zip(texts, PROMPTS, new, strict=True)
    ]
    answering = Answering(model, asked[:2])
    ended: dict[int, ht.Generation] = {}
    for _ in range(after):
        ended |= answering.step()
    if gone:
        answering.drop(0)
    assert [answering.add(question) for question in asked[2:]] == [2, 3]
    while answering.numbers:
        ended |= answering.step()
    ended |= answering.step()
    assert sorted(ended) == ([1, 2, 3] if gone else [0, 1, 2, 3])
    for number, answer in ended.items():
        alone = ht.generate(model, texts[number], PROMPTS[number], new[number])
        assert answer.token_ids == alone.token_ids
        assert 0 < answer.seconds_to_first <= answer.seconds


@torch.no_grad()
def test_all_may_be_dropped_at_once(model: ht.Llama) -> None:
    text = ht.encode(model, random_tokens(9), [1], [2, 3], CONFIG)
    for after in (0, 2):
        answering = Answering(model, [ask(text, own, max_new_tokens=4) for own in PROMPTS])
        for _ in range(after):
            answering.step()
        for number in answering.numbers:
            answering.drop(number)
        assert answering.step() == {}


@torch.no_grad()
def test_many_join_one_after_the_other(model: ht.Llama) -> None:
    """Each takes the place of one that is gone, or more memory is taken."""
    texts = [ht.encode(model, random_tokens(n, n), [1], [2, 3], CONFIG) for n in (40, 9, 90)]
    answering = Answering(model, [ask(texts[0], PROMPTS[0], max_new_tokens=3)])
    ended: dict[int, ht.Generation] = {}
    for number in range(1, 12):
        own = ask(texts[number % 3], PROMPTS[number % 4], max_new_tokens=2 + number % 5)
        assert answering.add(own) == number
        ended |= answering.step()
    while answering.numbers:
        ended |= answering.step()
    assert sorted(ended) == list(range(12))
    assert not answering._answers  # nothing is held of those that have ended
    for number in range(1, 12):
        alone = ht.generate(model, texts[number % 3], PROMPTS[number % 4], 2 + number % 5)
        assert ended[number].token_ids == alone.token_ids


@torch.no_grad()
def test_one_that_cannot_join_leaves_nothing(
    model: ht.Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = ht.encode(model, random_tokens(30), [1], [2, 3], CONFIG)
    answering = Answering(model, [ask(text, PROMPTS[0], max_new_tokens=3)])
    answering.step()
    with monkeypatch.context() as patch:
        patch.setattr(Sequences, "read", mock.Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            answering.add(ask(text, PROMPTS[1], max_new_tokens=9))
    assert answering.numbers == [0]
    ended = answering.step() | answering.step()
    assert ended[0].token_ids == ht.generate(model, text, PROMPTS[0], 3).token_ids


@torch.no_grad()
def test_a_stranger_does_not_join_those_who_share(model: ht.Llama) -> None:
    one, other = (ht.encode(model, random_tokens(30, n), [1], [2, 3], CONFIG) for n in (1, 2))
    answering = Answering(model, [ask(one, PROMPTS[0], max_new_tokens=3)] * 2)
    with pytest.raises(ValueError, match="share another encoding"):
        answering.add(ask(other, PROMPTS[0], max_new_tokens=3))
    ended = answering.step() | answering.step() | answering.step()
    assert ended[1].token_ids == ht.generate(model, one, PROMPTS[0], 3).token_ids
