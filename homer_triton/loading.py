"""`load` and `from_transformers`: models ready to encode and generate."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from . import kernels
from .kernels import reference
from .model.config import ModelConfig, load_config, read_json
from .model.errors import is_panic, shorten
from .model.fingerprint import stored_fingerprint
from .model.hub import resolve
from .model.llama import Llama
from .model.quantized import Quantize
from .model.weights import load_weights, share_weights

OpsName = Literal["auto", "triton", "torch"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(
    path_or_id: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    rope_scaling: Mapping[str, Any] | None = None,
    ops: OpsName = "auto",
    quantize: Quantize | None = None,
) -> Llama:
    """Load a checkpoint of a known family (`model.families`) from a folder or a hub id, with its
    tokenizer if it has one.

    device: "cuda" where there is a GPU and "cpu" elsewhere, when left out. dtype: "float32",
    "float16", "bfloat16", or "auto" for the checkpoint's own. rope_scaling: RoPE parameters in
    place of the checkpoint's, for example `{"rope_type": "yarn", "factor": 4.0}`. ops: "triton" or
    "torch"; "auto" is Triton on a GPU where it is installed, and PyTorch elsewhere. quantize: hold
    the layers' matrices as "int8" (anywhere) or "fp8" (on a GPU that multiplies it), by torchao.

    Raises `FileNotFoundError` or `ValueError` for a checkpoint that is missing, damaged or of
    another architecture, and `ValueError` for what cannot be quantised here.
    """
    target = _device(device)
    folder = resolve(path_or_id)
    config = load_config(folder, rope_scaling)
    if isinstance(dtype, str):
        dtype = config.dtype if dtype == "auto" else DTYPES.get(dtype, dtype)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype={dtype!r} is not known; choose auto, {', '.join(DTYPES)}.")
    module, tokenizer = choose_ops(ops, target), _tokenizer(folder)
    weights = load_weights(folder, config, target, dtype, quantize)
    return Llama(config, weights, module, tokenizer)


def from_transformers(
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ops: OpsName = "auto",
) -> Llama:
    """Wrap an already loaded transformers model of a known family; its weights are shared, not
    copied, and it stays usable. What torchao has quantised in it stays so, and what bitsandbytes
    holds in 4 bits.

    Raises `ValueError` for models of another class, ones that are quantised in another way, and
    ones spread over several devices.
    """
    weights = share_weights(hf_model)
    generation = hf_model.generation_config
    eos = None if generation is None else generation.eos_token_id
    config = ModelConfig.from_hf(hf_model.config, eos)
    return Llama(config, weights, choose_ops(ops, weights.embedding.device), tokenizer)


def with_rope(model: Llama, rope_scaling: Mapping[str, Any]) -> Llama:
    """The same weights under another RoPE; nothing is copied and `model` stays as it is.

    rope_scaling: as in `load`. Raises `ValueError` for parameters that give no tables.
    """
    return Llama(model.config.with_rope(rope_scaling), model.weights, model.ops, model.tokenizer)


def load_tokenizer(path_or_id: str | Path) -> PreTrainedTokenizerBase | None:
    """A checkpoint's tokenizer without its weights, or None if it has none.

    Raises `FileNotFoundError` or `ValueError` as `load` does.
    """
    return _tokenizer(resolve(path_or_id, weights=False))


def fingerprint_of(path_or_id: str | Path, rope_scaling: Mapping[str, Any] | None = None) -> str:
    """The fingerprint that a checkpoint's model has under these RoPE parameters, without loading
    it.

    Raises `FileNotFoundError` or `ValueError` as `load` does.
    """
    folder = resolve(path_or_id)
    return stored_fingerprint(load_config(folder, rope_scaling), folder)


def choose_ops(name: OpsName, device: torch.device) -> ModuleType:
    """The module that runs the ops: `kernels` (Triton) or `kernels.reference` (PyTorch)."""
    if name not in ("auto", "triton", "torch"):
        raise ValueError(f"ops={name!r} is not known; choose auto, triton or torch.")
    installed = find_spec("triton") is not None
    if name == "triton" and not installed:
        raise ValueError("ops='triton' needs the package triton; install it or use ops='torch'.")
    use_triton = name == "triton" or (name == "auto" and device.type == "cuda" and installed)
    return kernels if use_triton else reference


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={str(device)!r} cannot be used here: {reason}.") from error
    return target


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    if not any((folder / name).is_file() for name in names):
        return None
    _refuse_own_code(folder)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False
        )
        tokenizer("a word")  # some settings are first read when a text is
        return tokenizer
    except BaseException as error:  # of many kinds, for a damaged file
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        reason = shorten(" ".join(str(error).split()))
        raise ValueError(f"The tokenizer in {folder} cannot be read: {reason}.") from error


def _refuse_own_code(folder: Path) -> None:
    """Raise `ValueError` for a tokenizer that is a program of the checkpoint's: none is ever run,
    and what transformers would load in its place may read texts otherwise.
    """
    for name in ("tokenizer_config.json", "config.json"):
        asked = read_json(folder / name).get("auto_map") if (folder / name).is_file() else None
        if isinstance(asked, list) or (isinstance(asked, dict) and "AutoTokenizer" in asked):
            raise ValueError(
                f"The tokenizer in {folder} is code of its own (auto_map in {name}), which is "
                "never run; save the checkpoint with one of transformers' own tokenizers."
            )
