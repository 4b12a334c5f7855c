"""What a chat template puts around a text, so that a chat model reads it as the user's message."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .model.errors import shorten
from .text.controls import Affix, words

# The name of the switch in templates.
_THINKING = "enable_thinking"


def chat_affixes(
    tokenizer: PreTrainedTokenizerBase,
    question: str = "",
    thinking: bool | None = None,
    history: Sequence[tuple[str, str]] = (),
) -> tuple[str, Affix]:
    """Make the prefix and suffix for `encode` from a chat template, for a model that chats.

    Together with the context they form the user's turn, up to where the reply begins:

        prefix, suffix = ht.chat_affixes(model.tokenizer, "Who tells the story?")
        encoded = ht.encode(model, text, prefix, suffix)

    Special tokens count in the template's parts. Those that the question spells are read as plain
    text.

    Args:
        tokenizer: A tokenizer with a chat template.
        question: What to ask about the context. It is placed after it.
        thinking: Whether the model thinks before it answers, for templates with such a switch
            (those of Qwen3 and SmolLM3). Default: the template decides.
        history: The questions so far and their answers. They stand between the context and the
            question, as the turns of one conversation.

    Returns:
        The prefix (with the beginning-of-sequence token where the template has it) and the suffix.

    Raises:
        ValueError: The tokenizer has no chat template, the template does not accept a single user
            turn, or `thinking` is given and the template has no such switch.
    """
    roles = ["user"] + ["assistant", "user"] * len(history)
    opening, *between = around(tokenizer, roles, thinking)
    said = [*(part for turn in history for part in turn), question]
    suffix = Affix("\n" if said[0] else "")
    for words_said, after in zip(said, between, strict=True):
        suffix = suffix + words(words_said) + after
    return opening, suffix


def next_turn(
    tokenizer: PreTrainedTokenizerBase, question: str, ended: bool, thinking: bool | None = None
) -> Affix:
    """What to append to a conversation for the user's next turn, up to where the next reply begins.

    ended: whether the model's reply already has its end token.

    Raises:
        ValueError: As in `chat_affixes`.
    """
    _, _, between, closing = around(tokenizer, ["user", "assistant", "user"], thinking)
    end = str(tokenizer.eos_token or "")
    if ended and end and between.startswith(end):
        between = between[len(end) :]
    return Affix(between) + words(question) + closing


def asks_whether_to_think(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template has a switch for thinking, as those of Qwen3 and SmolLM3 have."""
    return _THINKING in str(tokenizer.chat_template)


def around(
    tokenizer: PreTrainedTokenizerBase, roles: Sequence[str], thinking: bool | None = None
) -> list[str]:
    """What a template puts around messages of these roles, up to where the reply begins.

    Returns one text more than there are roles: before, between and after the messages.

    Raises:
        ValueError: As in `chat_affixes`; also if the template does not accept these messages.
    """
    if not tokenizer.chat_template:
        raise ValueError("The tokenizer has no chat template.")
    switches: dict[str, Any] = {} if thinking is None else {_THINKING: thinking}
    if switches and not asks_whether_to_think(tokenizer):
        raise ValueError("The chat template does not ask whether to think.")
    # Placeholders for the messages; no template contains such words itself.
    texts = [f"⟦message {index} goes here⟧" for index in range(len(roles))]
    messages = [{"role": role, "content": x} for role, x in zip(roles, texts, strict=True)]
    try:
        filled = str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **switches
            )
        )
    except Exception as error:  # a template is a program from the checkpoint
        turns = "a user turn" if set(roles) == {"user"} else f"these turns ({', '.join(roles)})"
        raise ValueError(f"The chat template fails on {turns} ({shorten(error)}).") from error
    any_text = re.compile("|".join(map(re.escape, texts)))
    if any_text.findall(filled) != texts:
        raise ValueError("The chat template does not repeat the user's text just once.")
    return any_text.split(filled)
