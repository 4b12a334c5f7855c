"""Standard input, output and error as users may have left them: closed, full, or of few letters."""

import codecs
import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import BAD_INPUT, describe_failure

# What a terminal shows that lacks a character of ours; of any other, its number.
_LOOKALIKES = {"─": "-", "–": "-", "×": "x", "…": "...", "≥": ">="}


@contextmanager
def checked_streams() -> Iterator[None]:
    """Run a command, and exit with its code once all that it printed is written.

    Where that cannot be, one sentence says so and the code is 2; a reader that has heard enough is
    no failure worth a word.
    """
    _open_closed()
    codecs.register_error("homer", _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "surrogateescape":
            stream.reconfigure(errors="homer")
    code: str | int | None = 0
    try:
        yield
    except SystemExit as left:
        code = left.code
    try:
        sys.stdout.flush()
    except OSError as error:
        # The interpreter flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if error.errno == errno.EPIPE:
            code = code or 1
        elif code != BAD_INPUT:
            print(f"homer: {describe_failure(error)}", file=sys.stderr)
            code = BAD_INPUT
    sys.exit(code)


def _open_closed() -> None:
    """Give output that is closed a place to go: another file would get its number, and its text."""
    for descriptor, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if descriptor and getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))


def _spell(error: UnicodeError) -> tuple[str, int]:
    """An error handler of `codecs`: characters by others that look like them, or by number."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    spelt = [
        _LOOKALIKES.get(character) or character.encode("ascii", "backslashreplace").decode()
        for character in lost
    ]
    return "".join(spelt), error.end
