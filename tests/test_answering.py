"""Answers that come side by side: what one that leaves does to the others."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cases import LAYERS, random_tokens
from checkpoints import random_model
from command_line import checkpoint

import homer_triton as ht
from homer_triton.answering import Answering, Question
from homer_triton.engine.sequences import Sequences

CONFIG = ht.HomerConfig(32, 32)
OVERFLOWS = 90
PROMPTS = [random_tokens(count, 10 + count) for count in (1, 5, 2, 7)]


@pytest.fixture(scope="module")
def model() -> ht.Llama:
    hf_model = random_model("llama-3", num_hidden_layers=LAYERS, eos_token_id=None)
    return ht.from_transformers(hf_model, ops="torch")


def ask(context: ht.EncodedContext, prompt: list[int], **settings: Any) -> Question:
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


@pytest.fixture(scope="module")
def overflowing() -> ht.Llama:
    """A model in which one token, OVERFLOWS, makes all later numbers NaN."""
    hf_model = random_model("llama-3", num_hidden_layers=LAYERS, eos_token_id=None)
    hf_model.model.embed_tokens.weight.data[OVERFLOWS] = torch.inf
    return ht.from_transformers(hf_model, ops="torch")


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 3}])
def test_an_answer_that_overflows_fails_alone(
    overflowing: ht.Llama, shared: bool, settings: dict[str, Any]
) -> None:
    model, tokens = overflowing, [x for x in random_tokens(80) if x != OVERFLOWS][:40]
    texts = [ht.encode(model, tokens, [1], [2, 3], CONFIG) for _ in range(1 if shared else 3)]
    prompts = [[7], [8, OVERFLOWS], [9, 10]]
    given = texts[0] if shared else texts
    with pytest.raises(ht.AnswersError, match="Answer 1 failed: The logits after") as failed:
        ht.generate_batch(model, given, prompts, max_new_tokens=6, **settings)
    first, second, third = failed.value.answers
    assert second is None
    for number, answer in ((0, first), (2, third)):
        own = {**settings, "seed": settings["seed"] + number} if settings else {}
        alone = ht.generate(model, texts[0], prompts[number], 6, **own)
        assert answer is not None
        assert answer.token_ids == alone.token_ids
    for more in ({}, {"grow": True}, {"logprobs": True}):
        with pytest.raises(ValueError, match="The logits after the prompt are not finite"):
            ht.generate(model, texts[0], prompts[1], 6, **settings, **more)


@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_rows_of_one_that_overflowed_reach_nobody(overflowing: ht.Llama, shared: bool) -> None:
    model, tokens = overflowing, [x for x in random_tokens(80) if x != OVERFLOWS][:40]
    text = ht.encode(model, tokens, [1], [2, 3], CONFIG)
    texts = [text if shared else ht.encode(model, tokens, [1], [2, 3], CONFIG) for _ in range(4)]
    asked = [
        ask(own, prompt, max_new_tokens=count)
        for own, prompt, count in zip(
            texts, ([7], [8, *[OVERFLOWS] * 9], [9], [10]), (9, 9, 9, 4), strict=True
        )
    ]
    answering = Answering(model, asked[:3])
    ended = answering.step()
    assert isinstance(ended.pop(1), ValueError)
    assert answering.add(asked[3]) == 3  # it takes the place of the one that failed
    failing = ask(texts[0 if shared else 1], [OVERFLOWS], max_new_tokens=2)
    number = answering.add(failing)
    while answering.numbers:
        ended |= answering.step()
    ended |= answering.step()
    assert isinstance(ended.pop(number), ValueError)
    assert sorted(ended) == [0, 2, 3]
    for at, answer in ended.items():
        most = asked[at].decoding.max_new_tokens
        assert answer.token_ids == ht.generate(model, text, asked[at].prompt, most).token_ids


@torch.no_grad()
def test_a_grown_context_is_checked(overflowing: ht.Llama) -> None:
    model, tokens = overflowing, [x for x in random_tokens(80) if x != OVERFLOWS][:40]
    text = ht.encode(model, tokens, [1], [2, 3], CONFIG)
    answering = Answering(model, [ask(text, [7], max_new_tokens=2, grow=True)])
    answering._choose([0], torch.eye(96)[[5]])
    answering._logits = None
    answering._choose([0], torch.eye(96)[[OVERFLOWS]])  # chosen, it is run to grow the context
    assert isinstance(answering.step()[0], ValueError)


@torch.no_grad()
@pytest.mark.parametrize(("token", "stops"), [(1, ("<s>",)), (2, ())])
def test_special_tokens_end_an_answer(tmp_path: Path, token: int, stops: tuple[str, ...]) -> None:
    """One that is a stop string, and the end that only the tokenizer knows."""
    model = ht.load(checkpoint(tmp_path, eos_token_id=None), "cpu", ops="torch")
    assert not model.config.eos_token_ids
    text = ht.encode(model, random_tokens(50), [1], [2, 3], CONFIG)
    answering = Answering(model, [ask(text, [7], max_new_tokens=9, stop_strings=stops)])
    for chosen in (5, token):
        answering._choose([0], torch.eye(96)[[chosen]])
    answering._logits = None
    (answer,) = answering.step().values()
    assert isinstance(answer, ht.Generation)
    assert (answer.finish_reason, answer.token_ids, answer.text.strip()) == (
        "stop",
        [5, token],
        "w5",
    )
