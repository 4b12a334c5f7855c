"""From the body of a request to what it says."""

from __future__ import annotations

import json
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from .errors import ApiError

Kind = TypeVar("Kind", bound=BaseModel)


def parse(kind: type[Kind], body: bytes) -> Kind:
    """A request from its body. Raises `ApiError` as `check` does, and for what is no JSON."""
    try:
        sent = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "The body is not JSON.", code="invalid_json") from None
    return check(kind, sent)


def check(kind: type[Kind], sent: object) -> Kind:
    """A request from what was sent. Raises `ApiError` with one sentence about the first thing
    wrong.
    """
    try:
        return kind.model_validate(sent)
    except ValidationError as error:
        first = error.errors()[0]
        # Unions name the kind that they tried.
        place = [str(step) for step in first["loc"] if str(step) not in _TRIED]
        if first["type"] == "value_error":
            message = first["msg"].removeprefix("Value error, ")
            about = [*place, message.split()[0]] if isinstance(sent, dict) else [None]
            raise ApiError(400, ".".join([*place, message]), about[0]) from None
        told = f"{first['msg'][0].lower()}{first['msg'][1:]}".rstrip(".")
        where = ".".join(place) or "the body"
        raise ApiError(400, f"{where}: {told}.", place[0] if place else None) from None


_TRIED = ("str", "list[str]", "list[int]", "list[list[int]]", "list[Part]")
