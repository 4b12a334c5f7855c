"""Going on from an encoding: the tokens, where they stop, what is heard of them on the way."""

from typing import Any

import pytest
import torch
from cases import peers, random_tokens, to_config
from checkpoints import random_model
from oracle_tree import Settings
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import homer_triton as ht

SETTINGS = to_config(Settings(max_chunk_len=18, target_len=16, layers_warmup=0))


def word_tokenizer(size: int = 96) -> PreTrainedTokenizerFast:
    """One word per token: w0, w1, ..."""
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2")


def spoken_model(**settings: Any) -> ht.Llama:
    """A random model that never ends of itself, with a tokenizer."""
    hf_model = random_model(**{"eos_token_id": None, **settings})
    return ht.from_transformers(hf_model, word_tokenizer(), ops="torch")


@pytest.fixture(scope="module")
def model() -> ht.Llama:
    return spoken_model()


@pytest.fixture(scope="module")
def encoded(model: ht.Llama) -> ht.EncodedContext:
    return ht.encode(model, random_tokens(40), [1], [7, 8], SETTINGS)


def greedy_by_transformers(hf_model: LlamaForCausalLM, tokens: list[int], count: int) -> list[int]:
    """What transformers appends to a plain prompt."""
    ids = torch.tensor([tokens])
    everything = hf_model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return everything[0, len(tokens) :].tolist()


@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
def test_greedy_is_what_transformers_generates(heads: tuple[int, int]) -> None:
    hf_model, model, _ = peers(*heads)
    tokens = random_tokens(30)
    whole = to_config(Settings(30, 30, 2))
    encoded = ht.encode(model, tokens[1:25], tokens[:1], tokens[25:], whole)
    ours = ht.generate(model, encoded, max_new_tokens=16)
    assert ours.token_ids == greedy_by_transformers(hf_model, tokens, 16)


def test_a_prompt_goes_on_at_the_next_position() -> None:
    hf_model, model, _ = peers(4, 4)
    tokens = random_tokens(30)
    whole = to_config(Settings(24, 24, 2))
    encoded = ht.encode(model, tokens[1:20], tokens[:1], tokens[20:24], whole)
    ours = ht.generate(model, encoded, prompt=tokens[24:], max_new_tokens=8)
    assert ours.token_ids == greedy_by_transformers(hf_model, tokens, 8)


def test_text_and_token_ids_are_the_same_prompt(
    model: ht.Llama, encoded: ht.EncodedContext
) -> None:
    by_text = ht.generate(model, encoded, "w5 w6 w9", 8)
    assert by_text.token_ids == ht.generate(model, encoded, [5, 6, 9], 8).token_ids
    assert by_text.text == "".join(f" w{i}" for i in by_text.token_ids)
    assert 0 < by_text.seconds_to_first < by_text.seconds


def test_sampling_is_repeatable_by_its_seed(model: ht.Llama, encoded: ht.EncodedContext) -> None:
    def sample(seed: int | None) -> tuple[int, ...]:
        return tuple(ht.generate(model, encoded, None, 16, temperature=2.0, seed=seed).token_ids)

    state = torch.get_rng_state()
    assert sample(3) == sample(3)
    assert len({sample(seed) for seed in range(4)}) == 4
    assert sample(None) != sample(None)
    assert torch.equal(torch.get_rng_state(), state), "sampling must not draw from global noise"


@pytest.mark.parametrize("shape", [{"top_k": 1}, {"top_p": 1e-6}])
def test_sampling_among_one_token_is_greedy(
    model: ht.Llama, encoded: ht.EncodedContext, shape: dict[str, Any]
) -> None:
    greedy = ht.generate(model, encoded, None, 12).token_ids
    assert ht.generate(model, encoded, None, 12, temperature=0.9, **shape).token_ids == greedy


def test_top_k_samples_among_the_likeliest(model: ht.Llama, encoded: ht.EncodedContext) -> None:
    likeliest = set(encoded.logits.topk(3).indices.tolist())
    first = {
        ht.generate(model, encoded, None, 1, temperature=9.0, top_k=3, seed=seed).token_ids[0]
        for seed in range(60)
    }
    assert first == likeliest


def test_generation_stops_at_the_end_token(model: ht.Llama, encoded: ht.EncodedContext) -> None:
    free = ht.generate(model, encoded, None, 12).token_ids
    end = next(i for i in range(2, 12) if free[i] not in free[:i])
    for ends in (free[end], [95, free[end]]):
        stopping = spoken_model(eos_token_id=ends)
        context = ht.encode(stopping, random_tokens(40), [1], [7, 8], SETTINGS)
        assert ht.generate(stopping, context, None, 12).token_ids == free[: end + 1]


def test_streamed_pieces_are_the_text(model: ht.Llama, encoded: ht.EncodedContext) -> None:
    pieces: list[str] = []
    result = ht.generate(model, encoded, None, 10, on_text=pieces.append)
    assert len(pieces) > 1
    assert "".join(pieces) == result.text
    assert len(result.text.split()) == len(result.token_ids) == 10


def test_without_a_tokenizer_there_are_tokens_but_no_text() -> None:
    _, silent, _ = peers(4, 2)
    encoded = ht.encode(silent, random_tokens(20), config=SETTINGS)
    result = ht.generate(silent, encoded, max_new_tokens=3)
    assert (len(result.token_ids), result.text) == (3, "")
    with pytest.raises(ValueError, match="on_text needs a tokenizer"):
        ht.generate(silent, encoded, on_text=print)
    with pytest.raises(ValueError, match="prompt is text"):
        ht.generate(silent, encoded, "w5")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 10**20}, "max_new_tokens=100000000000000000000 must be at most"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 must be a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens=True must be a whole number"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"temperature": 1e-40}, "temperature=1e-40 must be at least 1e-06, or 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": 1.0, "seed": 2**64}, "seed=18446744073709551616 must be at most"),
        ({"temperature": 1.0, "seed": -(2**63) - 1}, "seed=-9223372036854775809 must be at least"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5"),
        ({"top_k": 5}, "set temperature above 0"),
        ({"prompt": [96]}, "token id 96"),
    ],
)
def test_settings_out_of_range_are_refused(
    model: ht.Llama, encoded: ht.EncodedContext, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ht.generate(model, encoded, **settings)


def test_the_least_temperature_and_seed_are_those_that_work(
    model: ht.Llama, encoded: ht.EncodedContext
) -> None:
    greedy = ht.generate(model, encoded, None, 8).token_ids
    for seed in (-(2**63), 2**64 - 1):
        drawn = ht.generate(model, encoded, None, 8, temperature=1e-6, seed=seed)
        assert drawn.token_ids == greedy
