"""`/v1/documents`: texts that are read once and asked many times."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.requests import Request as Http

from ..checks import check_text
from ..evaluation.kept_page import build_page
from .completions import told_of
from .errors import INTERNAL, ApiError, to_api_error
from .events import Event, Read, Walked
from .parsing import check, parse
from .records import Document, id_of
from .replies import DONE, sent
from .requests import DocumentRequest
from .service import LeftError, Service, log
from .sources import Source

_STREAM = "text/event-stream"
_NOTE = (
    "A conversation reads the text for its first question, which decides what is kept, and goes on "
    'from there; "reuse": true asks what was kept when the text came.'
)


def document_routes(service: Service) -> APIRouter:
    """The routes for documents."""
    routes, store, sources = APIRouter(), service.store, service.sources

    @routes.post("/v1/documents")
    async def add(http: Http, stream: bool = False) -> Response:
        wanted = await _wanted(http)
        id_ = id_of(wanted.text, wanted.suffix)
        known = store.find(id_)
        if known is not None:
            told = _told(known)
            return Response(sent(told) + DONE, media_type=_STREAM) if stream else JSONResponse(told)
        source = await service.prepare(
            lambda: sources.new_document(id_, wanted.text, wanted.suffix)
        )
        events = service.events(http, [source], ())
        if not stream:
            async with aclosing(events):
                async for _, event in events:
                    if isinstance(event, Read):
                        return JSONResponse(_told(await _kept(wanted, source, event)))
        first = await anext(events)
        chunks = _chunks(wanted, source, first, events)
        return StreamingResponse(chunks, media_type=_STREAM)

    async def _kept(wanted: DocumentRequest, source: Source, event: Read) -> Document:
        """The document, once it is on disk. Raises `ApiError`."""
        key, encoded = str(source.key), event.encoded
        assert encoded is not None
        return await service.prepare(
            lambda: store.add(wanted.text, wanted.title, wanted.suffix, key, encoded)
        )

    async def _chunks(
        wanted: DocumentRequest,
        source: Source,
        first: tuple[int, Event],
        events: AsyncGenerator[tuple[int, Event]],
    ) -> AsyncIterator[str]:
        """Every node of the tree as it is done, and the document."""
        try:
            event = first[1]
            while isinstance(event, Walked):
                yield sent(told_of(event))
                _, event = await anext(events)
            assert isinstance(event, Read)
            yield sent(_told(await _kept(wanted, source, event)))
            yield DONE
        except LeftError:
            pass
        except Exception as error:
            refused = to_api_error(error)
            if refused is None:
                log.exception("A stream failed.")
            yield sent((refused or INTERNAL).body)
        finally:
            await events.aclose()

    @routes.get("/v1/documents")
    async def every() -> Response:
        return JSONResponse({"object": "list", "data": [_told(x) for x in store.documents()]})

    @routes.get("/v1/documents/{id_}")
    async def one(id_: str) -> Response:
        return JSONResponse(_told(await service.prepare(lambda: store.get(id_))))

    @routes.delete("/v1/documents/{id_}")
    async def remove(id_: str) -> Response:
        keys = await service.prepare(lambda: store.remove(id_))
        service.engine.memory.forget(keys)
        return JSONResponse({"id": id_, "object": "document", "deleted": True})

    @routes.get("/v1/documents/{id_}/kept/{key}")
    async def kept(id_: str, key: str) -> Response:
        """The page of `homer show`: what survived of the text in one of its encodings."""

        def draw() -> str:
            encoded = service.kept(id_, key)
            if encoded is None:
                message = f"There is no encoding {key[:80]!r} of this document any more."
                raise ApiError(404, message, "key", "encoding_not_found")
            return build_page(encoded, sources.spell(encoded.token_ids), store.get(id_).title)

        return HTMLResponse(await service.prepare(draw))

    return routes


async def _wanted(http: Http) -> DocumentRequest:
    """A document from a body of JSON, or of plain text. Raises `ApiError`."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    body = await http.body()
    if kind == "application/json":
        wanted = parse(DocumentRequest, body)
    elif kind in ("text/plain", "text/markdown"):
        try:
            told = {name: http.query_params.get(name) for name in ("title", "suffix")}
            given = {name: value for name, value in told.items() if value}
            wanted = check(DocumentRequest, {**given, "text": body.decode("utf-8-sig")})
        except UnicodeDecodeError as error:
            message = f"The text is not UTF-8 (byte {error.start}); convert it first."
            raise ApiError(400, message, "text") from None
    else:
        message = "Send JSON (application/json) or the text itself (text/plain, text/markdown)."
        raise ApiError(415, message, code="unsupported_media_type")
    if not wanted.text.strip():
        raise ApiError(400, "The text is empty.", "text")
    for name in ("text", "title", "suffix"):
        try:
            check_text(getattr(wanted, name) or "", name)
        except ValueError as error:
            raise ApiError(400, str(error), name) from None
    if "\0" in wanted.text:
        raise ApiError(400, "The text holds zero bytes; it is no text.", "text")
    return wanted


def _told(document: Document) -> dict[str, Any]:
    """A document, as clients hear of it."""
    return {
        "id": document.id,
        "object": "document",
        "title": document.title,
        "suffix": document.suffix,
        "created": document.created,
        "characters": document.characters,
        "tokens": document.stats["tokens"],
        "kept_tokens": document.stats["kept_tokens"],
        "seconds": document.stats["seconds"],
        "stats": document.stats,
        "encodings": sorted(document.encodings),
        "bytes": document.bytes,
        "note": _NOTE,
    }
