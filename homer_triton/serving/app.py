"""The application: its routes, and what becomes of errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import Request as Http

from .completions import completion_routes
from .documents import document_routes
from .errors import INTERNAL, ApiError
from .guard import Guard
from .metrics import LEFT, Counted
from .service import LeftError, Service

_PAGE = Path(__file__).with_name("page.html")


def make_app(service: Service, key: str | None, most_bytes: int, is_local: bool) -> FastAPI:
    """The application of a service, which it starts and ends. key, most_bytes, is_local: as `Guard`
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

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.check_model(name)
        return JSONResponse(_model(service))

    @app.get("/health")
    async def health() -> Response:
        if not service.engine.is_alive:
            raise ApiError(503, "The engine has ended; start the server again.")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/")
    async def page() -> Response:
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers={"X-Frame-Options": "DENY"})

    _handle_errors(app)
    app.add_middleware(Guard, key=key, most_bytes=most_bytes, is_local=is_local)
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
    async def left(_: Http, error: Exception) -> Response:
        return Response(status_code=LEFT)

    @app.exception_handler(HTTPException)
    async def no_route(http: Http, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"There is nothing at {http.method} {http.url.path[:80]}."
        return JSONResponse(ApiError(error.status_code, message).body, error.status_code)

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
