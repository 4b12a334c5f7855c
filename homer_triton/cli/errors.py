"""What users see when something goes wrong: one sentence on stderr and an exit code."""

import errno
import os
import sys
from typing import Any

from .help import Group
from .interrupts import QUIET, leave_interrupted, was_interrupted

BAD_INPUT = 2
LOST_RANK = 1

_OUT_OF_MEMORY = (
    "out of memory; lower --max-chunk-len, --target-len, --leaf-batch or --max-new-tokens, load in "
    "--dtype bfloat16, or use a device with more memory."
)


class ReportingGroup(Group):
    """The commands. An error that a user can fix becomes one sentence on stderr.

    For bad input the library raises `ValueError` or `FileNotFoundError`, with a message that says
    what to change. An `OSError` is reported with the system's reason. Any other exception is a bug
    and keeps its traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            leave_interrupted()
        except Exception as error:
            if was_interrupted():
                leave_interrupted()
            if isinstance(error, _rank_errors()):
                if QUIET not in os.environ:  # else the parent process reports which rank failed
                    print(f"homer: {error}", file=sys.stderr)
                sys.exit(LOST_RANK)
            sentence = _describe(error)
            if sentence is None:
                raise
            print(f"homer: {sentence}", file=sys.stderr)
            sys.exit(BAD_INPUT)


def _rank_errors() -> tuple[type[Exception], ...]:
    """The exception for a lost rank, if the module that defines it has been imported."""
    ranks = sys.modules.get("homer_triton.ranks")
    return () if ranks is None else (ranks.RankError,)


def _describe(error: Exception) -> str | None:
    """One sentence for a user about an error; None for a bug."""
    if isinstance(error, ValueError | FileNotFoundError):
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        # EPIPE only means that the reader of the output has stopped reading.
        return None if error.errno == errno.EPIPE else describe_failure(error)
    return _OUT_OF_MEMORY if _is_out_of_memory(error) else None


def describe_failure(error: OSError) -> str:
    """One sentence about what the system refused."""
    reason = error.strerror or str(error)
    if error.filename is None:
        return f"Cannot write the result: {reason}."
    return f"Cannot use {str(error.filename)[:200]}: {reason}."


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out. Only Python and CUDA's allocator raise their own exception types; the
    others are found by their message.
    """
    return isinstance(error, MemoryError) or any(
        sign in str(error)
        for sign in ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
    )
