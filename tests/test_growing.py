"""Texts that grow, and conversations that outgrow their room."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import LAYERS, random_tokens
from checkpoints import ROPES, random_model

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


@pytest.mark.slow
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


def rope_of(kind: str) -> dict[str, Any]:
    return {"rope_theta": 500000.0, **ROPES[kind]}


def bare(keys: torch.Tensor, positions: torch.Tensor, model: ht.Llama) -> torch.Tensor:
    """Keys [L, HKV, T, D] as they were before they were rotated, as complex numbers."""
    cos, sin = (table[positions] for table in model.rotary(int(positions.max()) + 1))
    first, second = keys.chunk(2, dim=-1)
    return torch.complex(first, second) / torch.complex(cos, sin)


@pytest.mark.parametrize("rope", ["default", "yarn", "llama3"])
@pytest.mark.parametrize("selection", [{"recompute": "none"}, {"recompute": "suffix"}])
def test_rows_close_up_to_an_ordinary_prompts(rope: str, selection: dict[str, Any]) -> None:
    peer = random_model(num_hidden_layers=LAYERS, rope_parameters=rope_of(rope))
    model = ht.from_transformers(peer, ops="torch")
    config = ht.HomerConfig(32, 24, **selection)
    encoded = ht.encode(model, random_tokens(90), PREFIX, SUFFIX, config)
    closed = ht.close_up(model, encoded)
    assert not torch.equal(encoded.positions, closed.positions)
    assert closed.positions.tolist() == list(range(len(encoded)))
    assert closed.next_position == len(encoded)
    assert closed.kept_ids.tolist() == rows(encoded)
    before = bare(encoded.keys, encoded.positions, model)[:, :, :-1]
    torch.testing.assert_close(bare(closed.keys, closed.positions, model)[:, :, :-1], before)
    assert torch.equal(closed.values[:, :, :-1], encoded.values[:, :, :-1])
    # The next token is what transformers makes of the same rows and the last token.
    short = replace(
        closed,
        keys=closed.keys[:, :, :-1],
        values=closed.values[:, :, :-1],
        next_position=len(closed) - 1,
    )
    with torch.no_grad():
        there = peer(**short.to_transformers(closed.kept_ids[-1:]))
    torch.testing.assert_close(closed.logits, there.logits[0, -1], rtol=1e-4, atol=1e-4)
    # What it goes on from is an encoding as any: it is grown and closed up again.
    answer = ht.generate(model, closed, [1, 2], 4, grow=True)
    assert answer.encoded is not None
    assert ht.close_up(model, answer.encoded) is not closed
    assert torch.equal(ht.close_up(model, answer.encoded).keys, answer.encoded.keys)


def test_what_was_read_again_stands_closed_up_already(
    model: ht.Llama, encoded: ht.EncodedContext
) -> None:
    assert torch.equal(ht.close_up(model, encoded).keys, encoded.keys)
    config = ht.HomerConfig(32, 32, recompute="none")
    peer = random_model(rope_parameters=rope_of("dynamic"))
    moves = ht.from_transformers(peer, ops="torch")
    with pytest.raises(ValueError, match="RoPE follows the length"):
        ht.close_up(moves, ht.encode(moves, random_tokens(100), PREFIX, SUFFIX, config))
    with pytest.raises(ValueError, match="another model"):
        ht.close_up(moves, encoded)
