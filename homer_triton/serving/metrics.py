"""Figures for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .engine import Engine
from .store import Store

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)

# What nginx writes for a client that is gone.
LEFT = 499


class Metrics:
    """What a server counts; each has a registry of its own."""

    def __init__(self, engine: Engine, store: Store) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "homer_requests",
            "Requests by route and HTTP status; 499 is a client that left.",
            ["route", "status"],
            registry=self._registry,
        )
        self.prompt_tokens = Counter(
            "homer_prompt_tokens", "Tokens of what was asked.", registry=self._registry
        )
        self.new_tokens = Counter(
            "homer_new_tokens", "Tokens of the answers.", registry=self._registry
        )
        self.readings = Counter(
            "homer_readings",
            "Texts that requests asked for, by whether they were read or had been before.",
            ["reused"],
            registry=self._registry,
        )
        self.first_token = Histogram(
            "homer_first_token_seconds",
            "From a request to the first text of its answer.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.whole = Histogram(
            "homer_request_seconds",
            "From a request to the end of its last answer.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._gauge("homer_waiting", "Requests in the queue.", lambda: engine.waiting)
        self._gauge("homer_running", "Answers that are coming.", lambda: engine.running)
        self._gauge("homer_documents", "Documents kept.", lambda: len(store.documents()))
        self._gauge("homer_document_bytes", "What documents take on disk.", lambda: store.bytes)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)

    def _gauge(self, name: str, what: str, value: Callable[[], float]) -> None:
        Gauge(name, what, registry=self._registry).set_function(value)


class Counted:
    """Counts requests by what became of them."""

    def __init__(self, app: ASGIApp, requests: Counter) -> None:
        self._app, self._requests = app, requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = LEFT

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._requests.labels(route, str(status)).inc()
