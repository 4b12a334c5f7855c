"""Requests that run side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..answering import Answering, Generation, Question
from ..model.llama import Llama
from .events import Ended, Failed, Piece
from .jobs import Job

# A request, and what it asks: the first of its answers.
Member = tuple[Job, Question]


class Group:
    """Answers that run side by side."""

    def __init__(self, model: Llama, members: list[Member]) -> None:
        asked = [one for member in members for one in _answers(member)]
        self._answering = Answering(model, [question for _, _, question in asked])
        self._members = {number: (job, index) for number, (job, index, _) in enumerate(asked)}

    def takes(self, members: list[Member]) -> bool:
        """Whether others can join without much loss: they ask the encoding whose rows all see, or
        each has one of its own and about as many rows as there is room for here.
        """
        shared, room = self._answering.shared_context, self._answering.room
        if shared is not None:
            return all(question.context is shared for _, question in members)
        encodings = {id(question.context) for _, question in members}
        if len(encodings) < sum(len(job.decodings) for job, _ in members):
            return False  # they share one
        return all(room <= 2 * _rows(question) <= 4 * room for _, question in members)

    def add(self, members: list[Member]) -> None:
        """Let others join, all of them or none."""
        joined: list[int] = []
        try:
            for job, index, question in (one for member in members for one in _answers(member)):
                joined.append(self._answering.add(question))
                self._members[joined[-1]] = job, index
        except BaseException:
            for number in joined:
                self._answering.drop(number)
                del self._members[number]
            raise

    def __len__(self) -> int:
        return len(self._members)

    def step(self) -> None:
        """One more token of each, but of those that nobody waits for."""
        for number, (job, _) in list(self._members.items()):
            if job.cancelled:
                self._answering.drop(number)
                del self._members[number]
        if not self._members:
            return
        for number, answer in self._answering.step().items():
            if number not in self._members:
                continue  # another answer of its request has failed in this step
            job, index = self._members.pop(number)
            if isinstance(answer, Generation):
                job.tell(Ended(index, answer))
            else:
                self._refuse(job, answer)

    def _refuse(self, job: Job, error: Exception) -> None:
        """End all answers of a request of which one has failed."""
        for number in [number for number, (own, _) in self._members.items() if own is job]:
            self._answering.drop(number)
            del self._members[number]
        job.tell(Failed(error))

    def fail(self, error: Exception) -> None:
        """Tell everybody that it has come to nothing."""
        for job in {job for job, _ in self._members.values()}:
            job.tell(Failed(error))
        self._members = {}


def _answers(member: Member) -> Iterator[tuple[Job, int, Question]]:
    """Each answer that a request wants: its index, and the question with its settings."""
    job, first = member
    for index, decoding in enumerate(job.decodings):
        yield job, index, Question(first.context, first.prompt, decoding, _teller(job, index))


def _teller(job: Job, index: int) -> Callable[[str], None]:
    return lambda text: job.tell(Piece(index, text))


def by_encoding(ready: list[Member]) -> list[list[Member]]:
    """Requests in groups: those of one encoding, and those that have theirs for themselves, of
    which each gets as much room as the largest of its group needs.
    """
    by_encoding: dict[int, list[Member]] = {}
    for job, question in ready:
        by_encoding.setdefault(id(question.context), []).append((job, question))
    groups: list[list[Member]] = []
    alone: list[tuple[int, Job, Question]] = []
    for members in by_encoding.values():
        job, question = members[0]
        if len(members) == len(job.decodings) == 1:
            alone.append((_rows(question), job, question))
        else:
            groups.append(members)
    least = 0
    for rows, job, question in sorted(alone, key=lambda one: one[0]):
        if rows > 2 * least:
            least = rows
            groups.append([])
        groups[-1].append((job, question))
    return groups


def _rows(question: Question) -> int:
    """The most rows that a question's answer ends with."""
    return len(question.context) + len(question.prompt) + question.decoding.max_new_tokens
