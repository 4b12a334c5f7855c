"""What a client is told when a request cannot be answered, in the shape that OpenAI's has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .engine import BusyError, ClosingError
from .records import DiskError, NoDocumentError, TooLargeError


@dataclass
class ApiError(Exception):
    """A refusal. status: HTTP's; message: one sentence; param: the field at fault; code: for
    programs.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def to_api_error(error: Exception) -> ApiError | None:
    """What to tell of an exception; None for a bug, of which a client is told nothing."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BusyError):
        return ApiError(429, "Too many requests are waiting; try again later.", code="busy")
    if isinstance(error, ClosingError):
        return ApiError(503, "The server is about to end; try again later.", code="closing")
    if isinstance(error, NoDocumentError):
        message = f"There is no document {str(error)[:80]!r}; it may have gone to make room."
        return ApiError(404, message, "document", "document_not_found")
    if isinstance(error, TooLargeError):
        return ApiError(413, "The document does not fit the room that documents have here.", "text")
    if isinstance(error, DiskError):
        return ApiError(507, "The document cannot be kept: the disk refuses.", code="disk")
    if isinstance(error, ValueError):  # what the library refuses, in a sentence
        return ApiError(400, " ".join(str(error).split()))
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        return ApiError(
            503, "The request does not fit the memory; ask for fewer tokens.", code="out_of_memory"
        )
    return None


INTERNAL = ApiError(500, "The server failed; its log says more.", code="internal_error")
