"""Where a checkpoint is: a local folder, or a copy of a Hugging Face hub repository."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .errors import MissingCheckpointError

# Everything that is read from a checkpoint; pickled weights never are, so they are not fetched.
_WEIGHTS = "*.safetensors"
_FILES = ("*.json", "tokenizer*", "*.model", "*.jinja")


def resolve(path_or_id: str | Path, weights: bool = True) -> Path:
    """The folder of a checkpoint, given as a local path or as a hub id (downloaded unless cached).

    weights: download them too; without, the configuration and the tokenizer only.

    Raises `MissingCheckpointError` if there is no such folder, no such repository, or no way to
    reach it.
    """
    try:
        path = Path(path_or_id).expanduser()
        is_folder, there = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # too long, not to be entered, or of no known user
        reason = getattr(error, "strerror", None) or error
        raise MissingCheckpointError(
            f"There is no checkpoint folder at {_short(path_or_id)}: {reason}."
        ) from None
    if is_folder:
        if os.fsencode(path) != str(path).encode(errors="replace"):
            raise MissingCheckpointError(
                f"The checkpoint's path {path} is not UTF-8, which its readers need; rename it."
            )
        return path
    if there:
        raise MissingCheckpointError(f"{path} is a file; give the folder that holds config.json.")
    try:
        validate_repo_id(str(path_or_id))
    except HFValidationError:
        raise MissingCheckpointError(f"There is no checkpoint folder at {path}.") from None
    patterns = [*_FILES, _WEIGHTS] if weights else list(_FILES)
    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=patterns))
    except Exception as error:  # gated, offline, disk full: the hub's client has a kind for each
        reason = " ".join(str(error).split())
        raise MissingCheckpointError(
            f"{str(path_or_id)!r} is neither a local folder nor a readable hub repository: {reason}"
        ) from error


def _short(name: str | Path) -> str:
    """A name's beginning, where it is longer than a sentence."""
    text = str(name)
    return text if len(text) <= 200 else f"{text[:200]}…"
