"""Rotary position tables (RoPE, Su et al. 2021), with transformers' frequencies for every type."""

from typing import cast

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .config import ModelConfig


def rotary_tables(
    config: ModelConfig, length: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, times the attention scaling (1 except for yarn and
    longrope).

    Returns two [length, head_dim / 2] float32 tensors for positions 0 to length - 1. Dynamic NTK
    takes its base, and longrope its set of factors, from `length`, as transformers does in a
    forward pass over that many tokens. The families have the same code for this.
    Raises `ValueError` if `length` is below 1.
    """
    if length < 1:
        raise ValueError(f"length is {length} but the tables need at least one position.")
    rotary = LlamaRotaryEmbedding(cast(LlamaConfig, config.hf)).to(device)
    positions = torch.arange(length, device=device)[None]
    like = torch.empty(0, dtype=torch.float32, device=device)  # only its dtype and device are read
    cos, sin = rotary(like, positions)
    # Llama rotates pairs (i, i + head_dim / 2), so transformers' second half repeats the first.
    half = config.head_dim // 2
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
