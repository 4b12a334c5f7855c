"""Loading the model and encoding a text, on one process or on several ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .inputs import note_long_chunks
from .output import at_terminal
from .ranks import is_first, joined

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .. import EncodedContext, HomerConfig, Llama
    from ..ranks import Ranks
    from .inputs import Parts
    from .options import Checkpoint


@contextmanager
def opened(
    checkpoint: Checkpoint, config: HomerConfig
) -> Iterator[tuple[Llama, PreTrainedTokenizerBase, Ranks | None]]:
    """A checkpoint's model and tokenizer, and this process's ranks (None if it is alone).

    Prints a note if chunks are longer than the context limit. Raises the errors of `open_model`.
    """
    with joined(checkpoint.device) as ranks:
        model, tokenizer = checkpoint.open()
        if is_first():
            note_long_chunks(config, model.config)
        yield model, tokenizer, ranks


def read(
    model: Llama,
    text: str,
    parts: Parts,
    config: HomerConfig,
    special_tokens: bool = False,
    ranks: Ranks | None = None,
) -> EncodedContext | None:
    """A text's encoding, with a progress bar at a terminal; None if another rank has it."""
    from .. import encode

    return encode(
        model,
        text,
        parts.prefix,
        parts.suffix,
        config,
        progress=at_terminal(),
        special_tokens=special_tokens,
        ranks=ranks,
    )
