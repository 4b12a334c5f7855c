"""Which heads retrieve: the probe against transformers' attention, and what follows from it."""

import pytest
import torch
from checkpoints import random_model
from transformers import LlamaForCausalLM

import homer_triton as ht
from homer_triton.engine import retrieval
from homer_triton.engine.retrieval import (
    QUESTION_LEN,
    RECORD_LEN,
    record_attention,
    retrieval_heads,
)
from homer_triton.text.tokens import beginning

LAYERS, HEADS, DIM = 3, 4, 32
COPIES = (0, 2)  # the layer and the head that `copying_model` changes
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": DIM,
    "max_position_embeddings": 2048,
}


def copying_model() -> LlamaForCausalLM:
    """Random weights, but that one head attends to the tokens that it stands on, by the slowest
    quarter of its rotations, which hardly turn within a sequence.
    """
    rope = {"rope_type": "default", "rope_theta": 1e12}
    hf_model = random_model(**SIZES, rope_parameters=rope)
    layer, head = COPIES
    attention = hf_model.model.layers[layer].self_attn
    rows = torch.arange(head * DIM, (head + 1) * DIM).view(2, -1)
    matrix = torch.zeros(DIM, 64)
    slow = torch.arange(DIM).view(2, -1)[:, DIM // 4 :].flatten()
    matrix[slow, torch.arange(len(slow))] = 9.0
    for weight in (attention.q_proj.weight, attention.k_proj.weight):
        weight.data[rows.flatten()] = matrix
    return hf_model


def test_the_attention_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sequence of the probe through transformers' own attention."""
    monkeypatch.setattr("homer_triton.engine.retrieval.SEQUENCES", 1)
    seen: list[torch.Tensor] = []
    hf_model = copying_model()
    hf_model.set_attn_implementation("eager")
    model = ht.from_transformers(hf_model, ops="torch")
    monkeypatch.setattr(
        model, "embed", lambda ids: seen.append(ids) or type(model).embed(model, ids)
    )
    attention = record_attention(model)
    (tokens,) = seen
    with torch.no_grad():
        given = hf_model(tokens, output_attentions=True).attentions
    context = tokens.shape[1] - QUESTION_LEN
    question = tokens[0, context:].tolist()
    text = tokens[0, :context].tolist()
    starts = range(len(beginning(model)), context, RECORD_LEN)
    (first,) = (start for start in starts if text[start : start + QUESTION_LEN] == question)
    for layer, weights in enumerate(given):
        rows = weights[0, :, context:, :context]
        rows = rows / rows.sum(-1, keepdim=True)  # of what it gives to the tokens before it
        expected = rows[..., first : first + QUESTION_LEN + 1].sum(-1).mean(-1)
        torch.testing.assert_close(attention[layer], expected, atol=1e-5, rtol=1e-4)


def test_a_head_that_looks_tokens_up_is_found() -> None:
    heads = retrieval_heads(ht.from_transformers(copying_model(), ops="torch"))
    assert heads is not None
    assert heads.nonzero().tolist() == [[*COPIES]]


def test_random_weights_have_no_retrieval_heads() -> None:
    assert retrieval_heads(ht.from_transformers(random_model(**SIZES), ops="torch")) is None


def test_too_short_a_limit_for_the_probe() -> None:
    short = random_model(**{**SIZES, "max_position_embeddings": 256})
    assert retrieval_heads(ht.from_transformers(short, ops="torch")) is None


def test_the_heads_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ht.from_transformers(copying_model(), ops="torch")
    heads = retrieval_heads(model)
    monkeypatch.setattr("homer_triton.engine.retrieval.record_attention", None)
    assert torch.equal(retrieval_heads(model), heads)
    monkeypatch.undo()
    model.weights.layers[COPIES[0]].output.neg_()  # trained on: another model
    before = len(retrieval.measured)
    assert retrieval_heads(model) is not None
    assert len(retrieval.measured) == before + 1


def test_a_model_without_them_is_asked_as_a_whole() -> None:
    """The votes of all heads, of the nodes' last layers: what "sum" and "levels" are by name."""
    model = ht.from_transformers(random_model(), ops="torch")
    tokens = torch.randint(90, (60,), generator=torch.Generator().manual_seed(0))
    sizes = {"max_chunk_len": 24, "target_len": 16}
    kept = [
        ht.encode(model, tokens, [1], [2, 3], ht.HomerConfig(**sizes, selection=selection))
        for selection in ("votes", "votes,heads=sum,layers=levels")
    ]
    assert torch.equal(kept[0].source_indices, kept[1].source_indices)


def test_what_a_text_repeats_of_the_question_is_kept() -> None:
    """One copying head among twelve: its votes alone decide."""
    model = ht.from_transformers(copying_model(), ops="torch")
    tokens = torch.randperm(4000, generator=torch.Generator().manual_seed(1))[:600]
    question = tokens[300:306]
    config = ht.HomerConfig(max_chunk_len=160, target_len=80)
    encoded = ht.encode(model, tokens, [1], question, config)
    kept = set(encoded.source_indices.tolist())
    assert {*range(301, 307)} <= kept  # the prefix stands before them


def test_what_follows_in_the_next_chunk_is_kept_too() -> None:
    """The question's words end one leaf, and their neighbours begin the next one."""
    model = ht.from_transformers(copying_model(), ops="torch")
    tokens = torch.randperm(4000, generator=torch.Generator().manual_seed(1))[:600]
    config = ht.HomerConfig(max_chunk_len=160, target_len=80)
    edge = ht.plan(model, 600, 1, 6, config).leaf_context
    encoded = ht.encode(model, tokens, [1], tokens[edge - 6 : edge], config)
    kept = set(encoded.source_indices.tolist())
    assert {*range(edge - 5, edge + 9)} <= kept  # the prefix stands before them
