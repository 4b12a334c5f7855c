"""Several processes (ranks of `torch.distributed`) that share the work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class RankError(RuntimeError):
    """Another rank has ended, or did not answer within the process group's timeout."""


@dataclass(frozen=True)
class Ranks:
    """The processes that share an encoding.

    Start them with torchrun. Each needs the same model and makes the same call with the same
    arguments:

        torch.distributed.init_process_group()
        encoded = ht.encode(model, text, config=config, ranks=ht.Ranks())

    Attributes:
        group: An initialised process group, gloo for CPUs or nccl for GPUs. Default: all processes.
        everywhere: Whether every rank gets a copy of the result. Default: only the first rank gets
            it, and the others get None.

    Raises:
        ValueError: `torch.distributed` is not initialised.
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
        """The number of processes in the group."""
        return dist.get_world_size(self.group)

    @contextmanager
    def agreeing(self) -> Iterator[dict[str, Any]]:
        """A context for work that must come out the same on all ranks.

        The body stores what must be equal in the dictionary that it gets, under a name for each
        thing. At the end the ranks compare.

        Raises:
            ValueError: On all ranks, if some have different things. If the body fails on one rank,
                its own error is raised there and a `ValueError` on the others.
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
        """What each rank gives, in the order of the ranks, on all of them.

        own: plain values, or tensors on the CPU.

        Raises:
            RankError: Another rank has ended or does not answer.
        """
        given: list[Any] = [None] * self.size
        with _heard():
            dist.all_gather_object(given, own, group=self.group)
        return given

    def collect(self, own: Any) -> list[Any] | None:
        """What each rank gives, in the order of the ranks, on the first one; None on the others.

        own: plain values, or tensors on the CPU.

        Raises:
            RankError: Another rank has ended or does not answer.
        """
        given: list[Any] | None = None if self.rank else [None] * self.size
        with _heard():
            dist.gather_object(own, given, group=self.group, group_dst=0)
        return given

    def share(self, own: Any) -> Any:
        """What the first rank gives, on all of them.

        own: plain values, or tensors on the CPU; read on the first rank only.

        Raises:
            RankError: Another rank has ended or does not answer.
        """
        given = [own]
        with _heard():
            dist.broadcast_object_list(given, group_src=0, group=self.group)
        return given[0]

    def send(self, tensors: list[Tensor], to: int) -> Sent:
        """Start to send tensors to another rank, which must know their shapes and dtypes.

        They are copied first, so the caller may change them at once. Call `wait` on the result.

        Raises:
            RankError: Another rank has ended or does not answer.
        """
        flat = [x.contiguous().view(-1).view(torch.uint8) for x in tensors]
        packed = self._place(torch.cat(flat))
        with _heard():
            work = dist.isend(packed, group=self.group, group_dst=to)
        assert work is not None
        return Sent(work, packed)

    def receive(self, like: list[tuple[tuple[int, ...], torch.dtype]], source: int) -> list[Tensor]:
        """Receive the tensors that another rank sends.

        Args:
            like: The shape and dtype of each.
            source: The rank that sends them.

        Returns:
            The tensors, on the GPU with nccl and on the CPU otherwise.

        Raises:
            RankError: Another rank has ended or does not answer.
        """
        lengths = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in like]
        packed = self._place(torch.empty(sum(lengths), dtype=torch.uint8))
        with _heard():
            dist.recv(packed, group=self.group, group_src=source)
        parts = packed.split(lengths)
        # A view as another dtype needs memory that is aligned for it.
        return [
            part.clone().view(dtype).view(shape)
            for part, (shape, dtype) in zip(parts, like, strict=True)
        ]

    def _place(self, packed: Tensor) -> Tensor:
        """Bytes on the device that the backend sends from and receives to."""
        return packed.cuda() if dist.get_backend(self.group) == "nccl" else packed.cpu()


@dataclass(frozen=True)
class Sent:
    """Tensors on their way to another rank. Keep this until they have arrived."""

    work: dist.Work
    packed: Tensor

    def wait(self) -> None:
        """Wait until they have arrived.

        Raises:
            RankError: Another rank has ended or does not answer.
        """
        with _heard():
            self.work.wait()


@contextmanager
def _heard() -> Iterator[None]:
    """Turn a backend's error into a `RankError`."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise RankError(f"Another rank is gone or does not answer ({reason[:200]}).") from error
