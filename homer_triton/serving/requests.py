"""What clients send, in OpenAI's shapes; fields that are not known are let pass, as others do it.

Fields that would change an answer, and that this server does not have, are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..checks import SEEDS
from ..decoding import Decoding
from .conversation import Message
from .errors import ApiError

# Prompts in one request, texts that end an answer, and messages in a conversation.
_MOST_PROMPTS, _MOST_STOPS, _MOST_MESSAGES = 64, 16, 4096

# What must be left out, or be what it is by default.
_ABSENT: Mapping[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "response_format": ({"type": "text"},),
    "top_logprobs": (0,),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
}


class StreamOptions(BaseModel):
    include_usage: bool = False


class Request(BaseModel):
    """What both kinds of request have. document: the id of a text to ask; reuse: ask what was kept
    of it when it came.
    """

    model_config = ConfigDict(strict=True)

    model: str | None = None
    max_tokens: Annotated[int | None, Field(ge=-1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=100)] = None
    seed: Annotated[int | None, Field(ge=SEEDS[0], le=SEEDS[1])] = None
    n: Annotated[int | None, Field(ge=1)] = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    document: str | None = None
    reuse: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, sent: Any) -> Any:
        """Raise `ValueError` for what would change the answer, and is not there."""
        if not isinstance(sent, dict):
            raise ValueError("The body must be a JSON object.")
        for name, defaults in _ABSENT.items():
            value = sent.get(name)
            if value is not None and value not in defaults:
                raise ValueError(f"{name} is not supported by this server; leave it out.")
        if sent.get("tools") and sent.get("tool_choice") != "none":
            raise ValueError(
                'tools is not supported by this server; leave it out, or set tool_choice to "none".'
            )
        return sent

    @property
    def wants_logprobs(self) -> bool:
        """Whether tokens are told with their probabilities."""
        return False

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with what the request took."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def new_tokens(self) -> int | None:
        """The most tokens of an answer, if the client says so."""
        return self.max_tokens

    def decodings(self, defaults: Decoding, most: int, usual: int) -> tuple[Decoding, ...]:
        """How each answer is chosen. most: tokens that an answer may have, also where a client asks
        for more or for any number (-1); usual: tokens that it has where the client does not say.
        Raises `ApiError` and `ValueError`.
        """
        new = usual if self.new_tokens is None else self.new_tokens
        if new == 0:
            raise ApiError(400, "max_tokens=0 must be at least 1.", "max_tokens")
        new = most if new < 0 else min(new, most)
        stops = defaults.stops if self.stop is None else self.stop
        stops = [stop for stop in ([stops] if isinstance(stops, str) else stops) if stop]
        if len(stops) > _MOST_STOPS or not all(len(stop) <= 1000 for stop in stops):
            message = f"stop must be at most {_MOST_STOPS} texts of at most 1000 characters."
            raise ApiError(400, message, "stop")
        chosen = {
            name: getattr(defaults, name) if value is None else value
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
            for value in (getattr(self, name),)
        }
        if chosen["top_p"] == 0:  # of the likeliest tokens, no more than one
            chosen["temperature"] = 0.0
        # With others, a client need not leave out what has no effect.
        if not chosen["temperature"] or chosen["top_p"] == 1:
            chosen["top_p"] = None
        if not chosen["temperature"] or chosen["top_k"] in (-1, 0):
            chosen["top_k"] = None
        if not chosen["temperature"]:
            chosen["min_p"] = None
        one = Decoding(
            max_new_tokens=new, stop_strings=tuple(stops), logprobs=self.wants_logprobs, **chosen
        )
        return tuple(
            one if one.seed is None else replace(one, seed=(one.seed + index) % (SEEDS[1] + 1))
            for index in range(self.n or 1)
        )


class Part(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: str


class Called(BaseModel):
    """A function that the assistant called."""

    name: str = ""
    arguments: str = ""


class Call(BaseModel):
    """A call in a history, which this server does not make itself."""

    function: Called = Called()


# Roles as chat templates know them: what a tool found is told to the model like what a user says.
_ROLES = {"developer": "system", "tool": "user", "function": "user"}


class Said(BaseModel):
    """A message of a conversation. An assistant's may be empty, or a call of functions."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    tool_calls: list[Call] | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Said:
        if self.content is None and self.role != "assistant":
            raise ValueError("content: field required.")
        return self

    @property
    def message(self) -> Message:
        parts = self.content or ""
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        calls = [f"{x.function.name}({x.function.arguments})" for x in self.tool_calls or ()]
        return Message(_ROLES.get(self.role, self.role), "\n".join([text, *calls]).strip("\n"))


class Template(BaseModel):
    """What a chat template is asked."""

    enable_thinking: bool | None = None


class ChatRequest(Request):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Said], Field(min_length=1, max_length=_MOST_MESSAGES)]
    max_completion_tokens: Annotated[int | None, Field(ge=-1)] = None
    logprobs: bool | None = None
    chat_template_kwargs: Template | None = None

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)

    @property
    def new_tokens(self) -> int | None:
        both = self.max_completion_tokens, self.max_tokens
        return next((one for one in both if one is not None), None)

    @property
    def thinking(self) -> bool | None:
        """Whether the model thinks first, if the client says so."""
        asked = self.chat_template_kwargs
        return None if asked is None else asked.enable_thinking

    @property
    def conversation(self) -> list[Message]:
        """The messages. Raises `ApiError` for an empty one, and where no question is the last."""
        said = [one.message for one in self.messages]
        for index, message in enumerate(said):
            if not message.text.strip() and message.role != "assistant":
                raise ApiError(400, f"messages.{index}: the message is empty.", "messages")
        if said[-1].role != "user":
            raise ApiError(400, "The last message must be the user's.", "messages")
        return said


class CompletionRequest(Request):
    """The body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int | None, Field(ge=0, le=0)] = None
    special_tokens: bool = False

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or many. Raises `ApiError` for none, too many and empty ones."""
        given = self.prompt
        many: list[Any]
        many = [given] if isinstance(given, str) or _is_flat(given) else list(given)
        if not 0 < len(many) <= _MOST_PROMPTS or not all(many):
            message = f"prompt must be one text or up to {_MOST_PROMPTS}, none of them empty."
            raise ApiError(400, message, "prompt")
        return many


class DocumentRequest(BaseModel):
    """The body of POST /v1/documents."""

    model_config = ConfigDict(strict=True)

    text: str
    title: Annotated[str, Field(max_length=500)] = ""
    suffix: Annotated[str | None, Field(min_length=1)] = None


def _is_flat(prompt: list[Any]) -> bool:
    """Whether this is one prompt in token ids."""
    return bool(prompt) and isinstance(prompt[0], int)
