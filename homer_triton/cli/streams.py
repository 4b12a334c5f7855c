"""Standard input, output and error in any state: closed, full, or with a limited encoding."""

import codecs
import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import BAD_INPUT, describe_failure

# Replacements for characters that the terminal's encoding lacks. Others become an escape.
_LOOKALIKES = {"─": "-", "–": "-", "×": "x", "…": "...", "≥": ">="}


@contextmanager
def checked_streams() -> Iterator[None]:
    """Run a command, and exit with its code once all its output is written.

    If the output cannot be written, print one sentence and exit with code 2. If its reader has
    stopped reading, as `head` does, exit with code 1 and print nothing.
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
        # The interpreter flushes again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if error.errno == errno.EPIPE:
            code = code or 1
        elif code != BAD_INPUT:
            print(f"homer: {describe_failure(error)}", file=sys.stderr)
            code = BAD_INPUT
    sys.exit(code)


def _open_closed() -> None:
    """Open closed streams on /dev/null. Otherwise the next file to be opened would get the stream's
    number, and with it the output.
    """
    for descriptor, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        if descriptor and getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))


def _spell(error: UnicodeError) -> tuple[str, int]:
    """An error handler for `codecs`: replaces a character by a similar one, or by an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    spelt = [
        _LOOKALIKES.get(character) or character.encode("ascii", "backslashreplace").decode()
        for character in lost
    ]
    return "".join(spelt), error.end
