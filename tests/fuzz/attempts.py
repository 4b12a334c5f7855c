"""Attempts in forked processes: one that crashes, hangs or eats memory is seen and hurts no other.

What all of them need is imported, and their models are loaded, before the first fork.
"""

import gc
import json
import os
import resource
import select
import shutil
import signal
import traceback
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Protocol

MIB = 2**20


class FaultError(Exception):
    """What an attempt found wrong. what: in a few words, the same for the same fault; detail: of
    this case.
    """

    def __init__(self, what: str, detail: str = "") -> None:
        super().__init__(what, detail)
        self.what, self.detail = what, detail


class Kind(Protocol):
    """One kind of attempts. together: how many share a process; seconds: one that takes longer
    hangs.
    """

    name: str
    together: int
    seconds: float

    def attempt(self, draw: Random, folder: Path) -> None:
        """Make the attempt that `draw` gives, in an empty folder. Raises `FaultError`."""


def run_attempts(kind: Kind, seeds: Iterable[int], folder: Path) -> Iterator[tuple[int, str, str]]:
    """Each seed with what is wrong, "" for nothing, and its detail. folder: for the attempts' own
    folders, which are removed again.
    """
    left = list(seeds)
    gc.freeze()  # or every process would copy what it only looks through
    while left:
        for seed, what, detail in _run_together(kind, left[: kind.together], folder):
            shutil.rmtree(folder / str(seed), ignore_errors=True)
            yield seed, what, detail
            left.remove(seed)


def peak_rss() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def limit_memory(more: int) -> None:
    """Let this process allocate so many bytes beyond what it has."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now = int(fields["VmData"].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (now + more, now + more))


def _run_together(kind: Kind, seeds: list[int], folder: Path) -> Iterator[tuple[int, str, str]]:
    """The attempts of one process, up to the first that ends it."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        _work(kind, seeds, folder, writing)
    os.close(writing)
    with suppress(OSError):
        os.setpgid(process, process)  # whichever of the two comes first
    done = 0
    try:
        for line in _lines(reading, kind.seconds):
            if line is None:
                yield seeds[done], f"took more than {kind.seconds:g} s", ""
                return
            yield seeds[done], *json.loads(line)
            done += 1
    finally:
        os.close(reading)
        os.killpg(process, signal.SIGKILL)  # all that it has started, too
        _, status = os.waitpid(process, 0)
    if done < len(seeds):
        code = os.waitstatus_to_exitcode(status)
        ending = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        yield seeds[done], f"the process ended with {ending}", ""


def _work(kind: Kind, seeds: list[int], folder: Path, pipe: int) -> None:
    """Make the attempts and write what is wrong with each to the pipe, a line each; never
    returns.
    """
    try:
        os.setpgid(0, 0)
        _be_quiet()
        with os.fdopen(pipe, "w") as results:
            for seed in seeds:
                print(
                    json.dumps(_attempt(kind, seed, folder / str(seed))), file=results, flush=True
                )
        signal.pause()  # the process group must be there until it is ended
    finally:
        os._exit(1)


def _attempt(kind: Kind, seed: int, folder: Path) -> tuple[str, str]:
    folder.mkdir()
    try:
        kind.attempt(Random(f"{kind.name}/{seed}"), folder)
    except FaultError as fault:
        return fault.what, fault.detail
    except BaseException as error:
        return describe(error), traceback.format_exc()
    return "", ""


def describe(error: BaseException) -> str:
    """The exception and where it came from: the last line of ours, and the last one of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if is_own(frame.filename)]
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in (*own[-1:], *frames[-1:])]
    return f"{type(error).__name__} at {' '.join(dict.fromkeys(places))}"


def is_own(filename: str) -> bool:
    """Whether a source file is homer_triton's."""
    source, root = Path(filename).resolve(), Path(__file__).resolve().parents[2]
    return any(source.is_relative_to(root / name) for name in ("homer_triton", "kernels", "model"))


def _be_quiet() -> None:
    """Nothing on the terminal, nothing from it, and its Ctrl-C is for the parent alone."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)


def _lines(pipe: int, seconds: float) -> Iterator[bytes | None]:
    """Lines as they come; None, and no more, where one takes too long."""
    buffered = b""
    while True:
        line, newline, rest = buffered.partition(b"\n")
        if newline:
            buffered = rest
            yield line
            continue
        if not select.select([pipe], [], [], seconds)[0]:
            yield None
            return
        more = os.read(pipe, 2**16)
        if not more:
            return
        buffered += more
