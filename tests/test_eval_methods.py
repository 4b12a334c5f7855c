"""The methods that are compared, and the model under another RoPE."""

import pytest
import torch
from checkpoints import LIMIT, ROPES, random_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import homer_triton as ht
from homer_triton.evaluation.independent import encode_independently
from homer_triton.evaluation.methods import (
    CHUNK_EXTENSION,
    METHODS,
    Reading,
    make_readers,
    rescaled,
    token_losses,
)
from homer_triton.loading import with_rope

CONFIG = ht.HomerConfig(layers_warmup=0)


@pytest.fixture(scope="module")
def hf_model() -> LlamaForCausalLM:
    return random_model(num_hidden_layers=6, dtype=torch.float64)


@pytest.fixture(scope="module")
def model(hf_model: LlamaForCausalLM) -> ht.Llama:
    return ht.from_transformers(hf_model, ops="torch")


def parts(length: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.randint(3, 96, (length,), generator=torch.Generator().manual_seed(length))
    return tokens[:3], tokens[3:-4], tokens[-4:]


def hf_logits(hf_model: LlamaForCausalLM, tokens: Tensor, **rope: object) -> Tensor:
    """transformers' logits [T, V] of the same weights under other RoPE parameters."""
    if rope:
        settings = hf_model.config.to_dict()
        settings["rope_parameters"] = {**settings["rope_parameters"], **rope}
        other = LlamaForCausalLM(LlamaConfig.from_dict(settings)).double().eval()
        other.load_state_dict(hf_model.state_dict())
        hf_model = other
    with torch.no_grad():
        return hf_model(tokens[None]).logits[0]


@pytest.mark.parametrize("rope", ["linear", "dynamic", "yarn", "llama3"])
def test_another_rope_on_the_same_weights_gives_transformers_logits(
    hf_model: LlamaForCausalLM, model: ht.Llama, rope: str
) -> None:
    tokens = torch.arange(3, 3 + LIMIT + 9)
    other = with_rope(model, ROPES[rope])
    logits = other.forward(tokens, other.new_cache(len(tokens)), all_logits=True)
    expected = hf_logits(hf_model, tokens, **ROPES[rope])
    torch.testing.assert_close(logits, expected.float(), atol=1e-4, rtol=0)
    assert other.weights is model.weights
    assert model.config.rope_type == "default"


@pytest.mark.parametrize("name", ["plain", "pi", "ntk", "yarn"])
def test_methods_that_read_everything_score_like_transformers(
    hf_model: LlamaForCausalLM, model: ht.Llama, name: str
) -> None:
    read, following = parts(3 * LIMIT - 8), torch.tensor([7, 5, 9, 11, 13, 17, 19, 23])
    tokens = torch.cat([*read, following])
    factor = len(tokens) / LIMIT
    rope: dict[str, object] = {
        "plain": {},
        "pi": {"rope_type": "linear", "factor": factor},
        # With all tokens in one pass, transformers' frequencies are those of the whole length.
        "ntk": {"rope_type": "dynamic", "factor": factor},
        "yarn": {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": LIMIT,
        },
    }[name]
    (reader,) = make_readers((name,), model, CONFIG).values()
    losses = token_losses(reader(*read, len(following)), following)
    logits = hf_logits(hf_model, tokens, **rope)[-9:-1]
    expected = torch.nn.functional.cross_entropy(logits, following, reduction="none")
    assert losses == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("scaling", ["pi", "ntk", "yarn"])
def test_rope_is_left_alone_within_the_limit(model: ht.Llama, scaling: str) -> None:
    assert rescaled(model, scaling, LIMIT) is model
    assert rescaled(model, scaling, LIMIT + 1) is not model


def test_window_reads_the_prefix_and_the_last_tokens_that_leave_room(model: ht.Llama) -> None:
    prefix, context, suffix = parts(5 * LIMIT)
    reading = METHODS["window"](model, CONFIG, prefix, context, suffix, 10)
    room = LIMIT - 10
    assert len(reading.encoded) == room
    expected = torch.cat([prefix, context[-(room - 7) :], suffix])
    assert reading.encoded.token_ids.tolist() == expected.tolist()


def test_window_without_room_is_refused(model: ht.Llama) -> None:
    with pytest.raises(ValueError, match="no room for context"):
        METHODS["window"](model, CONFIG, *parts(5 * LIMIT), LIMIT - 7)


@pytest.mark.parametrize("scaling", ["pi", "ntk", "yarn"])
def test_homer_with_rescaled_rope_reads_longer_chunks(model: ht.Llama, scaling: str) -> None:
    read = parts(6 * LIMIT)
    bias = ht.Calibration(torch.zeros(6, LIMIT))
    config = ht.HomerConfig(max_chunk_len=32, target_len=16, layers_warmup=0, calibration=bias)
    reading = METHODS[f"homer+{scaling}"](model, config, *read, 4)
    assert reading.encoded.plan.max_chunk_len == CHUNK_EXTENSION * 32
    assert len(reading.encoded) == CHUNK_EXTENSION * 16
    expected = ht.encode(
        rescaled(model, scaling, CHUNK_EXTENSION * 32 + 4),
        read[1],
        read[0],
        read[2],
        ht.HomerConfig(
            max_chunk_len=CHUNK_EXTENSION * 32, target_len=CHUNK_EXTENSION * 16, layers_warmup=0
        ),
    )
    assert torch.equal(reading.encoded.keys, expected.keys)


@pytest.mark.parametrize("scaling", ["pi", "ntk", "yarn"])
def test_homer_rescales_no_more_than_a_short_text_needs(model: ht.Llama, scaling: str) -> None:
    reading = METHODS[f"homer+{scaling}"](model, CONFIG, *parts(LIMIT - 4), 4)
    assert reading.model is model


def test_one_independent_chunk_is_a_prune_and_a_second_look_of_the_suffix(model: ht.Llama) -> None:
    prefix, context, suffix = parts(LIMIT // 2)
    config = ht.HomerConfig(target_len=16, recompute="suffix")
    expected = ht.encode(model, context, prefix, suffix, config)
    got = encode_independently(model, prefix, context, suffix, config)
    assert torch.equal(got.keys, expected.keys)
    assert torch.equal(got.logits, expected.logits)
    assert got.source_indices.tolist() == expected.source_indices.tolist()


def test_independent_chunks_never_see_each_other(model: ht.Llama) -> None:
    prefix, context, suffix = parts(3 * 25 + 7)
    config = ht.HomerConfig(max_chunk_len=32, target_len=7 + 75)
    got = encode_independently(model, prefix, context, suffix, config)
    assert got.source_indices.tolist() == list(range(82))
    assert got.token_ids.tolist() == torch.cat([prefix, context, suffix]).tolist()
    for index, part in enumerate(context.split(25)):
        alone = model.new_cache(28)
        model.forward(torch.cat([prefix, part]), alone)
        rows = slice(3 + 25 * index, 28 + 25 * index)
        assert torch.allclose(got.keys[:, :, rows], alone[:, 0, 3:].transpose(1, 2))
        assert got.positions[rows].tolist() == list(range(3, 28))
    assert got.next_position == 32


def test_independent_chunks_share_the_target(model: ht.Llama) -> None:
    prefix, context, suffix = parts(3 * 25 + 7 - 10)
    config = ht.HomerConfig(max_chunk_len=32, target_len=7 + 3 * 5 + 2)
    got = encode_independently(model, prefix, context, suffix, config)
    assert len(got) == 7 + 3 * 5
    sources = got.source_indices.tolist()
    assert sources == sorted(sources)
    assert sources[:3] == [0, 1, 2]
    assert sources[-4:] == list(range(68, 72))
    kept = [index for index, height in enumerate(got.pruned_at.tolist()) if height < 0]
    assert kept == sources
    with pytest.raises(ValueError, match="less than one token"):
        encode_independently(
            model, prefix, context, suffix, ht.HomerConfig(max_chunk_len=32, target_len=9)
        )


@pytest.mark.parametrize("name", METHODS)
def test_a_prediction_goes_on_from_every_method(model: ht.Llama, name: str) -> None:
    if name == "retrieval":
        pytest.importorskip("bm25s", reason="retrieval needs bm25s")
    (reader,) = make_readers((name,), model, CONFIG).values()
    reading = reader(*parts(3 * LIMIT), 5)
    greedy = ht.generate(reading.model, reading.encoded, max_new_tokens=5).token_ids
    losses = token_losses(Reading(reading.model, reading.encoded), torch.tensor(greedy))
    others = token_losses(reading, torch.tensor([(index + 1) % 96 for index in greedy]))
    assert losses[0] < others[0]
    assert len(losses) == len(greedy)


def test_unknown_and_repeated_methods_are_refused(model: ht.Llama) -> None:
    with pytest.raises(ValueError, match="'rag' is not known; choose from plain"):
        make_readers(("plain", "rag"), model, CONFIG)
    with pytest.raises(ValueError, match="named twice"):
        make_readers(("plain", "plain"), model, CONFIG)
