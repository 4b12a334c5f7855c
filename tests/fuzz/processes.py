"""The `homer` command as a process of its own, forked with everything imported: it starts at once
and does what a cold one does.
"""

import os
import re
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

INTERRUPTED = 130
# An interrupt that fell into a finalizer, where Python can pass none on.
_UNHEARD = re.compile(
    r"^Exception ignored in: .*?^KeyboardInterrupt:? ?\n", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Ended:
    """What a command left: its exit code, minus the signal's number for one that a signal ended;
    and its streams. interrupted: it took too long and was sent Ctrl-C; seconds: what it took of the
    processor's time.
    """

    code: int
    stdout: str
    stderr: str
    interrupted: bool = False
    seconds: float = 0.0

    def __str__(self) -> str:
        """Without most of long streams."""
        ending = f"exit code {self.code}" + ", interrupted" * self.interrupted
        return f"{ending}\n{self.stdout[:200]}\n{self.stderr[-2000:]}"


class Homer:
    """A running command. folder: its working folder; stdin: the file that it reads, None for closed
    standard input; stdout: where that goes, in place of a file; encoding: the terminal's;
    prepare: called in the process before the command.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        streams: Path,
        stdin: str | None = os.devnull,
        stdout: str | None = None,
        encoding: str = "utf-8",
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        streams.mkdir(exist_ok=True)
        self._stdout, self._stderr = streams / "stdout", streams / "stderr"
        for stream in (self._stdout, self._stderr):
            stream.write_text("")  # another command may have left some
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.chdir(folder)
                _connect(stdin, stdout or str(self._stdout), str(self._stderr), encoding)
                prepare()
                os._exit(_run(arguments))
            finally:
                os._exit(70)

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless the command is over."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds: float, patience: float = 30.0) -> Ended:
        """How it ends: by itself, or by Ctrl-C after so many seconds.

        Raises `TimeoutError` where that does not end it within `patience` seconds.
        """
        interrupted = False
        handle = os.pidfd_open(self.pid)
        try:
            if not select.select([handle], [], [], seconds)[0]:
                interrupted = True
                self.send(signal.SIGINT)
                if not select.select([handle], [], [], patience)[0]:
                    self.send(signal.SIGKILL)
                    raise TimeoutError
        finally:
            os.close(handle)
            _, status, usage = os.wait4(self.pid, 0)
        stdout, stderr = (
            file.read_text(encoding="utf-8", errors="replace")
            for file in (self._stdout, self._stderr)
        )
        code, seconds = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        return Ended(code, stdout, _UNHEARD.sub("", stderr), interrupted, seconds)


def _connect(stdin: str | None, stdout: str, stderr: str, encoding: str) -> None:
    """Take the place of Python's own beginning: streams, and what Ctrl-C does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file, flags in (
        (0, stdin or os.devnull, os.O_RDONLY),
        (1, stdout, os.O_WRONLY),
        (2, stderr, os.O_WRONLY | os.O_CREAT),
    ):
        opened = os.open(file, flags)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stderr = open(  # noqa: SIM115
        2, "w", encoding=encoding, errors="backslashreplace", buffering=1, closefd=False
    )
    if stdin is None:
        os.close(0)
        sys.stdin = None  # type: ignore[assignment]


def _run(arguments: Sequence[str]) -> int:
    """The exit code of `homer`, as Python itself ends with it."""
    from homer_triton.cli import main

    sys.argv = ["homer", *arguments]
    code: object = 0
    try:
        try:
            main()
        except SystemExit as ending:
            code = ending.code
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what comes after is Python's own
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)
