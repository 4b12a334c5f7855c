"""The whole encoding through the Triton ops equals the one through PyTorch's, on the shipped
checkpoint: in the interpreter, or compiled where there is a GPU.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import homer_triton as ht
from homer_triton import kernels
from homer_triton.demo import CHECKPOINT
from homer_triton.evaluation.passkey import make_sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load(ops: str, dtype: str = "float32", layers: int | None = None) -> ht.Llama:
    """The shipped model, or its first layers."""
    model = ht.load(CHECKPOINT, DEVICE, dtype, ops=ops)
    config = replace(model.config, num_hidden_layers=layers or model.config.num_hidden_layers)
    weights = replace(model.weights, layers=model.weights.layers[:layers])
    return ht.Llama(config, weights, model.ops, model.tokenizer)


def text_and_question(model: ht.Llama, tokens: int) -> tuple[str, str, str]:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    sample = make_sample(tokens, 0.4, 5, lambda text: len(tokenizer.tokenize(text)))
    return sample.context, sample.prompt, sample.answer


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("selection", "recompute", "leaf_batch"),
    [("paper", "suffix", 2), ("votes,layers=last", "none", 1), ("votes,window=5", "all", 1)],
)
def test_triton_encodes_as_pytorch_does(selection: str, recompute: str, leaf_batch: int) -> None:
    layers = None if DEVICE == "cuda" else 4  # the interpreter takes a second a layer
    ours, definition = load("triton", layers=layers), load("torch", layers=layers)
    assert ours.ops is kernels
    context, question, answer = text_and_question(ours, 190)
    config = ht.HomerConfig(
        layers_warmup=1,
        selection=selection,
        recompute=recompute,
        leaf_batch=leaf_batch,
        max_chunk_len=64,
    )
    got, want = (ht.encode(m, context, suffix=question, config=config) for m in (ours, definition))
    assert got.plan.height == 2
    assert got.source_indices.tolist() == want.source_indices.tolist()
    assert got.positions.tolist() == want.positions.tolist()
    assert torch.equal(got.pruned_at, want.pruned_at)
    for name in ("keys", "values", "logits"):
        torch.testing.assert_close(
            getattr(got, name), getattr(want, name), atol=2e-3, rtol=2e-3, msg=name
        )
    if layers is None and selection == "paper":  # the others need longer chunks to answer from
        assert answer in ht.generate(ours, got, max_new_tokens=6).text.replace(" ", "")


@pytest.mark.gpu
def test_what_was_loaded_on_the_cpu_goes_on_on_the_gpu(tmp_path: Path) -> None:
    model = load("triton")
    encoded = ht.encode(model, "The sky is blue. " * 60, config=ht.HomerConfig(layers_warmup=1))
    encoded.save(tmp_path / "kept.safetensors")
    loaded = ht.EncodedContext.load(tmp_path / "kept.safetensors")
    assert loaded.logits.device.type == "cpu"
    assert encoded.token_ids[encoded.source_indices].device.type == "cuda"
    for settings in ({}, {"temperature": 0.7, "seed": 1}):
        texts = {ht.generate(model, x, None, 5, **settings).text for x in (encoded, loaded)}
        assert len(texts) == 1


@pytest.mark.gpu
def test_the_same_input_gives_the_same_bits_twice() -> None:
    model = load("triton")
    context, question, _ = text_and_question(model, 2048)
    config = ht.HomerConfig(layers_warmup=1)
    first, second = (ht.encode(model, context, suffix=question, config=config) for _ in range(2))
    for name in ("keys", "values", "logits", "source_indices"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_answers_on_a_gpu(dtype: str) -> None:
    model = load("triton", dtype)
    context, question, answer = text_and_question(model, 2048)
    config = ht.HomerConfig.paper(layers_warmup=1, recompute="suffix", leaf_batch=4)
    encoded = ht.encode(model, context, suffix=question, config=config)
    again = ht.encode(model, context, suffix=question, config=replace(config, leaf_batch=1))
    assert answer in ht.generate(model, encoded, max_new_tokens=6).text.replace(" ", "")
    assert answer in ht.generate(model, again, max_new_tokens=6).text.replace(" ", "")
