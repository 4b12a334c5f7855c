"""The application: its routes, and what becomes of errors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as Http

from .completions import completion_routes
from .documents import document_routes
from .errors import INTERNAL, ApiError
from .guard import Guard
from .metrics import LEFT, Counted
from .service import LeftError, Service

_PAGE = Path(__file__).with_name("page.html")


# Requests that a client may make before it makes others, to see whether the server is there.
_LOOKED_AT = ["GET", "HEAD"]


def make_app(
    service: Service,
    key: str | None,
    most_bytes: int,
    is_local: bool,
    origins: Sequence[str] = (),
) -> FastAPI:
    """The application of a service, which it starts and ends. The other arguments are as `Guard`
    takes them.
    """

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        service.close()

    app = FastAPI(lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(completion_routes(service))
    app.include_router(document_routes(service))

    @app.api_route("/v1/models", methods=_LOOKED_AT)
    @app.api_route("/v1/models/", methods=_LOOKED_AT)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.check_model(name)
        return JSONResponse(_model(service))

    @app.api_route("/health", methods=_LOOKED_AT)
    async def health() -> Response:
        if not service.engine.is_alive:
            raise ApiError(503, "The engine has ended; start the server again.")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.api_route("/", methods=_LOOKED_AT)
    async def page() -> Response:
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers={"X-Frame-Options": "DENY"})

    _handle_errors(app)
    app.add_middleware(
        Guard, key=key, most_bytes=most_bytes, is_local=is_local, origins=tuple(origins)
    )
    if origins:  # outside of the guard: a browser asks without a key whether it may ask with one
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id"],
        )
    app.add_middleware(Counted, requests=service.metrics.requests)
    return app


def _handle_errors(app: FastAPI) -> None:
    """Errors in OpenAI's shape, and nothing of what a bug says."""

    @app.exception_handler(ApiError)
    async def refused(_: Http, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        headers = {"Retry-After": "1"} if error.status in (429, 503) else None
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(LeftError)
    @app.exception_handler(ClientDisconnect)
    async def left(_: Http, error: Exception) -> Response:
        return Response(status_code=LEFT)

    @app.exception_handler(HTTPException)
    async def no_route(http: Http, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"There is nothing at {http.method} {http.url.path[:80]}."
        body = ApiError(error.status_code, message).body
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Http, error: Exception) -> Response:
        return JSONResponse(INTERNAL.body, INTERNAL.status)


def _model(service: Service) -> dict[str, object]:
    """The model, as clients list it."""
    limit = service.engine.model.config.context_limit
    return {
        "id": service.name,
        "object": "model",
        "created": 0,
        "owned_by": "homer_triton",
        "context_limit": limit,
        "max_new_tokens": service.most_new_tokens,
        "fingerprint": service.fingerprint,
    }
