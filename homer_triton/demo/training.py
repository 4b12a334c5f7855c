"""What the trainings of both shipped models have in common."""

import math
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import AttentionInterface, LlamaForCausalLM, PreTrainedTokenizerBase

ATTENTION = "float32_sdpa"


def _float32_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    # On a CPU the backward pass of bfloat16 attention takes three times as long as float32's.
    with torch.autocast("cpu", enabled=False):
        out = F.scaled_dot_product_attention(
            query.float(),
            key.float(),
            value.float(),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=True,
        )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _float32_sdpa)


def cosine_schedule(
    optimizer: torch.optim.Optimizer, steps: int, warmup_steps: int, final_share: float
) -> LambdaLR:
    """A learning rate that rises linearly, then falls on a cosine to `final_share` of its peak."""

    def share(step: int) -> float:
        cosine = (1 + math.cos(math.pi * min(1, step / steps))) / 2
        decayed = cosine + (1 - cosine) * final_share
        return min((step + 1) / warmup_steps, decayed)

    return LambdaLR(optimizer, share)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the checkpoint in float16; each file of `folder` is replaced whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        model.half().save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        for file in sorted(Path(scratch).iterdir()):
            file.replace(folder / file.name)
