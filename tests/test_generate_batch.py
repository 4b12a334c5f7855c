"""Answers side by side are those of one at a time; contexts that grow go on as one long run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import LAYERS, random_tokens
from checkpoints import LIMIT, ROPES, random_model
from kernel_cases import DEVICE
from transformers import PreTrainedModel

import homer_triton as ht
from homer_triton.demo import CHECKPOINT

CONFIG = ht.HomerConfig(32, 32)
PREFIX, SUFFIX = random_tokens(2, 1), random_tokens(4, 2)
PROMPTS = [random_tokens(count, 10 + count) for count in (1, 5, 2, 7, 5)]


@pytest.fixture(scope="module")
def hf_model() -> PreTrainedModel:
    return random_model("llama-3", num_hidden_layers=LAYERS, eos_token_id=7)


@pytest.fixture(scope="module")
def model(hf_model: PreTrainedModel) -> ht.Llama:
    return ht.from_transformers(hf_model, ops="torch")


@pytest.fixture(scope="module")
def texts(model: ht.Llama) -> list[ht.EncodedContext]:
    """Encodings of several lengths."""
    return [
        ht.encode(model, random_tokens(count, count), PREFIX, SUFFIX, CONFIG)
        for count in (8, 200, 90, 15, 40)
    ]


def tokens_of(answers: list[ht.Generation]) -> list[list[int]]:
    return [answer.token_ids for answer in answers]


def test_many_prompts_of_one_encoding(model: ht.Llama, texts: list[ht.EncodedContext]) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 8}
    together = ht.generate_batch(model, texts[1], [*PROMPTS, None], **settings)
    alone = [ht.generate(model, texts[1], prompt, **settings) for prompt in (*PROMPTS, None)]
    assert tokens_of(together) == tokens_of(alone)
    assert [x.finish_reason for x in together] == [x.finish_reason for x in alone]
    # Some end early, so that others move to their places.
    assert len({len(answer.token_ids) for answer in together}) > 1
    assert {answer.finish_reason for answer in together} == {"stop", "length"}


@pytest.mark.slow
def test_many_encodings(model: ht.Llama, texts: list[ht.EncodedContext]) -> None:
    together = ht.generate_batch(model, texts, PROMPTS, max_new_tokens=30)
    alone = [
        ht.generate(model, text, prompt, max_new_tokens=30)
        for text, prompt in zip(texts, PROMPTS, strict=True)
    ]
    assert tokens_of(together) == tokens_of(alone)
    by_itself = ht.generate_batch(model, texts, max_new_tokens=5)
    assert tokens_of(by_itself) == [
        ht.generate(model, text, max_new_tokens=5).token_ids for text in texts
    ]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "smollm3", "phi3"])
def test_other_families_side_by_side(family: str) -> None:
    model = ht.from_transformers(random_model(family, num_hidden_layers=LAYERS), ops="torch")
    text = ht.encode(model, random_tokens(100), PREFIX, SUFFIX, CONFIG)
    together = ht.generate_batch(model, text, PROMPTS[:3], max_new_tokens=8)
    alone = [ht.generate(model, text, prompt, max_new_tokens=8) for prompt in PROMPTS[:3]]
    assert tokens_of(together) == tokens_of(alone)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_triton_kernels_decode_side_by_side(
    hf_model: PreTrainedModel, dtype: torch.dtype
) -> None:
    hf_model = random_model("llama-3", dtype, num_hidden_layers=2).to(DEVICE)
    model = ht.from_transformers(hf_model, ops="triton")
    reference = ht.from_transformers(hf_model, ops="torch")
    config = ht.HomerConfig(32, 32, 0)
    text = ht.encode(reference, random_tokens(40), PREFIX, SUFFIX, config)
    expected = ht.generate_batch(reference, text, PROMPTS[:3], max_new_tokens=4, logprobs=True)
    found = ht.generate_batch(model, text, PROMPTS[:3], max_new_tokens=4, logprobs=True)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for ours, theirs in zip(found, expected, strict=True):
        if dtype == torch.float32:
            assert ours.token_ids == theirs.token_ids
        assert ours.logprobs is not None
        assert theirs.logprobs is not None
        assert abs(ours.logprobs[0] - theirs.logprobs[0]) <= tolerance


@pytest.mark.slow
def test_frequencies_that_follow_the_length_are_each_sequences_own() -> None:
    """Dynamic NTK, whose base moves with every token past the limit."""
    rope = {"rope_theta": 10000.0, **ROPES["dynamic"]}
    hf_model = random_model(num_hidden_layers=LAYERS, rope_parameters=rope)
    model = ht.from_transformers(hf_model, ops="torch")
    whole = ht.HomerConfig(2 * LIMIT, 2 * LIMIT)
    texts = [ht.encode(model, random_tokens(n), PREFIX, SUFFIX, whole) for n in (50, 20, 90)]
    alone = [ht.generate(model, text, [5, 6], 20, min_new_tokens=20).token_ids for text in texts]
    for text, ours in zip(texts, alone, strict=True):
        theirs = hf_model.generate(
            **text.to_transformers([5, 6]), max_new_tokens=20, min_new_tokens=20, do_sample=False
        )
        assert ours == theirs[0, 2:].tolist()
    settings: dict[str, Any] = {"max_new_tokens": 20, "min_new_tokens": 20}
    assert tokens_of(ht.generate_batch(model, texts, [[5, 6]] * 3, **settings)) == alone
    shared = ht.generate_batch(model, texts[0], [[5, 6], [7]], **settings)
    assert shared[0].token_ids == alone[0]
    assert shared[1].token_ids == ht.generate(model, texts[0], [7], **settings).token_ids


def test_samples_are_those_of_one_at_a_time(
    model: ht.Llama, texts: list[ht.EncodedContext]
) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 0.9}
    together = ht.generate_batch(model, texts[2], PROMPTS[:2], samples=3, seed=5, **settings)
    alone = [
        ht.generate(model, texts[2], PROMPTS[number // 3], seed=5 + number, **settings)
        for number in range(6)
    ]
    assert tokens_of(together) == tokens_of(alone)
    assert len({tuple(answer.token_ids) for answer in together[:3]}) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 30},
        {"min_new_tokens": 9, "repetition_penalty": 0.6, "no_repeat_ngram_size": 3},
    ],
)
def test_processors_do_what_transformers_generate_does(
    hf_model: PreTrainedModel,
    model: ht.Llama,
    texts: list[ht.EncodedContext],
    settings: dict[str, Any],
) -> None:
    for prompt in PROMPTS[1:4]:
        ours = ht.generate(model, texts[2], prompt, max_new_tokens=30, **settings).token_ids
        kwargs = texts[2].to_transformers(prompt)
        theirs = hf_model.generate(**kwargs, max_new_tokens=30, do_sample=False, **settings)
        assert ours == theirs[0, len(prompt) :].tolist()


def test_logprobs_are_those_of_the_model(
    hf_model: PreTrainedModel, model: ht.Llama, texts: list[ht.EncodedContext]
) -> None:
    answer = ht.generate(model, texts[0], PROMPTS[1], 10, logprobs=True, repetition_penalty=1.3)
    kwargs = texts[0].to_transformers(PROMPTS[1] + answer.token_ids)
    with torch.no_grad():
        logits = hf_model(**kwargs).logits[0, len(PROMPTS[1]) - 1 : -1]
    picked = torch.tensor(answer.token_ids)[:, None]
    expected = logits.log_softmax(-1).gather(1, picked)[:, 0]
    torch.testing.assert_close(torch.tensor(answer.logprobs), expected, rtol=0, atol=1e-4)
    assert ht.generate(model, texts[0], PROMPTS[1], 3).logprobs is None


@pytest.mark.slow
def test_stop_strings_and_pieces_of_text() -> None:
    model = ht.load(CHECKPOINT, "cpu", "float32", ops="torch")
    story = "The grass is green. The sky is blue. " * 12
    config = ht.HomerConfig(128, layers_warmup=1)
    text = ht.encode(model, story + "The pass key is 71432. " + story, config=config)
    free = ht.generate(model, text, "The sky", 14).text
    stop = free[len(free) // 2 :][:2]
    heard: dict[int, str] = {}

    def hear(index: int, piece: str) -> None:
        heard[index] = heard.get(index, "") + piece

    prompts, stops = ["The sky", "The grass is"], [stop, "never said"]
    answers = ht.generate_batch(
        model, text, prompts, on_text=hear, max_new_tokens=14, stop_strings=stops
    )
    said = free[: free.index(stop) + len(stop)]
    assert answers[0].text.startswith(said)
    assert stop not in model.tokenizer.decode(answers[0].token_ids[:-1])  # it ends with its token
    assert answers[0].finish_reason == "stop"
    assert [heard[index] for index in range(2)] == [answer.text for answer in answers]
    assert ht.generate(model, text, "The sky", 14, stop_strings=stop).text == answers[0].text


@pytest.mark.slow
def test_a_grown_context_goes_on_as_one_long_run(
    model: ht.Llama, texts: list[ht.EncodedContext], tmp_path: Path
) -> None:
    for text in (texts[0], texts[1]):
        turns, said = text, []
        for number, prompt in enumerate(PROMPTS[1:4]):
            answer = ht.generate(model, turns, prompt, 6, grow=True)
            assert answer.encoded is not None
            turns = answer.encoded
            said += prompt + answer.token_ids
            # As if all of it had been appended at once.
            again = ht.generate(model, text, [*said, 3 + number], 9).token_ids
            assert ht.generate(model, turns, [3 + number], 9).token_ids == again
            assert turns.appended == len(said) == len(turns) - len(text)
            assert turns.token_ids[-len(said) :].tolist() == said
            assert turns.next_position == text.next_position + len(said)
        file = tmp_path / "turns.safetensors"
        turns.save(file)
        loaded = ht.EncodedContext.load(file)
        assert ht.generate(model, loaded, [5], 9).token_ids == (
            ht.generate(model, turns, [5], 9).token_ids
        )
        assert loaded.appended == turns.appended


@pytest.mark.slow
def test_answers_side_by_side_grow_each_its_own(
    model: ht.Llama, texts: list[ht.EncodedContext]
) -> None:
    for contexts in (texts[1], texts):
        together = ht.generate_batch(model, contexts, PROMPTS, max_new_tokens=9, grow=True)
        for number, answer in enumerate(together):
            own = contexts if isinstance(contexts, ht.EncodedContext) else contexts[number]
            alone = ht.generate(model, own, PROMPTS[number], 9, grow=True).encoded
            assert alone is not None
            assert answer.encoded is not None
            assert torch.equal(answer.encoded.token_ids, alone.token_ids)
            torch.testing.assert_close(answer.encoded.keys, alone.keys, rtol=0, atol=1e-4)
            torch.testing.assert_close(answer.encoded.logits, alone.logits, rtol=0, atol=1e-4)


def test_transformers_goes_on_from_a_grown_context(
    hf_model: PreTrainedModel, model: ht.Llama, texts: list[ht.EncodedContext]
) -> None:
    turns = ht.generate(model, texts[1], PROMPTS[3], 6, grow=True).encoded
    assert turns is not None
    ours = ht.generate(model, turns, [4, 5], 10, min_new_tokens=10).token_ids
    theirs = hf_model.generate(
        **turns.to_transformers([4, 5]), max_new_tokens=10, min_new_tokens=10, do_sample=False
    )
    assert ours == theirs[0, 2:].tolist()


@pytest.mark.parametrize(
    ("encoded", "prompts", "settings", "sentence"),
    [
        (slice(0, 2), [[5]], {}, "There are 2 encodings and 1 prompts; give as many, or one"),
        (0, "w5", {}, "prompts is one text; give a list of them"),
        (slice(0, 0), None, {}, "There is nothing to go on from"),
        (0, [], {}, "There is nothing to go on from"),
        (0, [[5]], {"samples": 0}, "samples=0 must be at least 1"),
        (0, [[5]], {"beams": 4}, "beams is no setting of generate; known are max_new_tokens"),
        (0, [[5]], {"repetition_penalty": 0}, "repetition_penalty=0 must be a number above 0"),
        (0, [[5]], {"min_new_tokens": 70}, "min_new_tokens=70 must be at most 64"),
        (0, [[5]], {"no_repeat_ngram_size": -1}, "no_repeat_ngram_size=-1 must be at least 0"),
        (0, [[5]], {"stop_strings": [""]}, "must be texts, none empty"),
        (0, [[5]], {"stop_strings": "x"}, "stop_strings needs a tokenizer"),
        (0, [[5]], {"min_p": 0.1}, "set temperature above 0 too"),
        (0, [[5]], {"min_p": 2.0, "temperature": 1.0}, "min_p=2.0 must be from 0 to 1"),
    ],
)
def test_bad_settings_are_refused(
    model: ht.Llama,
    texts: list[ht.EncodedContext],
    encoded: Any,
    prompts: Any,
    settings: dict[str, Any],
    sentence: str,
) -> None:
    with pytest.raises(ValueError, match=sentence):
        ht.generate_batch(model, texts[encoded], prompts, **settings)
