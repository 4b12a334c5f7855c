"""A tiny random checkpoint with the demo model's tokenizer, for evaluations to run on."""

from pathlib import Path
from typing import Any

from checkpoints import save_checkpoint

from homer_triton.demo.tokenizer import build_tokenizer

LIMIT = 128
LAYERS = 6


def save_model(folder: Path, **settings: Any) -> Path:
    """Save it in `folder`; `settings` override its config."""
    tokenizer = build_tokenizer(LIMIT)
    save_checkpoint(
        folder,
        **{
            "num_hidden_layers": LAYERS,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": LIMIT,
            **settings,
        },
    )
    tokenizer.save_pretrained(folder)
    return folder
