"""What goes wrong with checkpoints, apart from plain bad arguments (`ValueError`)."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: corrupt, incomplete, or of an unsupported model."""


class MissingCheckpointError(FileNotFoundError):
    """A checkpoint, or a file that one must have, that is not there."""
