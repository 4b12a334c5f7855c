"""Ctrl-C, which arrives wherever it is pressed: while libraries are imported too."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130
# Set for the processes that a command starts, which speaks for them.
QUIET = "HOMER_RANK_OF_A_COMMAND"
# Seconds after which an interrupt that was caught by nobody of ours comes once more. What is to be
# cleaned up on the way out takes less.
AGAIN = 2.0

_pressed = False


class Interrupted(SystemExit):
    """The exit after an interrupt, of which people have been told."""


def was_interrupted() -> bool:
    """Whether there was an interrupt: what failed since may have failed by it."""
    return _pressed


def caught() -> None:
    """Let an interrupt come no second time: the way out has begun, and may take long."""
    signal.setitimer(signal.ITIMER_REAL, 0)


def leave_interrupted() -> NoReturn:
    """Say so, and exit."""
    caught()
    if QUIET not in os.environ:
        print("homer: interrupted.", file=sys.stderr)
    raise Interrupted(INTERRUPTED)


@contextmanager
def heard_interrupts() -> Iterator[None]:
    """Let Ctrl-C raise `KeyboardInterrupt` until it is heard.

    Python drops an exception in a destructor, and libraries drop some while they are imported; so
    it is raised again. Where interrupts are ignored, as in the background, they stay so.
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
    """Print what Python drops, but for interrupts, which come again at once."""
    if issubclass(dropped.exc_type, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, 0.01)
    else:
        sys.__unraisablehook__(dropped)
