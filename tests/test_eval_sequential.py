"""Compression guided by the question, chunk after chunk, on a tiny random model."""

from pathlib import Path

import pytest
import torch
from checkpoints import LIMIT, ROPES, random_model
from torch import Tensor

import homer_triton as ht
from homer_triton.evaluation.sequential import (
    attention_received,
    encode_sequentially,
    lay_out_steps,
    rotate_back,
)
from homer_triton.loading import with_rope


@pytest.fixture(scope="module")
def model() -> ht.Llama:
    return ht.from_transformers(random_model(num_hidden_layers=4), ops="torch")


def parts(length: int, prefix: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.randint(3, 96, (length,), generator=torch.Generator().manual_seed(length))
    return tokens[:prefix], tokens[prefix:-4], tokens[-4:]


@pytest.mark.parametrize(("context", "budget", "room"), [(100, 30, 17), (7, 3, 1), (40, 40, 9)])
def test_chunks_cover_the_context_and_spend_the_budget_evenly(
    context: int, budget: int, room: int
) -> None:
    steps = list(lay_out_steps(context, budget, room))
    assert [step.start for step in steps] == [0, *(step.stop for step in steps[:-1])]
    assert steps[-1].stop == context
    assert steps[-1].kept == budget
    kept = 0
    for step in steps:
        assert 1 <= step.stop - step.start <= room
        assert kept <= step.kept <= kept + step.stop - step.start
        assert abs(step.kept - budget * step.stop / context) <= 1
        kept = step.kept


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("target", [LIMIT // 2, LIMIT])
def test_a_text_within_the_budget_is_a_plain_prefill(
    model: ht.Llama, prefix: int, target: int
) -> None:
    text = parts(target, prefix)
    encoded = encode_sequentially(model, *text, ht.HomerConfig(target_len=target))
    cache = model.new_cache(target)
    logits = model.forward(torch.cat(text), cache)
    torch.testing.assert_close(encoded.logits, logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(encoded.keys, cache[:, 0].transpose(1, 2), atol=1e-4, rtol=0)
    assert encoded.positions.tolist() == encoded.source_indices.tolist() == list(range(target))


@pytest.mark.interpreter
@pytest.mark.parametrize("ops", ["torch", "triton"])
def test_a_long_text_fills_the_target(ops: str, tmp_path: Path) -> None:
    model = ht.from_transformers(random_model(num_hidden_layers=2), ops=ops)  # type: ignore[arg-type]
    text = parts(5 * LIMIT if ops == "torch" else 2 * LIMIT)
    encoded = encode_sequentially(model, *text, ht.HomerConfig(max_chunk_len=40, target_len=30))
    assert len(encoded) == encoded.keys.shape[2] == encoded.next_position == 30
    assert encoded.positions.tolist() == list(range(30))
    assert encoded.stats.peak_slots <= 40 + 30
    assert encoded.logits.isfinite().all()
    sources = encoded.source_indices.tolist()
    assert sources == sorted(set(sources))
    assert sources[:3] == [0, 1, 2]
    assert sources[-4:] == list(range(len(encoded.token_ids) - 4, len(encoded.token_ids)))
    assert torch.equal(encoded.token_ids, torch.cat(text))
    assert [i for i, height in enumerate(encoded.pruned_at.tolist()) if height < 0] == sources
    encoded.save(tmp_path / "encoded.safetensors")
    again = ht.EncodedContext.load(tmp_path / "encoded.safetensors")
    assert torch.equal(again.keys, encoded.keys)
    assert ht.generate(model, again, max_new_tokens=3).token_ids


def test_the_first_layers_rows_are_the_tokens_own_keys_at_their_new_places(
    model: ht.Llama,
) -> None:
    """The first layer's keys depend on nothing but token and position, so that moved ones can be
    computed anew; and those of one token are all alike, wherever it was.
    """
    prefix, _, suffix = parts(3 * LIMIT)
    context = torch.full((3 * LIMIT,), 7)
    config = ht.HomerConfig(max_chunk_len=32, target_len=28)
    encoded = encode_sequentially(model, prefix, context, suffix, config)
    fresh = torch.cat([prefix, context[: 28 - 7], suffix])
    cache = model.new_cache(28)
    model.forward(fresh, cache)
    torch.testing.assert_close(encoded.keys[0], cache[0, 0].transpose(0, 1), atol=1e-5, rtol=0)


def test_what_the_question_attends_to_is_kept_by_every_layer_for_itself() -> None:
    """One chunk, pruned once: the kept rows are those of largest attention in transformers."""
    peer = random_model(num_hidden_layers=3)
    model = ht.from_transformers(peer, ops="torch")
    text = parts(LIMIT // 2)
    encoded = encode_sequentially(model, *text, ht.HomerConfig(target_len=7 + 5))
    peer.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = peer(torch.cat(text)[None], output_attentions=True).attentions
    cache = model.new_cache(LIMIT // 2)
    model.forward(torch.cat(text), cache)
    expected = []
    for index, weights in enumerate(attentions):
        received = weights[0, :, -4:].sum((0, 1))[3:-4]
        expected.append(sorted((3 + received.topk(5).indices).tolist()))
        values = cache[index, 1, expected[-1]].transpose(0, 1)
        torch.testing.assert_close(encoded.values[index, :, 3:-4], values, atol=1e-4, rtol=0)
    assert encoded.source_indices.tolist()[3:-4] == expected[-1]
    assert expected[0] != expected[-1]


def test_attention_is_summed_over_heads_and_rows(model: ht.Llama) -> None:
    torch.manual_seed(0)
    received = attention_received(torch.randn(5, 4, 16), torch.randn(20, 2, 16))
    assert received.sum().item() == pytest.approx(5 * 4, abs=1e-4)
    # The rows before the queries are seen by all of them, the last by one alone.
    zeros = attention_received(torch.zeros(2, 4, 16), torch.randn(4, 2, 16))
    assert zeros.tolist() == pytest.approx([4 / 3 + 1, 4 / 3 + 1, 4 / 3 + 1, 1])


@pytest.mark.parametrize("rope", ["default", "linear", "yarn", "llama3"])
def test_a_key_rotated_back_is_the_key_at_the_new_position(model: ht.Llama, rope: str) -> None:
    other = with_rope(model, ROPES[rope])
    rotary = other.rotary(LIMIT)
    torch.manual_seed(0)
    key = torch.randn(1, 6, 2, other.config.head_dim)
    old, new = torch.tensor([[1, 9, 20, 33, 50, 63]]), torch.tensor([[1, 2, 3, 4, 40, 0]])
    at_old, at_new = key.clone(), key.clone()
    other.ops.apply_rotary_(at_old, old, *rotary)
    other.ops.apply_rotary_(at_new, new, *rotary)
    moved = rotate_back(other, at_old[0], (old - new)[0], rotary)
    torch.testing.assert_close(moved, at_new[0], atol=1e-5, rtol=0)


def test_positions_never_go_beyond_the_limit(model: ht.Llama) -> None:
    config = ht.HomerConfig(max_chunk_len=LIMIT, target_len=LIMIT - 10)
    encoded = encode_sequentially(model, *parts(3 * LIMIT), config)
    assert encoded.stats.peak_slots <= LIMIT
    for target, reason in ((LIMIT, "no room within a context limit"), (7, "leaves no room")):
        with pytest.raises(ValueError, match=reason):
            encode_sequentially(model, *parts(3 * LIMIT), ht.HomerConfig(target_len=target))


def test_half_precision_keeps_as_many_rows() -> None:
    hf = random_model(num_hidden_layers=2, dtype=torch.bfloat16)
    model = ht.from_transformers(hf, ops="torch")
    encoded = encode_sequentially(model, *parts(4 * LIMIT), ht.HomerConfig(target_len=24))
    assert encoded.keys.dtype == torch.bfloat16
    assert len(encoded) == 24
    assert encoded.logits.isfinite().all()
