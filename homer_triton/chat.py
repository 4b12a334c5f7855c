"""What a chat template puts around a text, so that a model that chats reads it as the user's."""

from __future__ import annotations

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

# Stands for the user's text while the template is applied; no template has it in its own.
_TEXT = "⟦the user's text goes here⟧"


def chat_affixes(tokenizer: PreTrainedTokenizerBase, question: str = "") -> tuple[str, str]:
    """The prefix and the suffix that make a context and a question after it the user's turn, up to
    where the reply begins.

    The prefix holds the beginning-of-sequence token where the template has it. Raises `ValueError`
    for a tokenizer without a chat template, and for a template that does not take a plain user
    turn.
    """
    if not tokenizer.chat_template:
        raise ValueError("The tokenizer has no chat template.")
    try:
        turn = tokenizer.apply_chat_template(
            [{"role": "user", "content": _TEXT}], tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, ValueError) as error:
        raise ValueError(f"The chat template fails on a user turn ({error}).") from error
    pieces = str(turn).split(_TEXT)
    if len(pieces) != 2:
        raise ValueError("The chat template does not repeat the user's text just once.")
    opening, closing = pieces
    return opening, f"\n{question}{closing}" if question else closing
