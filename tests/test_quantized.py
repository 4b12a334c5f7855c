"""Matrices of fewer bits: the same as transformers' own quantised models, in every family."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import LAYERS, random_tokens
from checkpoints import FAMILIES, LIMIT, random_model, save_checkpoint
from command_line import checkpoint, run, text
from torch import Tensor
from transformers import PreTrainedModel

import homer_triton as ht
from homer_triton.kernels.products import linear
from homer_triton.model.errors import CheckpointError
from homer_triton.model.quantized import is_quantized, quantizer

pytest.importorskip("torchao")

TOKENS = torch.tensor(random_tokens(LIMIT))


def logits(model: ht.Llama) -> Tensor:
    return model.forward(TOKENS, model.new_cache(LIMIT), all_logits=True)


@pytest.mark.parametrize("family", ["llama-3.2", *FAMILIES])
def test_a_quantised_model_is_transformers_quantised_model(tmp_path: Path, family: str) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    hf_model = save_checkpoint(tmp_path, family)
    loaded = ht.load(tmp_path, "cpu", ops="torch", quantize="int8")
    quantize_(hf_model.model, Int8WeightOnlyConfig())
    shared = ht.from_transformers(hf_model, ops="torch")
    with torch.no_grad():
        expected = hf_model(TOKENS[None]).logits[0]
    for ours in (loaded, shared):
        torch.testing.assert_close(logits(ours), expected, rtol=0, atol=1e-4)
        assert all(is_quantized(w) for w in ours.weights.layers[-1].qkv)
        assert not is_quantized(ours.weights.embedding)
    assert loaded.fingerprint == shared.fingerprint
    plain = ht.load(tmp_path, "cpu", ops="torch")
    assert loaded.fingerprint != plain.fingerprint
    assert 0 < (logits(loaded) - logits(plain)).abs().mean() < 0.2 * logits(plain).std()


def test_transformers_own_way_of_loading_is_shared(tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    pytest.importorskip("accelerate")
    save_checkpoint(tmp_path)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    hf_model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    shared = ht.from_transformers(hf_model, ops="torch")
    loaded = ht.load(tmp_path, "cpu", ops="torch", quantize="int8")
    assert torch.equal(logits(shared), logits(loaded))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama-3", "phi3"])
def test_a_long_text_is_encoded_by_quantised_weights(
    tmp_path: Path, family: str, dtype: str
) -> None:
    save_checkpoint(tmp_path, family, num_hidden_layers=LAYERS)
    model = ht.load(tmp_path, "cpu", dtype, ops="torch", quantize="int8")
    encoded = ht.encode(model, random_tokens(300), random_tokens(2), random_tokens(5))
    prompt = encoded.token_ids[encoded.source_indices]
    again = model.forward(prompt, model.new_cache(len(prompt)))
    tolerance = 1e-4 if dtype == "float32" else 0.2
    torch.testing.assert_close(encoded.logits, again, rtol=0, atol=tolerance)
    assert ht.generate(model, encoded, max_new_tokens=1).token_ids == [int(encoded.logits.argmax())]


def test_an_op_adds_bias_and_residual_to_a_quantised_product() -> None:
    matrix, bias = torch.randn(48, 32), torch.randn(48)
    x, residual = torch.randn(2, 700, 32), torch.randn(2, 700, 48)
    small = quantizer("int8", "cpu")(matrix)
    expected = x @ small.dequantize().T + bias + residual
    found = linear(x, (small,), residual, (bias,))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_bytes_are_a_third_of_float32s() -> None:
    """Of the layers; a large vocabulary in bfloat16 adds to it."""
    matrix = torch.randn(512, 512)
    small = quantizer("int8", "cpu")(matrix)
    held = small.qdata.nbytes + small.scale.nbytes
    assert held <= 0.26 * matrix.nbytes


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("int3", "quantize='int3' is not known; choose one of int8, fp8."),
        ("fp8", "quantize='fp8' needs an NVIDIA GPU of compute capability 8.9 or more"),
    ],
)
def test_what_cannot_be_quantised_is_refused(tmp_path: Path, name: Any, sentence: str) -> None:
    folder = checkpoint(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        ht.load(folder, "cpu", quantize=name)
    file = tmp_path / "context.txt"
    file.write_text(text(40))
    words = ("generate", "--model", folder, "--context-file", file, "--device", "cpu")
    result = run(*words, "--quantize", name)
    assert result.exit_code == 2
    assert sentence in result.stderr


def test_without_torchao_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match=r"needs torchao: pip install 'homer_triton\[quantized\]'"):
        ht.load(tmp_path, "cpu", quantize="int8")


def test_quantised_checkpoints_and_other_methods_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    file = tmp_path / "config.json"
    described = file.read_text()
    for method in ("gptq", "torchao"):
        quantised = f', "quantization_config": {{"quant_method": "{method}"}}}}'
        file.write_text(described.rstrip().removesuffix("}") + quantised)
        sentence = rf"quantization_config is set, the weights are quantised \(by {method}\)"
        with pytest.raises(CheckpointError, match=sentence):
            ht.load(tmp_path, "cpu")
    other = random_model()
    other.config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(CheckpointError, match=r"quantised by awq, which is not supported"):
        ht.from_transformers(other)


def in_four_bits(hf_model: PreTrainedModel) -> PreTrainedModel:
    """The layers' matrices as bitsandbytes holds them, in place."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for layer in hf_model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, whole in list(part.named_children()):
                if isinstance(whole, torch.nn.Linear):
                    sizes = (whole.in_features, whole.out_features, whole.bias is not None)
                    small = bitsandbytes.nn.Linear4bit(*sizes, quant_type="nf4")
                    small.load_state_dict(whole.state_dict())
                    setattr(part, name, small.to("cpu"))
    hf_model.config.quantization_config = {"quant_method": "bitsandbytes"}
    return hf_model


@pytest.mark.parametrize("family", ["llama-3", "qwen2", "qwen3", "mistral"])
def test_four_bits_of_bitsandbytes_are_shared(family: str) -> None:
    hf_model = in_four_bits(random_model(family, num_hidden_layers=LAYERS))
    model = ht.from_transformers(hf_model, ops="torch")
    with torch.no_grad():
        expected = hf_model(TOKENS[None]).logits[0]
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    encoded = ht.encode(model, random_tokens(300), random_tokens(2), random_tokens(5))
    kept = encoded.kept_ids[None]
    answer = hf_model.generate(kept, max_new_tokens=5, do_sample=False)[0, kept.shape[1] :]
    assert ht.generate(model, encoded, max_new_tokens=5).token_ids == answer.tolist()
    other = in_four_bits(random_model(family, seed=1, num_hidden_layers=LAYERS))
    assert model.fingerprint != ht.from_transformers(other).fingerprint


def test_transformers_own_way_of_four_bits_is_shared(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    for package in ("bitsandbytes", "accelerate"):
        pytest.importorskip(package)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 4}
    save_checkpoint(tmp_path, dtype=torch.bfloat16, initializer_range=0.1, **sizes)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
    hf_model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, device_map="cpu", dtype=torch.bfloat16
    )
    model = ht.from_transformers(hf_model, ops="torch")
    with torch.no_grad():
        expected = hf_model(TOKENS[None]).logits[0].float()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0.3)


def test_fused_matrices_in_four_bits_and_eight_bits_are_refused() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    with pytest.raises(
        CheckpointError, match="cannot be cut where bitsandbytes holds it in 4 bits"
    ):
        ht.from_transformers(in_four_bits(random_model("phi3")))
    eight = random_model()
    attention = eight.model.layers[0].self_attn
    attention.q_proj = bitsandbytes.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    with pytest.raises(CheckpointError, match="in 8 bits by bitsandbytes, which is not supported"):
        ht.from_transformers(eight)
