"""`/v1/chat/completions` and `/v1/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from time import perf_counter
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as Http

from ..decoding import Decoding
from .errors import INTERNAL, ApiError
from .events import Ended, Event, Piece, Read, Walked
from .parsing import parse
from .replies import DONE, Choice, Reply, Usage, remark, sent
from .requests import ChatRequest, CompletionRequest, Request
from .service import LeftError, Service, log
from .sources import Source
from .stops import Stops


def completion_routes(service: Service) -> APIRouter:
    """The routes that answer."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def chat(http: Http) -> Response:
        wanted = parse(ChatRequest, await http.body())
        decodings, messages = _decodings(service, wanted), wanted.conversation
        sources = await service.prepare_questions(
            lambda: [
                service.sources.chat(
                    messages,
                    decodings[0].max_new_tokens,
                    wanted.document,
                    bool(wanted.reuse),
                    wanted.thinking,
                )
            ]
        )
        return await _answer(service, http, wanted, sources, decodings)

    @routes.post("/v1/completions")
    async def complete(http: Http) -> Response:
        wanted = parse(CompletionRequest, await http.body())
        decodings, prompts = _decodings(service, wanted), wanted.prompts
        sources = await service.prepare_questions(
            lambda: [
                service.sources.completion(
                    prompt,
                    decodings[0].max_new_tokens,
                    wanted.document,
                    bool(wanted.reuse),
                    wanted.special_tokens,
                )
                for prompt in prompts
            ]
        )
        return await _answer(service, http, wanted, sources, decodings)

    return routes


def _decodings(service: Service, wanted: Request) -> tuple[Decoding, ...]:
    """How the answers are chosen. Raises `ApiError`."""
    service.check_model(wanted.model)
    most = service.engine.most_running
    if (wanted.n or 1) > most:
        raise ApiError(400, f"n={wanted.n} must be at most {most}.", "n")
    if wanted.reuse and wanted.document is None:
        raise ApiError(400, "reuse needs a document.", "reuse")
    try:
        return wanted.decodings(service.defaults, service.most_new_tokens, service.usual_new_tokens)
    except ValueError as error:
        raise ApiError(400, str(error)) from None


async def _answer(
    service: Service,
    http: Http,
    wanted: Request,
    sources: list[Source],
    decodings: tuple[Decoding, ...],
) -> Response:
    """A request's answers, whole or as they come."""
    under_way = _UnderWay(service, http, wanted, sources, decodings)
    if not wanted.stream:
        await under_way.finish()
        return JSONResponse(under_way.reply.whole(under_way.choices, under_way.usage))
    # What is refused is refused before the stream begins, with a status.
    await under_way.begin()
    return StreamingResponse(under_way.chunks(), media_type="text/event-stream", headers=_HEADERS)


_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class _UnderWay:
    """A request while its answers come."""

    def __init__(
        self,
        service: Service,
        http: Http,
        wanted: Request,
        sources: list[Source],
        decodings: tuple[Decoding, ...],
    ) -> None:
        self._service, self._wanted, self._sources = service, wanted, sources
        self._each = len(decodings)
        self._start = perf_counter()
        self._is_first = True
        self._first_event: tuple[int, Event] | None = None
        self._events = service.events(http, sources, decodings)
        stops = decodings[0].stops
        self.choices = [Choice(Stops(stops)) for _ in range(len(sources) * self._each)]
        self.usage = Usage(prompt=sum(source.tokens for source in sources))
        is_chat = isinstance(wanted, ChatRequest)
        self.reply = Reply(service.name, service.fingerprint, is_chat)

    async def begin(self) -> None:
        """Wait for the first thing that happens. Raises `ApiError`, `LeftError`."""
        self._first_event = await anext(self._events)

    async def finish(self) -> None:
        """Wait for all answers. Raises `ApiError`, `LeftError`."""
        async with aclosing(self._events) as events:
            async for number, event in events:
                await self._take(number, event)
        self._count()

    async def chunks(self) -> AsyncIterator[str]:
        """The answers as server-sent events."""
        with_usage = self._wanted.with_usage
        try:
            assert self._first_event is not None
            async with aclosing(self._events) as events:
                for chunk in await self._told(*self._first_event):
                    yield chunk
                async for number, event in events:
                    for chunk in await self._told(number, event):
                        yield chunk
            if with_usage:
                yield self.reply.last(self.choices, self.usage)
            yield DONE
            self._count()
        except LeftError:
            pass
        except ApiError as error:
            yield sent(error.body)
        except Exception:
            log.exception("A stream failed.")
            yield sent(INTERNAL.body)

    async def _told(self, number: int, event: Event) -> list[str]:
        """What to send of an event."""
        if isinstance(event, Walked):
            return [remark(told_of(event))]
        index, text = await self._take(number, event)
        with_usage = self._wanted.with_usage
        if isinstance(event, Read):
            if not self.reply.is_chat:
                return []
            return [
                self.reply.chunk(number * self._each + one, None, self.choices[one], with_usage)
                for one in range(self._each)
            ]
        choice = self.choices[index]
        if not text and choice.finish is None:
            return []
        return [self.reply.chunk(index, text, choice, with_usage)]

    async def _take(self, number: int, event: Event) -> tuple[int, str]:
        """Note an event; returns the answer that it is about, and what can be told of its text."""
        if isinstance(event, Read):
            if event.reused:
                self.usage.cached += event.tokens
            self._note_document(self._sources[number], event)
            return number, ""
        if not isinstance(event, Piece | Ended):
            return number, ""
        if self._is_first:
            self._is_first = False
            self._service.metrics.first_token.observe(perf_counter() - self._start)
        index = number * self._each + event.index
        choice = self.choices[index]
        if isinstance(event, Piece):
            text = choice.stops.pass_on(event.text)
        else:
            text = choice.stops.rest()
            answer = event.answer
            choice.tokens, choice.finish = len(answer.token_ids), answer.finish_reason
            if answer.logprobs is not None:
                spell = self._service.sources.spell
                spelt = await run_in_threadpool(spell, answer.token_ids, answer.text)
                choice.logprobs = list(zip(spelt, answer.logprobs, strict=True))
        choice.text += text
        return index, text

    def _note_document(self, source: Source, event: Read) -> None:
        if source.document is not None:
            stats = event.stats
            self.reply.document = {
                "id": source.document,
                "encoding": source.key,
                "tokens": stats.tokens,
                "kept_tokens": stats.kept_tokens,
                "reused": event.reused,
            }

    def _count(self) -> None:
        metrics = self._service.metrics
        metrics.whole.observe(perf_counter() - self._start)
        metrics.prompt_tokens.inc(self.usage.prompt)
        metrics.new_tokens.inc(sum(choice.tokens for choice in self.choices))


def told_of(event: Walked) -> dict[str, Any]:
    """A node of the tree, as clients hear of it."""
    place = {"levels": event.levels, "height": event.height, "index": event.index}
    return {"object": "document.progress", **place}
