"""`load` and `from_transformers`: get a model that is ready to encode and generate."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from . import kernels
from .kernels import reference
from .model.config import ModelConfig, load_config, read_json
from .model.errors import is_panic, shorten
from .model.fingerprint import stored_fingerprint
from .model.hub import resolve
from .model.llama import Llama
from .model.quantized import Quantize
from .model.weights import load_weights, share_weights

if TYPE_CHECKING:  # its module takes seconds to import
    from transformers import PreTrainedModel

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
    """Load a checkpoint, with its tokenizer if it has one.

        model = ht.load("meta-llama/Llama-3.2-1B-Instruct", device="cuda", dtype="bfloat16")
        encoded = ht.encode(model, text, suffix="Who tells the story? It is told by")

    Supported models: Llama, Mistral, Qwen2, Qwen3, SmolLM3 and Phi-3
    (`homer_triton.model.families`). Weights are read from safetensors only, and code that a
    checkpoint brings along is never run.

    Args:
        path_or_id: A folder, or a Hugging Face hub id, which is downloaded unless cached.
        device: Such as "cuda", "cuda:1" or "cpu". Default: "cuda" if there is a GPU, else "cpu".
        dtype: "float32", "float16", "bfloat16", or "auto" for the checkpoint's own.
        rope_scaling: RoPE parameters that replace the checkpoint's, for example `{"rope_type":
            "yarn", "factor": 4.0}`.
        ops: What computes: "triton", "torch" (plain PyTorch, on any device), or "auto": Triton on a
            GPU if it is installed, else PyTorch.
        quantize: Hold the layers' matrices in a byte per number: "int8" (on any device) or "fp8"
            (on NVIDIA GPUs of compute capability 8.9 or more; not tested there yet). Needs torchao,
            `pip install 'homer_triton[quantized]'`. Default: no.

    Returns:
        The model.

    Raises:
        FileNotFoundError: There is no such checkpoint, or one of its files is missing.
        ValueError: The checkpoint is damaged or of another architecture, an argument is not known
            or cannot be used here, or torchao is missing.
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
    """Use a model that transformers has loaded. Its weights are shared, not copied.

        hf_model = AutoModelForCausalLM.from_pretrained(name)
        model = ht.from_transformers(hf_model, AutoTokenizer.from_pretrained(name))

    The transformers model stays usable. Weights quantised by torchao, or by bitsandbytes in 4 bits,
    stay quantised.

    Args:
        hf_model: A model of one of the families that `load` supports.
        tokenizer: Needed for text; without one, give token ids.
        ops: As in `load`.

    Returns:
        The model.

    Raises:
        ValueError: The model is of another class, quantised in another way, or spread over several
            devices or dtypes.
    """
    weights = share_weights(hf_model)
    generation = hf_model.generation_config
    eos = None if generation is None else generation.eos_token_id
    config = ModelConfig.from_hf(hf_model.config, eos)
    return Llama(config, weights, choose_ops(ops, weights.embedding.device), tokenizer)


def with_rope(model: Llama, rope_scaling: Mapping[str, Any]) -> Llama:
    """A model with the same weights and other RoPE parameters. Nothing is copied.

    `model` stays as it is. Models whose RoPE parameters differ have different fingerprints: neither
    takes the other's encodings.

    rope_scaling: as in `load`.

    Raises:
        ValueError: The parameters cannot be used.
    """
    return Llama(model.config.with_rope(rope_scaling), model.weights, model.ops, model.tokenizer)


def load_tokenizer(path_or_id: str | Path) -> PreTrainedTokenizerBase | None:
    """A checkpoint's tokenizer, or None if it has none. The weights are not loaded.

    Raises:
        FileNotFoundError: As in `load`.
        ValueError: As in `load`.
    """
    return _tokenizer(resolve(path_or_id, weights=False))


def fingerprint_of(path_or_id: str | Path, rope_scaling: Mapping[str, Any] | None = None) -> str:
    """The fingerprint that a checkpoint's model has with these RoPE parameters, without loading it.

    Raises:
        FileNotFoundError: As in `load`.
        ValueError: As in `load`.
    """
    folder = resolve(path_or_id)
    return stored_fingerprint(load_config(folder, rope_scaling), folder)


def choose_ops(name: OpsName, device: torch.device) -> ModuleType:
    """The module that runs the ops: `kernels` (Triton) or `kernels.reference` (PyTorch).

    Raises:
        ValueError: The name is not known, or Triton is not installed.
    """
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
        tokenizer("a word")  # some settings are not read before the first text
        return tokenizer
    except BaseException as error:  # a damaged file raises many kinds
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        reason = shorten(" ".join(str(error).split()))
        raise ValueError(f"The tokenizer in {folder} cannot be read: {reason}.") from error


def _refuse_own_code(folder: Path) -> None:
    """Raise `ValueError` if the checkpoint brings its own code for the tokenizer.

    Such code is never run, and the tokenizer that transformers would load instead may read texts
    differently.
    """
    for name in ("tokenizer_config.json", "config.json"):
        asked = read_json(folder / name).get("auto_map") if (folder / name).is_file() else None
        if isinstance(asked, list) or (isinstance(asked, dict) and "AutoTokenizer" in asked):
            raise ValueError(
                f"The tokenizer in {folder} is code of its own (auto_map in {name}), which is "
                "never run; save the checkpoint with one of transformers' own tokenizers."
            )
