"""What goes wrong with checkpoints, apart from plain bad arguments (`ValueError`)."""

# A file may hold a megabyte where a number should be.
_LONGEST_MESSAGE = 1000


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: corrupt, incomplete, or of an unsupported model."""

    def __init__(self, message: str) -> None:
        super().__init__(shorten(message))


class MissingCheckpointError(FileNotFoundError):
    """A checkpoint, or a file that one must have, that is not there."""

    def __init__(self, message: str) -> None:
        super().__init__(shorten(message))


def shorten(message: object) -> str:
    """A message that quotes what a file holds, without its middle where that is long."""
    text = str(message)
    if len(text) <= _LONGEST_MESSAGE:
        return text
    half = _LONGEST_MESSAGE // 2
    return f"{text[:half]} … {text[-half:]}"


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust gave up: its panic is no `Exception` and has no class to import."""
    return type(error).__name__ == "PanicException"
