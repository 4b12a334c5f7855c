"""All that a server holds, and a request's way through it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from ..context import EncodedContext
from ..decoding import Decoding
from .engine import Engine
from .errors import ApiError, to_api_error
from .events import Ended, Event, Failed, Gone, Read
from .jobs import Job
from .metrics import Metrics
from .records import DiskError
from .sources import Source, Sources
from .store import Store

log = logging.getLogger("homer_triton.serving")

Found = TypeVar("Found")


class LeftError(Exception):
    """The client is gone."""


@dataclass
class Service:
    """A model, its documents and its queue. name: what clients call the model; defaults: how
    answers are chosen where they do not say.
    """

    name: str
    fingerprint: str
    engine: Engine
    sources: Sources
    store: Store
    defaults: Decoding
    metrics: Metrics = field(init=False)
    saver: ThreadPoolExecutor = field(init=False)
    _unsaved: dict[str, EncodedContext] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engine, self.store)
        self.saver = ThreadPoolExecutor(1, "saver")

    @property
    def most_new_tokens(self) -> int:
        """Tokens that an answer may have: half of what the model reads; the rest is the text's."""
        return max(self.engine.model.config.context_limit // 2, 1)

    @property
    def usual_new_tokens(self) -> int:
        """Tokens that an answer has at most, where the client does not say."""
        return max(min(self.defaults.max_new_tokens, self.most_new_tokens // 2), 1)

    def kept(self, document: str, key: str) -> EncodedContext | None:
        """An encoding as it is on disk, or will be in a moment. Raises as `Store.load` does."""
        return self._unsaved.get(key) or self.store.load(document, key)

    def close(self) -> None:
        """End what is under way, and have it on disk."""
        self.engine.close()
        self.saver.shutdown()
        self.store.close()

    def check_model(self, name: str | None) -> None:
        """Raise `ApiError` for the name of another model."""
        if name is not None and name != self.name:
            message = f"The model {name[:80]!r} is not here; this server has {self.name!r}."
            raise ApiError(404, message, "model", "model_not_found")

    async def prepare(self, make: Callable[[], Found]) -> Found:
        """What a function makes that takes a while and uses no model. Raises `ApiError`."""
        try:
            return await run_in_threadpool(make)
        except Exception as error:
            raise to_api_error(error) or error from None

    async def prepare_questions(self, make: Callable[[], list[Source]]) -> list[Source]:
        """`prepare` for questions, which the engine then expects: `events` must follow at once."""
        self.engine.expect(1)
        try:
            return await self.prepare(make)
        except BaseException:
            self.engine.expect(-1)
            raise

    async def events(
        self, http: Request, sources: Sequence[Source], decodings: tuple[Decoding, ...]
    ) -> AsyncGenerator[tuple[int, Event]]:
        """All that happens to some texts and the answers to each, by the text's number.

        decodings: none where the texts are only to be read. Raises `ApiError`, and `LeftError` when
        the client is gone; whatever ends it, nothing of it runs on.
        """
        loop = asyncio.get_running_loop()
        heard: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

        def teller(number: int) -> Callable[[Event], None]:
            def tell(event: Event) -> None:
                if isinstance(event, Read):
                    self._keep(sources[number], event)
                with suppress(RuntimeError):  # the loop is gone
                    loop.call_soon_threadsafe(heard.put_nowait, (number, event))

            return tell

        async def watch() -> None:
            while (await http.receive())["type"] != "http.disconnect":
                pass
            heard.put_nowait((0, Gone()))

        jobs = [
            Job(source.start, source.prompt, decodings, teller(number), source.key)
            for number, source in enumerate(sources)
        ]
        try:
            self.engine.submit(jobs, expected=1 if decodings else 0)
        except Exception as error:
            raise to_api_error(error) or error from None
        watching = asyncio.create_task(watch())
        left = len(jobs) * max(len(decodings), 1)
        try:
            while left:
                number, event = await heard.get()
                if isinstance(event, Failed):
                    raise to_api_error(event.error) or event.error
                if isinstance(event, Gone):
                    raise LeftError
                left -= isinstance(event, Ended if decodings else Read)
                yield number, event
        finally:
            watching.cancel()
            self.engine.cancel(jobs)

    def _keep(self, source: Source, event: Read) -> None:
        """Write an encoding that was just made of a document, behind everybody's back."""
        self.metrics.readings.labels(str(event.reused).lower()).inc()
        document, key = source.document, source.key
        encoded = event.encoded
        if encoded is None or document is None or key is None:
            return

        def save() -> None:
            try:
                self.store.keep(document, key, encoded)
            except DiskError as error:
                log.warning("%s", error)
            finally:
                self._unsaved.pop(key, None)

        self._unsaved[key] = encoded
        with suppress(RuntimeError):  # the server ends
            self.saver.submit(save)
