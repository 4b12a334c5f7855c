"""Writing files so that a failure leaves what was there before."""

import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def check_writable(path: str | Path) -> None:
    """Raise `ValueError` unless a file can be put at `path`: to be asked before hours of work, not
    after.
    """
    write_atomically(path, lambda _: None, keep=False)


def write_atomically(
    path: str | Path, write: Callable[[Path], object], *, keep: bool = True
) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it into place (or drop it, if
    not `keep`).

    Raises `ValueError` where the path is a folder, or its folder is missing or cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        temporary.open("xb").close()
        write(temporary)
        if keep:
            os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"Cannot write {path}: {reason}.") from error
    finally:
        if temporary.exists():
            temporary.unlink()


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write one safetensors file atomically; raises `ValueError` as `write_atomically` does."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda target: save_file(contiguous, target, metadata=metadata))
