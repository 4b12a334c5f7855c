"""Commands on several ranks, started by torchrun or by the command itself (--devices)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from .errors import BAD_INPUT
from .help import COST
from .interrupts import QUIET, caught

if TYPE_CHECKING:
    from ..ranks import Ranks

Devices = Annotated[
    int,
    typer.Option(
        "--devices",
        metavar="N",
        min=1,
        rich_help_panel=COST,
        help="Share the work among N processes on this machine, each with its own GPU if there are "
        "GPUs. For several machines, use torchrun … -m homer_triton.",
    ),
]

# Where the processes that a command starts find each other. torchrun has its own way.
_MEETING = "HOMER_RANKS_MEET_AT"
# Seconds that a process has to clean up once it is asked to end.
_PATIENCE = 10.0


def is_rank() -> bool:
    """Whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this process prints and writes files: rank 0, or the only process."""
    return not is_rank() or os.environ["RANK"] == "0"


def begin(devices: int, context_file: str | None = "") -> None:
    """Run this command as `devices` processes and exit, unless this is one of them already.

    context_file: the text that they share. Raises `ValueError` for standard input, and for None,
    which means an encoding, if there are several processes.
    """
    starts = devices > 1 and not is_rank()
    if starts or is_rank():
        if context_file is None:
            raise ValueError(
                "With --encoded, several processes have nothing to share; leave --devices out."
            )
        if context_file == "-":
            raise ValueError(
                "Several processes cannot read standard input; give the text as a file."
            )
    if starts:
        start_ranks(devices)


@contextmanager
def joined(device: str | None) -> Iterator[Ranks | None]:
    """This process's ranks, None if it is alone.

    device: where the model runs. GPUs communicate by nccl, CPUs by gloo. Raises `ValueError` if
    this machine has fewer GPUs than processes.
    """
    if not is_rank():
        yield None
        return
    import torch
    import torch.distributed as dist

    from ..ranks import Ranks

    on_gpu = torch.cuda.is_available() and (device or "cuda").startswith("cuda")
    if on_gpu:
        own, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if own >= gpus:
            raise ValueError(
                f"This is process {own + 1} on a machine with {gpus} GPU{'s' * (gpus > 1)}; start "
                "one for each GPU, or set --device cpu."
            )
        torch.cuda.set_device(own)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=os.environ.get(_MEETING, "env://"),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    try:
        yield Ranks()
    finally:
        dist.destroy_process_group()


def start_ranks(count: int) -> NoReturn:
    """Run this command on `count` ranks instead of in this process, and exit with its code.

    Only the first rank prints. If another one fails, one sentence says so.
    """
    arguments = _without("--devices", sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        ranks = [_start(rank, count, arguments, Path(folder)) for rank in range(count)]
        try:
            failed = _first_to_fail(ranks)
            if failed:  # rank 0 notices, and may say why
                with suppress(subprocess.TimeoutExpired):
                    ranks[0].wait(_PATIENCE)
        finally:
            _end(ranks)
        if failed is None:
            sys.exit(0)
        if ranks[0].returncode == BAD_INPUT:  # it has printed the reason
            sys.exit(BAD_INPUT)
        code = ranks[failed].returncode
        said = (Path(folder) / f"{failed}.stderr").read_text(errors="replace") if failed else ""
    sentences = [line for line in said.splitlines() if line.startswith("homer: ")]
    if code < 0:
        name = signal.Signals(-code).name
        print(
            f"homer: Rank {failed} was ended by {name}, so all ranks were stopped.", file=sys.stderr
        )
    elif sentences:
        print(sentences[-1], file=sys.stderr)
    elif failed:
        print(said, file=sys.stderr, end="")
    sys.exit(code if code > 0 else 1)


def _start(
    rank: int, count: int, arguments: Sequence[str], folder: Path
) -> subprocess.Popen[bytes]:
    threads = max(1, (os.cpu_count() or 1) // count)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        QUIET: "1",
        _MEETING: f"file://{folder}/meeting",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
    }
    with (folder / f"{rank}.stderr").open("wb") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "homer_triton", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=None if rank == 0 else subprocess.DEVNULL,
            stderr=None if rank == 0 else stderr,
            start_new_session=True,  # this process passes on interrupts, once
        )


def _first_to_fail(ranks: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait, and return the number of the first rank that fails, or None if none does."""
    while True:
        codes = [process.poll() for process in ranks]
        for rank, code in enumerate(codes):
            if code:
                return rank
        if None not in codes:
            return None
        time.sleep(0.05)


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the ranks that still run; they remove their unfinished files. A second interrupt ends
    them at once.
    """
    caught()  # else the interrupt that led here would be raised again
    try:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + _PATIENCE
        for process in ranks:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def _without(option: str, arguments: Sequence[str]) -> list[str]:
    """The command line without this option and its value."""
    left = iter(arguments)
    kept = []
    for word in left:
        if word == option:
            next(left, None)
        elif not word.startswith(f"{option}="):
            kept.append(word)
    return kept
