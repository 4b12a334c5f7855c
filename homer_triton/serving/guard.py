"""What every request passes: who may ask, from where, and how much at once; and its id."""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Sequence
from urllib.parse import urlsplit
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError

# What anybody may see: whether the server is there, and the page, which asks for the key itself.
_OPEN = ("/", "/health")
# This machine's own names.
LOCAL = ("localhost", "127.0.0.1", "::1")
# A request id that is passed on as it came.
_ID = re.compile(rb"[\w.:-]{1,128}")


class Guard:
    """Lets requests through that carry the key, are small enough, and come from no strange page.

    key: None lets anybody ask; most_bytes: of a body; is_local: whether the server is for this
    machine alone, so that a page elsewhere could reach it only by a name that leads here; origins:
    of other pages that may ask, such as "https://chat.example", also where a proxy sends their
    requests on under a name of its own.
    """

    def __init__(
        self,
        app: ASGIApp,
        key: str | None,
        most_bytes: int,
        is_local: bool,
        origins: Sequence[str] = (),
    ) -> None:
        self._app, self._most, self._is_local = app, most_bytes, is_local
        self._key = None if key is None else key.encode()
        self._origins = {origin.lower() for origin in origins}
        self._hosts = {*LOCAL, *(_name(_place(origin)) for origin in origins)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"")
        own = given if _ID.fullmatch(given) else uuid4().hex.encode()

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", own)]
            await send(message)

        refused = self._refusal(scope["path"], headers)
        if refused is not None:
            await _refuse(refused, named)
            return
        seen = 0

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._most:
                raise self._too_large()
            return message

        await self._app(scope, bounded, named)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        """Why a request is not let through, if it is not."""
        host = headers.get(b"host", b"").decode("latin-1")
        if self._is_local and _name(host) not in self._hosts:
            return ApiError(403, "This server is for this machine only.", code="wrong_host")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and origin.lower() not in self._origins and _place(origin) != host.lower():
            return ApiError(403, "Pages from elsewhere may not ask here.", code="wrong_origin")
        if self._key is not None and path not in _OPEN:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            right = hmac.compare_digest(given.strip(), self._key)
            if scheme.lower() != b"bearer" or not right:
                return ApiError(401, "The API key is missing or wrong.", code="invalid_api_key")
        coding = headers.get(b"content-encoding", b"identity").strip().lower()
        if coding not in (b"", b"identity"):
            message = "The body is compressed; send it as it is, without Content-Encoding."
            return ApiError(415, message, code="unsupported_media_type")
        length = headers.get(b"content-length", b"")
        return self._too_large() if length.isdigit() and int(length) > self._most else None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body is larger than {self._most:,} bytes.", code="too_large")


async def _refuse(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        # What else the client sends is not read.
        (b"connection", b"close"),
    ]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _name(host: str) -> str | None:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _place(origin: str) -> str:
    """The host and port that a page comes from."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
