"""Several processes (ranks of `torch.distributed`) that share the work, and what they tell each
other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class RankError(RuntimeError):
    """Another rank is gone, or does not answer within the process group's time-out."""


@dataclass(frozen=True)
class Ranks:
    """The processes that share an encoding, each with the same model and the same arguments.

    group: a process group that is initialised on all of them, gloo for CPUs and nccl for GPUs; all
    processes if left out. everywhere: every rank gets a copy of what comes out; left out, it is the
    first rank's alone and the others get None.
    """

    group: dist.ProcessGroup | None = None
    everywhere: bool = False

    def __post_init__(self) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "There is no process group; call torch.distributed.init_process_group first, or "
                "start this with torchrun."
            )

    @property
    def rank(self) -> int:
        """This process's number in the group, from 0."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """How many processes there are."""
        return dist.get_world_size(self.group)

    @contextmanager
    def agreeing(self) -> Iterator[dict[str, Any]]:
        """Run what must be alike on all ranks, which notes the facts of it in a dictionary.

        Raises `ValueError` on all of them where one has other facts than another, or failed.
        """
        facts: dict[str, Any] = {}
        try:
            yield facts
        except Exception as error:
            self.gather({"failure": str(error)})
            raise
        for rank, theirs in enumerate(self.gather(facts)):
            if "failure" in theirs:
                raise ValueError(f"Rank {rank} cannot begin: {theirs['failure']}")
            other = [name for name in facts if theirs.get(name) != facts[name]]
            if other:
                raise ValueError(
                    f"Rank {rank} has another {', '.join(other)} than rank {self.rank}; all ranks "
                    "must be given the same."
                )

    def gather(self, own: Any) -> list[Any]:
        """What every rank gives, by rank, on all of them; plain values, or tensors on the CPU."""
        given: list[Any] = [None] * self.size
        with _heard():
            dist.all_gather_object(given, own, group=self.group)
        return given

    def collect(self, own: Any) -> list[Any] | None:
        """What every rank gives, by rank, on the first one; None on the others."""
        given: list[Any] | None = None if self.rank else [None] * self.size
        with _heard():
            dist.gather_object(own, given, group=self.group, group_dst=0)
        return given

    def share(self, own: Any) -> Any:
        """What the first rank gives, on all of them."""
        given = [own]
        with _heard():
            dist.broadcast_object_list(given, group_src=0, group=self.group)
        return given[0]

    def send(self, tensors: list[Tensor], to: int) -> Sent:
        """Begin to send tensors to a rank that knows their shapes and types; the caller may change
        them at once.
        """
        flat = [x.contiguous().view(-1).view(torch.uint8) for x in tensors]
        packed = self._place(torch.cat(flat))
        with _heard():
            work = dist.isend(packed, group=self.group, group_dst=to)
        assert work is not None
        return Sent(work, packed)

    def receive(self, like: list[tuple[tuple[int, ...], torch.dtype]], source: int) -> list[Tensor]:
        """The tensors of these shapes and types that a rank sends."""
        lengths = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in like]
        packed = self._place(torch.empty(sum(lengths), dtype=torch.uint8))
        with _heard():
            dist.recv(packed, group=self.group, group_src=source)
        parts = packed.split(lengths)
        # A view needs numbers that begin where their type wants them to.
        return [
            part.clone().view(dtype).view(shape)
            for part, (shape, dtype) in zip(parts, like, strict=True)
        ]

    def _place(self, packed: Tensor) -> Tensor:
        """Bytes where the backend sends from and receives to."""
        return packed.cuda() if dist.get_backend(self.group) == "nccl" else packed.cpu()


@dataclass(frozen=True)
class Sent:
    """What is on its way; it must stay until it has arrived."""

    work: dist.Work
    packed: Tensor

    def wait(self) -> None:
        """Return once it has arrived. Raises `RankError`."""
        with _heard():
            self.work.wait()


@contextmanager
def _heard() -> Iterator[None]:
    """Raise `RankError` for what a backend raises where another rank does not answer."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise RankError(f"Another rank is gone or does not answer ({reason[:200]}).") from error
