"""Messages laid out as the text that a model goes on from.

In a chat template, where the tokenizer has one; otherwise as `homer chat` does it: one message
after the other, a line break before every question but the first, and one behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..chat import around
from ..text.controls import Affix, words


@dataclass(frozen=True)
class Message:
    """What somebody said; role: "system", "user" or "assistant"."""

    role: str
    text: str


@dataclass(frozen=True)
class Layout:
    """How a tokenizer's conversations are laid out. thinking: as `chat_affixes` takes it."""

    tokenizer: PreTrainedTokenizerBase
    templated: bool
    thinking: bool | None = None

    def cut(self, messages: Sequence[Message]) -> tuple[Affix, Affix, Affix]:
        """A conversation as three texts, which follow each other: up to the end of the first
        system message, the turns, and the last message with what makes the model reply.

        Raises `ValueError` as `around` does.
        """
        between = self._between(messages)
        said = [words(message.text) for message in messages]
        first = 1 if messages[0].role == "system" and len(messages) > 1 else 0
        head = _join(between[:first], said[:first]) + between[first]
        middle = _join(said[first:-1], between[first + 1 : -1])
        return head, middle, said[-1] + between[-1]

    def about_text(self, messages: Sequence[Message]) -> tuple[Affix, Affix, Affix]:
        """A conversation about a text, which stands before the first question: what comes before
        the text, what behind it up to the first reply, and all that has been said since then.

        Raises `ValueError` as `around` does.
        """
        first = [message.role for message in messages].index("user")
        opening = messages[: first + 1]
        between = self._between(opening)
        said = [words(message.text) for message in opening]
        prefix = _join(between[:first], said[:first]) + between[first]
        suffix = "\n" + said[-1] + between[-1]
        later = messages[first + 1 :]
        since = self._between(messages)[first + 2 :] if later else []
        return prefix, suffix, _join([words(message.text) for message in later], since)

    def after_text(self, messages: Sequence[Message]) -> Affix:
        """A conversation as it is asked of a text that was read before for no question: all that
        comes behind the text.
        """
        _, suffix, since = self.about_text(messages)
        return _without(suffix, messages) + since

    def bare(self) -> Affix:
        """What stands before a text of which nothing has been asked yet."""
        return Affix(around(self.tokenizer, ["user"], self.thinking)[0] if self.templated else "")

    def _between(self, messages: Sequence[Message]) -> list[str]:
        """What stands around the messages: as many texts, and one more."""
        roles = [message.role for message in messages]
        if self.templated:
            return around(self.tokenizer, roles, self.thinking)
        texts = [""]
        for index, role in enumerate(roles):
            is_first = "user" not in roles[:index]
            after = "\n" if role == "system" or (role == "user" and not is_first) else ""
            if role == "assistant" and "user" in roles[index + 1 :]:
                after = "\n"
            texts.append(after)
        return texts


def _join(firsts: Sequence[str], seconds: Sequence[str]) -> Affix:
    """first ‖ second ‖ first ‖ second …"""
    whole = Affix("")
    for first, second in zip(firsts, seconds, strict=True):
        whole = whole + first + second
    return whole


def _without(suffix: Affix, messages: Sequence[Message]) -> Affix:
    """The suffix, with what a system message says before the question: the text was read without
    one.
    """
    system = [words(message.text) for message in messages[:1] if message.role == "system"]
    return "\n" + system[0] + suffix if system else suffix
