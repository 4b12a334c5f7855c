"""Weights: what lands where, how much memory loading takes, what is refused."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import (
    LIMIT,
    SHAPES,
    TIED,
    edit_json,
    edit_tensors,
    matrices,
    random_model,
    save_checkpoint,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForSequenceClassification

from homer_triton.model.config import load_config
from homer_triton.model.errors import CheckpointError
from homer_triton.model.weights import Weights, load_weights, share_weights

INDEX = "model.safetensors.index.json"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Weights:
    return load_weights(folder, load_config(folder), "cpu", dtype)


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_tensor_lands_in_its_place(tmp_path: Path, shape: str, shards: bool) -> None:
    model = save_checkpoint(tmp_path, shape, shards=shards)
    assert (tmp_path / INDEX).exists() == shards
    weights = load(tmp_path)
    assert torch.equal(weights.embedding, model.model.embed_tokens.weight)
    assert torch.equal(weights.norm, model.model.norm.weight)
    assert torch.equal(weights.lm_head, model.lm_head.weight)
    assert (weights.lm_head is weights.embedding) == (shape in TIED)
    assert len(weights.layers) == len(model.model.layers)
    for loaded, theirs in zip(weights.layers, model.model.layers, strict=True):
        attention, mlp = theirs.self_attn, theirs.mlp
        q, k, v, gate, up = matrices(theirs)
        assert torch.equal(loaded.input_norm, theirs.input_layernorm.weight)
        assert torch.equal(loaded.qkv[0], torch.cat([q, k, v]))
        assert torch.equal(loaded.q[0], q)
        assert torch.equal(loaded.kv[0], torch.cat([k, v]))
        assert torch.equal(loaded.output, attention.o_proj.weight)
        assert torch.equal(loaded.post_norm, theirs.post_attention_layernorm.weight)
        assert torch.equal(loaded.gate_up[0], torch.cat([gate, up]))
        assert torch.equal(loaded.down, mlp.down_proj.weight)
        if loaded.qkv_bias:
            biases = (attention.q_proj.bias, attention.k_proj.bias, attention.v_proj.bias)
            assert torch.equal(loaded.qkv_bias[0], torch.cat(biases))
            assert torch.equal(torch.cat([loaded.q_bias[0], loaded.kv_bias[0]]), torch.cat(biases))
        for ours, name in ((loaded.q_norm, "q_norm"), (loaded.k_norm, "k_norm")):
            assert (ours is None) == (not hasattr(attention, name))
            assert ours is None or torch.equal(ours, getattr(attention, name).weight)
        assert loaded.q[0].data_ptr() == loaded.qkv[0].data_ptr()
        assert {len(t) for t in (loaded.qkv, loaded.q, loaded.kv, loaded.gate_up)} == {1}


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_are_converted(tmp_path: Path, stored: torch.dtype, target: torch.dtype) -> None:
    model = save_checkpoint(tmp_path, dtype=stored)
    weights = load(tmp_path, target)
    assert weights.embedding.dtype == weights.layers[0].qkv[0].dtype == target
    assert torch.equal(weights.embedding, model.model.embed_tokens.weight.to(target))
    assert torch.equal(
        weights.layers[1].down, model.model.layers[1].mlp.down_proj.weight.to(target)
    )


def test_harmless_extra_tensors_are_ignored(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama-3.2")
    edit_tensors(
        tmp_path,
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8),
        lm_head__weight=torch.zeros(96, 64),
    )
    weights = load(tmp_path)
    assert weights.lm_head is weights.embedding
    assert weights.embedding.any()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model__norm__weight": None}, "lacks model.norm.weight"),
        ({"lm_head__weight": None}, "lacks lm_head.weight"),
        ({"model__layers__3__mlp__up_proj__weight": torch.ones(2, 2)}, "has model.layers.3.mlp"),
        ({"model__layers__0__self_attn__q_proj__bias": torch.ones(64)}, "q_proj.bias, which no"),
        (
            {"model__norm__weight": torch.ones(63)},
            "norm.weight of shape [63], but its config calls",
        ),
        (
            {"lm_head__weight": torch.ones(64, 96)},
            "of shape [64, 96], but its config calls for [96",
        ),
        ({"model__norm__weight": torch.ones(64, dtype=torch.int8)}, "norm.weight in"),
        ({"model__norm__weight": torch.ones(64, dtype=torch.int8)}, "is of type I8"),
        ({"model__norm__weight": torch.full((64,), torch.nan)}, "norm.weight in"),
        ({"model__norm__weight": torch.tensor([torch.inf] + [0.0] * 63)}, "NaN or infinity"),
        ({"model__norm__weight": torch.tensor([-torch.inf] + [0.0] * 63)}, "NaN or infinity"),
        ({"lm_head__weight": torch.ones(96, 64).index_fill_(0, torch.tensor(9), torch.nan)}, "NaN"),
    ],
)
def test_wrong_tensors_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Tensor | None], sentence: str
) -> None:
    save_checkpoint(tmp_path)
    edit_tensors(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=re.escape(sentence)):
        load(tmp_path)


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    edit_json(tmp_path / "config.json", lambda content: content | {"num_hidden_layers": 4})
    with pytest.raises(CheckpointError, match=r"input_layernorm\.weight, .* and 6 more, which"):
        load(tmp_path)


def test_an_impossible_size_is_refused_before_memory_is_allocated(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    edit_json(tmp_path / "config.json", lambda content: content | {"vocab_size": 10**12})
    with pytest.raises(CheckpointError, match=r"config calls for \[1000000000000, 64\]"):
        load(tmp_path)


def test_an_integer_dtype_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"torch\.int8"):
        load(tmp_path, torch.int8)


PEAK = """
import sys
from pathlib import Path
import torch
from homer_triton.model.config import load_config
from homer_triton.model.weights import load_weights

def kilobytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

folder = Path(sys.argv[1])
config = load_config(folder)
before = kilobytes("VmRSS")
weights = load_weights(folder, config, "cpu", config.dtype)
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.process
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("shape", ["qwen2", "phi3"])  # matrices to fuse, and fused ones
def test_loading_takes_hardly_more_memory_than_the_checkpoint(tmp_path: Path, shape: str) -> None:
    # A large vocabulary: the embedding alone is a third of the checkpoint.
    with torch.device("meta"):
        model = random_model(
            shape,
            dtype=torch.bfloat16,
            vocab_size=50_000,
            hidden_size=1024,
            intermediate_size=6000,
            num_hidden_layers=3,
            head_dim=256,
            tie_word_embeddings=False,
        )
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    parameters = model.named_parameters()
    save_file({name: torch.zeros_like(p, device="cpu") for name, p in parameters}, file)
    assert file.stat().st_size > 300e6
    peak = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        check=True,
        capture_output=True,
        text=True,
    )
    print("peak of loading / checkpoint:", ratio := int(peak.stdout) * 1024 / file.stat().st_size)
    assert 1.0 <= ratio <= 1.15


def addresses(weights: Weights) -> list[int]:
    tensors = [weights.embedding, weights.norm, weights.lm_head]
    for layer in weights.layers:
        tensors += [layer.input_norm, *layer.qkv, layer.output, layer.post_norm]
        tensors += [*layer.gate_up, layer.down, *layer.qkv_bias]
        tensors += [norm for norm in (layer.q_norm, layer.k_norm) if norm is not None]
    return [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("shape", SHAPES)
def test_sharing_copies_nothing_and_changes_nothing(shape: str) -> None:
    model = random_model(shape, torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = share_weights(model)
    tied = shape in TIED
    assert (weights.lm_head is weights.embedding) == tied
    ours = addresses(weights)
    theirs = [p.data_ptr() for p in model.parameters()]
    assert len(ours) == len(theirs) + tied
    assert set(ours) == set(theirs)
    assert not any(t.requires_grad for t in (weights.norm, *weights.layers[0].qkv))
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("shape", SHAPES)
def test_shared_and_loaded_weights_agree(tmp_path: Path, shape: str) -> None:
    shared = share_weights(save_checkpoint(tmp_path, shape))
    loaded = load(tmp_path)
    for ours, theirs in zip(shared.layers, loaded.layers, strict=True):
        for name in ("input_norm", "output", "post_norm", "down"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
        for name in ("qkv", "q", "kv", "gate_up"):
            assert torch.equal(torch.cat(getattr(ours, name)), *getattr(theirs, name))


def test_models_that_cannot_be_shared_are_refused() -> None:
    with torch.device("meta"):
        on_meta = random_model()
    with pytest.raises(CheckpointError, match="meta device"):
        share_weights(on_meta)

    mixed = random_model()
    mixed.model.norm.to(torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"torch\.bfloat16, torch\.float32"):
        share_weights(mixed)

    split = random_model()
    split.lm_head.to("meta")
    with pytest.raises(CheckpointError, match="spread over cpu, meta"):
        share_weights(split)

    adapted = random_model()
    adapted.model.layers[0].mlp.up_proj.adapter = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(CheckpointError, match=r"up_proj\.adapter\.weight, which no such model"):
        share_weights(adapted)

    quantised = random_model()
    quantised.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(CheckpointError, match="quantised"):
        share_weights(quantised)

    other = LlamaForSequenceClassification(random_model().config)
    with pytest.raises(CheckpointError, match="LlamaForSequenceClassification"):
        share_weights(other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_weights_load_onto_a_gpu(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path, "llama-3.2", shards=True, max_position_embeddings=LIMIT)
    weights = load_weights(tmp_path, load_config(tmp_path), "cuda", torch.bfloat16)
    assert weights.embedding.is_cuda
    expected = model.model.layers[0].mlp.down_proj.weight.to("cuda", torch.bfloat16)
    assert torch.equal(weights.layers[0].down, expected)
