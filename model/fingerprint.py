"""What tells two models apart: a hash of their sizes, their RoPE, and the signs of many weights.

A sign is the one thing that rounding to another float type leaves as it is, so that a model has the
same fingerprint in float32, bfloat16 and float16; training moves enough small weights across zero.
So does quantising, where small weights become zero: a quantised model is another one.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import map_tensors
from .config import ModelConfig
from .quantized import stored
from .weights import Weights, check_stored, named_weights

# Weights looked at in every tensor, spread over its rows and columns by steps that share no factor
# with a power of two or another usual size.
SAMPLES = 2048
ROW_STEP, COLUMN_STEP = 7919, 104_729


def fingerprint(config: ModelConfig, weights: Weights) -> str:
    """Sixteen hexadecimal digits, read from the weights anew at every call: some milliseconds."""
    return _fingerprint(config, named_weights(weights, config).values())


def stored_fingerprint(config: ModelConfig, folder: Path) -> str:
    """The fingerprint of the checkpoint in `folder`, whose weights are looked at and not loaded.

    Raises `MissingCheckpointError` and `CheckpointError` as `load_weights` does, but for values
    that are not finite.
    """
    return _fingerprint(config, map_tensors(check_stored(folder, config)))


def _fingerprint(config: ModelConfig, tensors: Iterable[Tensor]) -> str:
    """tensors: all weights, in the order of `named_weights`."""
    sizes = (
        *(config.num_hidden_layers, config.hidden_size, config.num_attention_heads),
        *(config.num_key_value_heads, config.head_dim, config.vocab_size),
    )
    rope = sorted((config.hf.rope_parameters or {}).items())
    digest = hashlib.sha256(repr((sizes, rope)).encode())
    places: dict[tuple[int, ...], tuple[Tensor, ...]] = {}
    signs = []
    for tensor in tensors:
        held = stored(tensor)
        shape = tuple(held.shape)
        if shape not in places:
            places[shape] = _places(shape, held.device)
        seen = held.detach()[places[shape]]
        # Of two 4-bit numbers in a byte, the first one's upper half.
        signs.append(seen > 127 if seen.dtype == torch.uint8 else seen.float().signbit())
    digest.update(torch.cat(signs).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _places(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Where to look in a tensor: an index for each of its dimensions."""
    numbers = torch.arange(min(SAMPLES, torch.Size(shape).numel()), device=device)
    rows, *columns = shape
    first = numbers * ROW_STEP % rows
    # Another column whenever the rows begin anew, or a square matrix would show its diagonal alone.
    return (first, *((numbers * COLUMN_STEP + numbers // rows) % size for size in columns))
