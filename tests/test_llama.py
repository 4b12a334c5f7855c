"""The whole model against transformers', on tiny random models of every shape and RoPE type."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import LIMIT, ROPES, SHAPES, random_model, save_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import homer_triton as ht
from homer_triton.kernels import reference
from homer_triton.kernels.checks import checked_by

NEW_TOKENS = 20
DTYPES = ["float16", "bfloat16"]


def tokens(length: int) -> Tensor:
    """Random token ids [length]."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, 96, (length,), generator=generator)


def our_logits(model: ht.Llama, token_ids: Tensor) -> Tensor:
    """Logits [T, V] of all tokens [T] in one forward pass."""
    cache = model.new_cache(len(token_ids))
    return model.forward(token_ids, cache, all_logits=True)


def their_logits(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(token_ids[None]).logits[0]


def our_greedy(model: ht.Llama, token_ids: Tensor) -> list[int]:
    """NEW_TOKENS greedy tokens after the prompt, one forward pass each over the cache."""
    cache = model.new_cache(len(token_ids) + NEW_TOKENS)
    filled, answer = 0, []
    for _ in range(NEW_TOKENS):
        logits = model.forward(token_ids, cache, filled)
        filled += len(token_ids)
        token_ids = logits.argmax(keepdim=True)
        answer.append(int(token_ids))
    return answer


def their_greedy(model: PreTrainedModel, token_ids: Tensor) -> list[int]:
    answer = model.generate(
        token_ids[None], max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1
    )
    return answer[0, len(token_ids) :].tolist()


def assert_parity(ours: ht.Llama, theirs: PreTrainedModel, length: int) -> None:
    token_ids = tokens(length)
    expected = their_logits(theirs, token_ids)
    assert expected.std() > 1  # logits near zero would agree whatever the layers do
    torch.testing.assert_close(our_logits(ours, token_ids), expected, rtol=0, atol=1e-4)
    assert our_greedy(ours, token_ids) == their_greedy(theirs, token_ids)


@pytest.mark.slow
@pytest.mark.parametrize("old_style", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_loaded_model_is_transformers_model(tmp_path: Path, shape: str, old_style: bool) -> None:
    theirs = save_checkpoint(tmp_path, shape, shards=old_style, old_style=old_style)
    assert_parity(ht.load(tmp_path, device="cpu", ops="torch"), theirs, LIMIT // 2)


@pytest.mark.slow
@pytest.mark.parametrize("old_style", [False, True])
@pytest.mark.parametrize("length", [LIMIT // 2, 3 * LIMIT])
@pytest.mark.parametrize("rope", ROPES)
def test_every_rope_type_within_and_beyond_the_limit(
    tmp_path: Path, rope: str, length: int, old_style: bool
) -> None:
    parameters = {"rope_theta": 10000.0, **ROPES[rope]}
    theirs = save_checkpoint(tmp_path, old_style=old_style, rope_parameters=parameters)
    assert_parity(ht.load(tmp_path, device="cpu", ops="torch"), theirs, length)


def test_a_rope_override_is_transformers_override(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama-2")
    scaling = {"rope_type": "yarn", "factor": 4.0}
    ours = ht.load(tmp_path, device="cpu", ops="torch", rope_scaling=scaling)
    rope = {"rope_theta": 10000.0, "original_max_position_embeddings": LIMIT, **scaling}
    assert_parity(ours, random_model("llama-2", rope_parameters=rope), 3 * LIMIT)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_shared_model_is_transformers_model(shape: str) -> None:
    theirs = random_model(shape)
    assert_parity(ht.from_transformers(theirs, ops="torch"), theirs, LIMIT // 2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_half_precision_is_as_exact_as_transformers(tmp_path: Path, shape: str, dtype: str) -> None:
    save_checkpoint(tmp_path, shape, dtype=getattr(torch, dtype))
    ours = ht.load(tmp_path, device="cpu", dtype=dtype, ops="torch")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=ours.dtype)
    token_ids = tokens(LIMIT)
    exact = their_logits(
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), token_ids
    )
    our_error = (our_logits(ours, token_ids) - exact).abs()
    their_error = (their_logits(theirs, token_ids).float() - exact).abs()
    assert our_error.max() <= 2 * their_error.max()
    assert our_error.mean() <= 2 * their_error.mean()


def test_a_checkpoint_in_another_dtype(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, dtype=torch.bfloat16)
    ours = ht.load(tmp_path, device="cpu", dtype="float32", ops="torch")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_parity(ours, theirs, LIMIT // 2)


def test_chunked_prefill_is_one_prefill() -> None:
    model = ht.from_transformers(random_model(), ops="torch")
    token_ids = tokens(50)
    cache = model.new_cache(50)
    parts = [
        model.forward(token_ids[start:end], cache, start, all_logits=True)
        for start, end in ((0, 1), (1, 30), (30, 50))
    ]
    # Rows are multiplied in one way when they are few and in another when they are many.
    torch.testing.assert_close(torch.cat(parts), our_logits(model, token_ids), rtol=0, atol=2e-5)


def test_arguments_are_checked_in_a_runs_first_layer() -> None:
    """In the others they are alike."""
    model = ht.from_transformers(random_model(num_hidden_layers=4), ops="torch")
    called: list[str] = []
    layer = ["rms_norm", "linear", "rotary_and_store_", "causal_attention", "linear"]
    layer += ["rms_norm", "gated_linear", "add_linear_"]

    def record(name: str) -> Callable[..., Any]:
        @checked_by(lambda *_, **settings: called.append(name))
        def op(*args: Any, **settings: Any) -> Any:
            return getattr(reference, name)(*args, **settings)

        return op

    ops: Any = SimpleNamespace(**{**vars(reference), **{name: record(name) for name in layer}})
    logits = our_logits(ht.Llama(model.config, model.weights, ops), tokens(9))
    assert torch.equal(logits, our_logits(model, tokens(9)))
    assert called == [*layer, "rms_norm", "linear"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's layout")
def test_a_growing_cache_has_each_heads_rows_together() -> None:
    model = ht.from_transformers(random_model(), ops="torch")
    plain, growing = model.new_cache(7), model.new_cache(7, to_grow=True)
    assert growing.shape == plain.shape
    assert growing[0, 0, :, 0].is_contiguous()
    assert not plain[0, 0, :, 0].is_contiguous()
    token_ids = tokens(7)
    for cache in (plain, growing):
        model.forward(token_ids, cache)
    assert torch.equal(growing, plain)
