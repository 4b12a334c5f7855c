"""Texts that grow, and conversations that outgrow their room."""

import pytest
import torch
from cases import LAYERS, random_tokens
from checkpoints import random_model

import homer_triton as ht
from homer_triton.demo import CHECKPOINT

CONFIG = ht.HomerConfig(32, 32)
PREFIX, SUFFIX = random_tokens(2, 1), random_tokens(4, 2)


@pytest.fixture(scope="module")
def model() -> ht.Llama:
    return ht.from_transformers(random_model(num_hidden_layers=LAYERS), ops="torch")


@pytest.fixture(scope="module")
def encoded(model: ht.Llama) -> ht.EncodedContext:
    return ht.encode(model, random_tokens(100), PREFIX, SUFFIX, CONFIG)


def rows(encoded: ht.EncodedContext) -> list[int]:
    """The tokens of the cache."""
    return encoded.token_ids[encoded.source_indices].tolist()


def test_what_fits_is_read_as_if_at_once(model: ht.Llama) -> None:
    tokens = random_tokens(20)
    short = ht.encode(model, tokens[:8], PREFIX, SUFFIX, CONFIG)
    longer = ht.append(model, ht.append(model, short, tokens[8:9], CONFIG), tokens[9:], CONFIG)
    whole = ht.encode(model, tokens, PREFIX, SUFFIX, CONFIG)
    assert torch.equal(longer.token_ids, whole.token_ids)
    torch.testing.assert_close(longer.logits, whole.logits)


def test_more_text_costs_its_own_length(model: ht.Llama, encoded: ht.EncodedContext) -> None:
    more = random_tokens(60, 9)
    grown = ht.append(model, encoded, more, CONFIG)
    assert grown.plan.input_len == len(encoded) + 60
    assert len(grown) <= 32
    kept = rows(encoded)
    assert grown.token_ids.tolist() == [*kept[:-4], *more, *SUFFIX]
    assert rows(grown)[:2] == PREFIX
    assert rows(grown)[-4:] == SUFFIX


def test_a_key_is_found_whenever_it_came() -> None:
    model = ht.load(CHECKPOINT, "cpu", "float32", ops="torch")
    config = ht.HomerConfig.paper(max_chunk_len=128, target_len=128, layers_warmup=1)
    filler = "The grass is green. The sky is blue. " * 10
    key = "The pass key is 71432. Remember it. 71432 is the pass key. "
    question = "What is the pass key? The pass key is"
    for place in range(3):
        parts = [filler, filler, filler]
        parts[place] += key
        grown = ht.encode(model, parts[0], suffix=question, config=config)
        for part in parts[1:]:
            grown = ht.append(model, grown, part, config)
        assert ht.generate(model, grown, max_new_tokens=6).text.strip().startswith("71432"), place


def test_a_conversation_is_compacted_and_goes_on(
    model: ht.Llama, encoded: ht.EncodedContext
) -> None:
    turns = encoded
    for number in range(4):
        answer = ht.generate(model, turns, random_tokens(5, 20 + number), 8, grow=True)
        assert answer.encoded is not None
        turns = answer.encoded
    before = rows(turns)
    assert len(before) > 32 + 20
    short = ht.compact(model, turns, CONFIG, recent=10)
    assert len(short) <= 32
    assert short.appended == 0
    kept = rows(short)
    assert kept[:2] == PREFIX
    assert kept[-10:] == before[-10:]
    left = iter(before)
    assert all(token in left for token in kept)  # in their order
    prompt = torch.tensor(kept)
    expected = model.forward(prompt, model.new_cache(len(prompt)))
    torch.testing.assert_close(short.logits, expected, rtol=0, atol=1e-4)
    assert ht.generate(model, short, [5], 4, grow=True).encoded is not None


def test_bad_input_is_refused(model: ht.Llama, encoded: ht.EncodedContext) -> None:
    turns = ht.generate(model, encoded, [5], 3, grow=True).encoded
    assert turns is not None
    with pytest.raises(ValueError, match=r"There are \d tokens of prompts and answers behind"):
        ht.append(model, turns, [5, 6])
    with pytest.raises(ValueError, match="The text is empty"):
        ht.append(model, encoded, [])
    with pytest.raises(ValueError, match="recent=0 must be at least 1"):
        ht.compact(model, turns, recent=0)
    with pytest.raises(ValueError, match=r"recent=500 must be at most"):
        ht.compact(model, turns, recent=500)
    other = ht.from_transformers(random_model(seed=3, num_hidden_layers=LAYERS), ops="torch")
    for call in (lambda: ht.compact(other, turns), lambda: ht.append(other, encoded, [5])):
        with pytest.raises(ValueError, match="encoded by another model"):
            call()
