"""Handling of Ctrl-C, which may come at any time, even while libraries are imported."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130
# Set for the processes that a command starts. Only the command prints messages.
QUIET = "HOMER_RANK_OF_A_COMMAND"
# Seconds after which an interrupt that our code has not caught is raised again. Cleaning up on the
# way out takes less.
AGAIN = 2.0

_pressed = False


class Interrupted(SystemExit):
    """The exit after an interrupt, when the message has been printed."""


def was_interrupted() -> bool:
    """Whether there was an interrupt, which may have caused any later failure."""
    return _pressed


def caught() -> None:
    """Do not raise the interrupt again: our code handles it, and cleaning up may take long."""
    signal.setitimer(signal.ITIMER_REAL, 0)


def leave_interrupted() -> NoReturn:
    """Print that the command was interrupted, and exit."""
    caught()
    if QUIET not in os.environ:
        print("homer: interrupted.", file=sys.stderr)
    raise Interrupted(INTERRUPTED)


@contextmanager
def heard_interrupts() -> Iterator[None]:
    """Let Ctrl-C raise `KeyboardInterrupt` again and again until our code catches it.

    Python drops exceptions in destructors, and some libraries drop them while they are imported.
    Where interrupts are ignored, as in background jobs, they stay ignored.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    before = signal.signal(signal.SIGINT, _interrupt), signal.signal(signal.SIGALRM, _interrupt)
    hook, sys.unraisablehook = sys.unraisablehook, _drop_interrupts
    try:
        yield
    finally:
        caught()
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGALRM, before[1])
        sys.unraisablehook = hook


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _pressed
    _pressed = True
    signal.setitimer(signal.ITIMER_REAL, AGAIN)
    raise KeyboardInterrupt


def _drop_interrupts(dropped: sys.UnraisableHookArgs) -> None:
    """Print an exception that Python drops. For an interrupt, raise it again soon instead."""
    if issubclass(dropped.exc_type, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, 0.01)
    else:
        sys.__unraisablehook__(dropped)
