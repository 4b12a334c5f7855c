"""The host's heap, which keeps most of what was freed for what will be allocated."""

import ctypes
import sys


def trim_heap() -> None:
    """Give memory that was freed back to the system, where the C library can (glibc)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
