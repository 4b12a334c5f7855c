"""Answers in OpenAI's shapes, whole or in chunks."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from .stops import Stops


@dataclass
class Choice:
    """An answer as far as it has come. finish: why it ended, None before; logprobs: of its tokens,
    by their texts, where they are wanted.
    """

    stops: Stops
    text: str = ""
    tokens: int = 0
    finish: str | None = None
    logprobs: list[tuple[str, float]] | None = None


@dataclass
class Usage:
    """What a request took. cached: tokens of it that had been read before."""

    prompt: int = 0
    cached: int = 0

    def told(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """In OpenAI's words."""
        new = sum(choice.tokens for choice in choices)
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": new,
            "total_tokens": self.prompt + new,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass
class Reply:
    """What is sent back to a request. document: what it says of the text that was asked."""

    model: str
    fingerprint: str
    is_chat: bool
    id: str = field(init=False)
    created: int = field(init=False)
    document: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid4().hex}"
        self.created = int(time.time())

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """All answers at once."""
        told = []
        for index, choice in enumerate(choices):
            said: dict[str, Any] = {"text": choice.text}
            if self.is_chat:
                said = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
            ended = {"logprobs": self._logprobs(choice), "finish_reason": choice.finish}
            told.append({"index": index, **said, **ended})
        return {**self._frame(""), "choices": told, "usage": usage.told(choices)}

    def chunk(self, index: int, text: str | None, choice: Choice, with_usage: bool) -> str:
        """A piece of an answer, None for its very beginning; an ended one with how it ended."""
        said: dict[str, Any] = {"text": text or ""}
        if self.is_chat:
            delta: dict[str, Any] = {} if choice.finish and not text else {"content": text}
            if text is None:
                delta = {"role": "assistant", "content": ""}
            said = {"delta": delta}
        logprobs = self._logprobs(choice) if choice.finish else None
        ended = {"logprobs": logprobs, "finish_reason": choice.finish}
        told = {**self._frame(".chunk"), "choices": [{"index": index, **said, **ended}]}
        return sent({**told, "usage": None} if with_usage else told)

    def last(self, choices: Sequence[Choice], usage: Usage) -> str:
        """The chunk that only tells the usage."""
        return sent({**self._frame(".chunk"), "choices": [], "usage": usage.told(choices)})

    def _frame(self, part: str) -> dict[str, Any]:
        kind = f"chat.completion{part}" if self.is_chat else "text_completion"
        frame = {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }
        return frame if self.document is None else {**frame, "document": self.document}

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        if choice.logprobs is None:
            return None
        if self.is_chat:
            content = [
                {
                    "token": token,
                    "logprob": number,
                    "bytes": list(token.encode()),
                    "top_logprobs": [],
                }
                for token, number in choice.logprobs
            ]
            return {"content": content, "refusal": None}
        tokens = [token for token, _ in choice.logprobs]
        return {
            "tokens": tokens,
            "token_logprobs": [number for _, number in choice.logprobs],
            "top_logprobs": None,
            "text_offset": [sum(map(len, tokens[:index])) for index in range(len(tokens))],
        }


def sent(told: dict[str, Any]) -> str:
    """A server-sent event. Some clients take U+2028 and U+2029 for the end of a line."""
    data = json.dumps(told, ensure_ascii=False, allow_nan=False)
    data = data.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return f"data: {data}\n\n"


def remark(told: dict[str, Any]) -> str:
    """A comment between events, which OpenAI's clients pass over."""
    return f": {json.dumps(told)}\n\n"


DONE = "data: [DONE]\n\n"
