"""Rotary position tables (RoPE, Su et al. 2021), with transformers' frequencies for every type."""

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .config import ModelConfig


def rotary_tables(
    config: ModelConfig, length: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, times the attention scaling (1 except for yarn and
    longrope).

    Returns two [length, head_dim / 2] float32 tensors for positions 0 to length - 1. Dynamic NTK
    takes its base, and longrope its set of factors, from `length`, as transformers does in a
    forward pass over that many tokens.
    Raises `ValueError` if `length` is below 1.
    """
    if length < 1:
        raise ValueError(f"length is {length} but the tables need at least one position.")
    scaling = config.hf.rope_parameters
    if scaling["rope_type"] == "default":
        pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
        frequencies, factor = 1.0 / scaling["rope_theta"] ** (pairs / config.head_dim), 1.0
    else:
        compute = ROPE_INIT_FUNCTIONS[scaling["rope_type"]]
        frequencies, factor = compute(config.hf, torch.device("cpu"), seq_len=length)
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = positions[:, None] * frequencies.to(device, torch.float32)
    return angles.cos() * factor, angles.sin() * factor
