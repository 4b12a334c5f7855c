"""Choosing the ops, the device and the dtype; sharing a transformers model's weights."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import random_model, save_checkpoint

import homer_triton as ht
from homer_triton import kernels
from homer_triton.demo import CHECKPOINT
from homer_triton.kernels import reference
from homer_triton.loading import choose_ops, fingerprint_of

WITHOUT_TRITON = """
import sys
from pathlib import Path
sys.modules["triton"] = None  # importing it raises ImportError, as where it is not installed
import homer_triton as ht
from homer_triton.demo import CHECKPOINT
model = ht.load(CHECKPOINT, device="cpu")
print(len(ht.encode(model, "The sky is blue. " * 100)))
"""


def test_auto_is_triton_on_a_gpu_only() -> None:
    assert choose_ops("auto", torch.device("cpu")) is reference
    assert choose_ops("torch", torch.device("cuda")) is reference
    assert choose_ops("auto", torch.device("cuda")) is kernels
    assert choose_ops("triton", torch.device("cpu")) is kernels


@pytest.mark.parametrize("saved", ["float16", "bfloat16", "float32"])
def test_the_dtype_is_the_checkpoints_own_unless_said(tmp_path: Path, saved: str) -> None:
    save_checkpoint(tmp_path, dtype=getattr(torch, saved))
    assert ht.load(tmp_path, "cpu").dtype == getattr(torch, saved)
    assert ht.load(tmp_path, "cpu", "float32").dtype == torch.float32


def test_kernels_have_every_op_of_the_reference() -> None:
    for name in kernels.__all__:
        assert hasattr(kernels, name), name
        assert hasattr(reference, name), name
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = kernels.absent


@pytest.mark.process
def test_the_cpu_path_needs_no_triton() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert done.stdout.strip() == "127", done.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ops": "cuda"}, "ops='cuda' is not known"),
        ({"dtype": "int8"}, "dtype='int8' is not known"),
        ({"device": "toaster"}, "device='toaster' cannot be used"),
        ({"rope_scaling": {"rope_type": "magic"}}, "magic"),
    ],
)
def test_refuses_unknown_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ht.load(CHECKPOINT, **{"device": "cpu", **settings})


def test_a_shared_model_has_the_fingerprint_of_its_checkpoint() -> None:
    hf_model = random_model()
    first, second = (ht.from_transformers(hf_model, ops="torch") for _ in range(2))
    assert first.fingerprint == second.fingerprint
    stretched = ht.with_rope(first, {"rope_type": "linear", "factor": 2.0})
    assert stretched.fingerprint != first.fingerprint
    assert stretched.weights is first.weights


def test_the_fingerprint_is_the_same_in_every_float_type(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    dtypes = ("float32", "bfloat16", "float16")
    prints = {ht.load(tmp_path, device="cpu", dtype=dtype).fingerprint for dtype in dtypes}
    assert len(prints) == 1
    assert prints == {ht.from_transformers(random_model(), ops="torch").fingerprint}


@pytest.mark.parametrize("shape", ["llama-2", "llama-3.1", "llama-3.2"])
@pytest.mark.parametrize("shards", [False, True])
def test_a_fingerprint_needs_no_loading(tmp_path: Path, shape: str, shards: bool) -> None:
    save_checkpoint(tmp_path, shape, shards=shards)
    for scaling in (None, {"rope_type": "linear", "factor": 2.0}):
        loaded = ht.load(tmp_path, device="cpu", rope_scaling=scaling)
        assert fingerprint_of(tmp_path, scaling) == loaded.fingerprint


@pytest.mark.parametrize(
    "name", ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"]
)
def test_a_fine_tuned_matrix_changes_the_fingerprint(name: str) -> None:
    """Also where the model was asked for it before, and by a merged update of low rank."""
    hf_model = random_model()
    model = ht.from_transformers(hf_model, ops="torch")
    before = model.fingerprint
    weight = hf_model.model.layers[1].get_submodule(name).weight.data
    draw = torch.Generator().manual_seed(0)
    left, right = (
        torch.randn(weight.shape[0], 2, generator=draw),
        torch.randn(2, weight.shape[1], generator=draw),
    )
    weight += 0.05 * weight.std() * left @ right
    assert model.fingerprint != before
