"""Reading the survivors again: what comes out is an ordinary prompt's cache."""

from dataclasses import replace

import pytest
import torch
from cases import peers, random_tokens

import homer_triton as ht
from homer_triton.engine.recompute import read_again_

CONFIG = ht.HomerConfig(18, 16, 1, selection="votes,window=3")


def test_all_survivors_are_one_plain_prompt_to_transformers() -> None:
    hf_model, model, _ = peers(4, 2)
    tokens = random_tokens(120)
    encoded = ht.encode(model, tokens[2:116], tokens[:2], tokens[116:], CONFIG)
    survivors = encoded.token_ids[encoded.source_indices]
    assert len(survivors) == 16
    assert encoded.positions.tolist() == list(range(16))
    assert encoded.next_position == 16
    with torch.no_grad():
        plain = hf_model(survivors[None])
    torch.testing.assert_close(encoded.logits, plain.logits[0, -1].float(), atol=1e-4, rtol=1e-4)
    for ours, layer in zip(encoded.values, plain.past_key_values.layers, strict=True):
        torch.testing.assert_close(ours, layer.values[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("again", [1, 5, 12])
def test_the_last_tokens_of_a_cache_come_out_as_they_were(again: int) -> None:
    model = peers(4, 2)[1]
    tokens = torch.tensor(random_tokens(12))
    cache = model.new_cache(12)
    with torch.no_grad():
        logits = model.forward(tokens, cache)
        keys, values = (half.transpose(1, 2).contiguous() for half in cache.unbind(1))
        expected = [keys.clone(), values.clone(), logits]
        for half in (keys, values):
            half[:, :, 12 - again :] = float("nan")
        found = read_again_(model, tokens[-again:], keys, values, 12 - again)
    for ours, theirs in zip([keys, values, found], expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_what_fits_one_chunk_is_read_once() -> None:
    plan = ht.plan(peers(4, 2)[1].config, 10, 2, 4, CONFIG)
    assert (plan.recompute, plan.layers_tree) == ("none", plan.num_layers)


def test_more_survivors_than_the_model_reads_are_refused() -> None:
    model = peers(4, 2)[1].config
    limit = model.max_position_embeddings
    long = ht.HomerConfig(2 * limit, limit + 1, 1)
    message = f"{limit + 1} survivors .*beyond the model's context limit of {limit}; lower target"
    with pytest.raises(ValueError, match=message):
        ht.plan(model, 3 * limit, 2, 4, long)
    assert ht.plan(model, 3 * limit, 2, 4, replace(long, target_len=limit)).rows == limit
    assert ht.plan(model, 3 * limit, 2, 4, replace(long, recompute="suffix")).rows == limit + 1


def test_a_tree_of_fewer_layers_needs_all_survivors_read_again() -> None:
    model = peers(4, 2)[1]
    fewer = ht.HomerConfig(18, 16, 1, recompute="suffix", layers_tree=5)
    with pytest.raises(ValueError, match='set recompute="all"'):
        ht.encode(model, random_tokens(90), [1], [2, 3], fewer)
