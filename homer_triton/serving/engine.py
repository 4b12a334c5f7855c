"""One thread that owns the model: it reads texts and answers requests, all side by side.

Requests wait in a queue of bounded length. Those that ask the same encoding when they are let in
share its rows; the others form groups of about equal length, which later ones join. Every round
lets one more token come of each answer, and while a long text is read there is such a round after
each of its chunks, so that nobody waits for another's end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from threading import Condition, Thread
from time import perf_counter

import torch

from ..config import HomerConfig, plan
from ..context import EncodedContext
from ..encoding import encode
from ..engine.heap import trim_heap
from ..engine.tree import Node
from ..model.llama import Llama
from .events import Failed, Read, Walked
from .groups import Group, Member, by_encoding
from .jobs import Job, Reading
from .memory import Memory
from .room import with_room

# Seconds for which a request that could run waits for others that come with it, since those that
# begin together may share the rows of their encoding.
_TOGETHER = 0.05


class BusyError(Exception):
    """The queue is full."""


class ClosingError(Exception):
    """The server is about to end."""


class _GoneError(Exception):
    """Whoever wanted a text read wants it no longer."""


class Engine:
    """Answers requests on a model.

    config: how texts are read that outgrow the model's limit; running: the most answers side by
    side; waiting: the most requests in the queue; memory: encodings at hand.
    """

    def __init__(
        self, model: Llama, config: HomerConfig, running: int, waiting: int, memory: Memory
    ) -> None:
        self.model, self.config, self.memory = model, config, memory
        self.most_running, self.most_waiting = running, waiting
        self._waiting: deque[Job] = deque()
        self._groups: list[Group] = []
        self._changed = Condition()
        self._closing = False
        self._readings = 0
        self._expected = 0
        # Answers whose question is ready, and that are in no group yet.
        self._promised = 0
        self._thread = Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to take requests from the queue."""
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Answers that are coming."""
        return sum(len(group) for group in list(self._groups))

    @property
    def is_alive(self) -> bool:
        """Whether requests can be answered."""
        return self._thread.is_alive()

    @property
    def is_reading(self) -> bool:
        """Whether a text is being read."""
        return self._readings > 0

    def expect(self, count: int) -> None:
        """Say that so many more requests are about to come, or fewer, where one of them will not:
        an engine that has nothing else to do waits for them a moment.
        """
        with self._changed:
            self._expected += count
            self._changed.notify()

    def submit(self, jobs: list[Job], expected: int = 0) -> None:
        """Queue some requests, all or none, which were expected as so many. Raises `BusyError` and
        `ClosingError`.
        """
        with self._changed:
            self._expected -= expected
            self._changed.notify()
            if self._closing or not self.is_alive:
                raise ClosingError
            if len(self._waiting) + len(jobs) > self.most_waiting:
                raise BusyError
            self._waiting.extend(jobs)

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Let some requests end: at once where they wait, at the next token where they run."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
                if job in self._waiting:
                    self._waiting.remove(job)

    def drain(self) -> None:
        """Take no more requests, and end those that wait; what runs runs on."""
        with self._changed:
            self._closing = True
            refused, self._waiting = list(self._waiting), deque()
            self._changed.notify()
        for job in refused:
            job.tell(Failed(ClosingError()))

    def close(self) -> None:
        """Wait for the answers that are coming."""
        self.drain()
        self._thread.join()

    def _run(self) -> None:
        with torch.no_grad():
            while self._wait():
                self._admit(lambda job: True)
                self._step()

    def _wait(self) -> bool:
        """Wait for something to do; False once there will be nothing any more."""
        if not self._groups and not self._waiting and self.model.device.type == "cpu":
            trim_heap()
        with self._changed:
            self._changed.wait_for(lambda: self._groups or self._waiting or self._closing)
            return bool(self._groups or self._waiting)

    def _admit(self, may_start: Callable[[Job], bool]) -> None:
        """Let requests in that may start, in their order, as long as there is room."""
        start = perf_counter()
        ready: list[Member] = []
        while True:
            job = self._take(may_start)
            if job is not None and ready and not self._is_quick(job):
                # Who is ready does not wait until a long text is read.
                self._form(ready)
                ready = []
            if job is None:
                if ready and self._more_comes(start + _TOGETHER - perf_counter()):
                    continue
                break
            try:
                context, reused = self._open(job)
                # Of a document that comes, the encoding goes to disk, wherever it was found.
                kept = job.key is not None and (not reused or not job.decodings)
                encoded = context.to("cpu") if kept else None
                job.tell(Read(len(context.token_ids), context.stats, reused, encoded))
                if job.decodings:
                    question = with_room(self.model, job, context, self.config)
                    question.check(self.model)
                    ready.append((job, question))
                    self._promised += len(job.decodings)
            except _GoneError:
                pass
            except Exception as error:  # it is this request's alone
                job.tell(Failed(error))
            if perf_counter() - start > _TOGETHER:
                break
        self._form(ready)

    def _form(self, ready: list[Member]) -> None:
        """Let the answers to some questions begin."""
        self._promised -= sum(len(job.decodings) for job, _ in ready)
        for members in by_encoding(ready):
            group = next((each for each in self._groups if each.takes(members)), None)
            try:
                if group is None:
                    self._groups.append(Group(self.model, members))
                else:
                    group.add(members)
            except Exception as error:
                for job, _ in members:
                    job.tell(Failed(error))

    def _room(self) -> int:
        """How many answers more can begin."""
        return self.most_running - self.running - self._promised

    def _take(self, may_start: Callable[[Job], bool]) -> Job | None:
        """The next request, out of the queue; None where it has to wait for others to end."""
        with self._changed:
            job = next(filter(may_start, self._waiting), None)
            if job is not None and len(job.decodings) <= self._room():
                self._waiting.remove(job)
                return job
        return None

    def _more_comes(self, seconds: float) -> bool:
        """Wait so long for requests that are expected, where nobody waits for the engine but those
        that will share what it does next.
        """
        if self._groups or seconds <= 0:
            return False
        with self._changed:
            seen = len(self._waiting)
            self._changed.wait_for(
                lambda: len(self._waiting) > seen or not self._expected, timeout=seconds
            )
            return len(self._waiting) > seen

    def _open(self, job: Job) -> tuple[EncodedContext, bool]:
        """What a request goes on from, and whether it was there already."""
        known = self.memory.get(job.key)
        if known is not None:
            return known, True
        reading = job.source
        if isinstance(reading, EncodedContext):
            context, reused = reading.to(self.model.device), True
        else:
            context, reused = self._read(reading, job), False
        if job.key is not None:
            self.memory.put(job.key, context)
        return context, reused

    def _read(self, reading: Reading, job: Job) -> EncodedContext:
        """Read a text; between its chunks the answers that are coming go on, and others begin."""
        parts = reading.prefix, reading.context, reading.suffix
        tree = plan(self.model, len(parts[1]), len(parts[0]), len(parts[2]), reading.config)
        levels = tuple(len(level.nodes) for level in tree.levels)

        def on_node(node: Node) -> None:
            if job.cancelled:
                raise _GoneError
            if job.key is not None or not reading.is_short:
                job.tell(Walked(levels, node.height, node.index))
            if not reading.is_short:
                self._admit(self._is_quick)
                self._step()

        self._readings += 1
        try:
            return encode(self.model, parts[1], parts[0], parts[2], reading.config, on_node)
        finally:
            self._readings -= 1

    def _is_quick(self, job: Job) -> bool:
        """Whether a request need not wait until the text that is being read is done."""
        source = job.source
        if isinstance(source, EncodedContext) or source.is_short:
            return True
        return self.memory.get(job.key) is not None

    def _step(self) -> None:
        """One more token of every answer."""
        for group in list(self._groups):
            try:
                group.step()
            except Exception as error:
                group.fail(error)
            if not len(group):
                self._groups.remove(group)
