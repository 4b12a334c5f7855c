"""What a chat template puts around a text, so that a model that chats reads it as the user's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .model.errors import shorten
from .text.controls import Affix, words

# What templates call the switch.
_THINKING = "enable_thinking"


def chat_affixes(
    tokenizer: PreTrainedTokenizerBase, question: str = "", thinking: bool | None = None
) -> tuple[str, Affix]:
    """The prefix and the suffix that make a context and a question after it the user's turn, up to
    where the reply begins.

    The prefix holds the beginning-of-sequence token where the template has it. Control tokens count
    in what is the template's; those that the question spells do not. thinking: whether the model
    thinks before it answers, for a template that asks (Qwen3's, SmolLM3's); its own choice if left
    out. Raises `ValueError` for a tokenizer without a chat template, for a template that does not
    take a plain user turn, and for one that does not ask about thinking.
    """
    opening, closing = around(tokenizer, ["user"], thinking)
    return opening, "\n" + words(question) + closing if question else Affix(closing)


def next_turn(
    tokenizer: PreTrainedTokenizerBase, question: str, ended: bool, thinking: bool | None = None
) -> Affix:
    """What to append to a conversation for the user's next turn, from the end of the model's reply
    to where the next one begins.

    ended: whether the reply has its end token already. Raises as `chat_affixes` does.
    """
    _, _, between, closing = around(tokenizer, ["user", "assistant", "user"], thinking)
    end = str(tokenizer.eos_token or "")
    if ended and end and between.startswith(end):
        between = between[len(end) :]
    return Affix(between) + words(question) + closing


def around(
    tokenizer: PreTrainedTokenizerBase, roles: Sequence[str], thinking: bool | None = None
) -> list[str]:
    """What a template puts around messages of these roles, up to where the reply begins: as many
    texts, and one more.

    Raises `ValueError` as `chat_affixes` does, for a template that does not take such messages too.
    """
    if not tokenizer.chat_template:
        raise ValueError("The tokenizer has no chat template.")
    switches: dict[str, Any] = {} if thinking is None else {_THINKING: thinking}
    if switches and _THINKING not in str(tokenizer.chat_template):
        raise ValueError("The chat template does not ask whether to think.")
    # Stand for the messages; no template has such words of its own.
    texts = [f"⟦message {index} goes here⟧" for index in range(len(roles))]
    messages = [{"role": role, "content": x} for role, x in zip(roles, texts, strict=True)]
    try:
        filled = str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **switches
            )
        )
    except Exception as error:  # a template is a program of the checkpoint's
        turns = "a user turn" if set(roles) == {"user"} else f"these turns ({', '.join(roles)})"
        raise ValueError(f"The chat template fails on {turns} ({shorten(error)}).") from error
    any_text = re.compile("|".join(map(re.escape, texts)))
    if any_text.findall(filled) != texts:
        raise ValueError("The chat template does not repeat the user's text just once.")
    return any_text.split(filled)
