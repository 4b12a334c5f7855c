"""What users see when something goes wrong: one sentence on stderr and an exit code."""

import sys
from typing import Any, NoReturn

from typer.core import TyperGroup

BAD_INPUT = 2
INTERRUPTED = 130

_OUT_OF_MEMORY = (
    "out of memory; lower --max-chunk-len, --target-len, --leaf-batch or --max-new-tokens, load in "
    "--dtype bfloat16, or use a device with more memory."
)


class ReportingGroup(TyperGroup):
    """The commands, with every error that a user can mend turned into one sentence.

    The library raises `ValueError` and `FileNotFoundError` for bad input, with a message that says
    what to change. Anything else is a bug and keeps its traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, FileNotFoundError) as error:
            _fail(" ".join(str(error).split()), BAD_INPUT)
        except KeyboardInterrupt:
            _fail("interrupted.", INTERRUPTED)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            _fail(_OUT_OF_MEMORY, BAD_INPUT)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: only Python and CUDA's allocator have exceptions of their own."""
    return isinstance(error, MemoryError) or any(
        sign in str(error)
        for sign in ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
    )


def _fail(sentence: str, code: int) -> NoReturn:
    print(f"homer: {sentence}", file=sys.stderr)
    sys.exit(code)
