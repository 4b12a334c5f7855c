"""Writing files so that nothing is lost: a failure leaves what was there before, and no output
takes the place of an input, of another output, or of what is no ordinary file.
"""

import hashlib
import os
import re
import stat
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path

from safetensors import SafetensorError

# What the options of a command read: a file, a folder that stands for the files in it, "-" for
# standard input, or several of them; None where the option was left out.
Inputs = Mapping[str, str | Path | Iterable[str | Path] | None]

_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "it is a folder"),
    (stat.S_ISFIFO, "it is a pipe, not a file"),
    (stat.S_ISSOCK, "it is a socket, not a file"),
    (stat.S_ISCHR, "it is a device, not a file"),
    (stat.S_ISBLK, "it is a device, not a file"),
)
_STREAMS = {1: "standard output", 2: "standard error"}
_LEFTOVER = re.compile(r"\.(.+\.)?[0-9a-f]{32}\.tmp")


def check_outputs(outputs: Mapping[str, str | Path | None], inputs: Inputs) -> None:
    """Raise `ValueError` unless a file can be put at each output without harm: to be asked before
    hours of work, not after.

    outputs: by the options that name them, None for those left out. Inputs that are not there are
    left to whoever reads them.
    """
    options: dict[Path | tuple[int, int], str] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        _refuse_inputs(option, path, inputs)
        target = find_target(path)
        place = _identity(target) or target
        if place in options:
            raise ValueError(f"{options[place]} and {option} both name {path}; name two files.")
        options[place] = option
        check_writable(path)


def check_folder(option: str, folder: str | Path, inputs: Inputs) -> None:
    """Raise `ValueError` where one of the files in a folder that is written to is an input."""
    folder = Path(folder)
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        _refuse_inputs(option, file, inputs)


def check_writable(path: str | Path) -> None:
    """Raise `ValueError` unless a file can be put at `path`."""
    write_atomically(path, lambda _: None, keep=False)


def find_target(path: str | Path) -> Path:
    """The file that is written for `path`, which need not be there: a link leads to its target.

    Raises `ValueError` for folders, pipes, sockets and devices, for what standard output goes to,
    for files that may not be written and for links that lead nowhere.
    """
    if str(path) in ("", "."):
        raise ValueError('An output is named "" or "."; give the name of a file.')
    target = Path(os.path.realpath(path))
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return target
    except OSError as error:
        raise ValueError(f"Cannot write {path}: {error.strerror}.") from error
    for is_kind, reason in _KINDS:
        if is_kind(found.st_mode):
            raise ValueError(f"Cannot write {path}: {reason}.")
    for stream, name in _STREAMS.items():
        if _identity(stream) == (found.st_dev, found.st_ino):
            raise ValueError(f"Cannot write {path}: {name} goes there.")
    if not os.access(path, os.W_OK):
        raise ValueError(f"Cannot write {path}: the file is write-protected.")
    return target


def write_atomically(
    path: str | Path, write: Callable[[Path], object], *, keep: bool = True
) -> None:
    """Let `write` fill a temporary file beside the file that `path` names, then rename it into
    place (or drop it, if not `keep`). A file that was there keeps its permissions, a new one gets
    those of any new file.

    Raises `ValueError` as `find_target` does, and where the folder is missing or cannot be written.
    """
    target = find_target(path)
    # Half of it tells for which file.
    kind = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]
    temporary = target.with_name(f".{kind}{uuid.uuid4().hex[:16]}.tmp")
    try:
        with temporary.open("xb") as lock:
            flock(lock, LOCK_EX)
            sweep(target.parent, kind)
            mode = stat.S_IMODE((target if target.exists() else temporary).stat().st_mode)
            _set_mode(temporary, mode | stat.S_IWUSR)
            write(temporary)
            _set_mode(temporary, mode)  # `write` may have put another file there
            if keep:
                os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"Cannot write {path}: {reason}.") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def is_leftover(path: Path) -> bool:
    """Whether this is a temporary file that was being written when its process was killed."""
    return _LEFTOVER.fullmatch(path.name) is not None


def sweep(folder: Path, kind: str = "") -> None:
    """Remove what processes left in a folder that were killed while they wrote to it: nobody locks
    it. kind: what the names begin with of one file's, those of all if left out.
    """
    for file in filter(is_leftover, folder.glob(f".{kind}*.tmp")):
        with suppress(OSError), file.open("rb") as lock:
            flock(lock, LOCK_EX | LOCK_NB)
            file.unlink()


def _set_mode(path: Path, mode: int) -> None:
    with suppress(PermissionError):  # not every file system has them
        path.chmod(mode)


def _refuse_inputs(option: str, path: str | Path, inputs: Inputs) -> None:
    """Raise `ValueError` where `path` is one of the inputs, by whatever name or link."""
    own = _identity(path)
    if own is None:
        return
    for source, given in inputs.items():
        for item in [given] if isinstance(given, str | Path) else given or ():
            if _holds(item, own):
                raise ValueError(
                    f"{option} would write over {path}, which {source} reads; give another name."
                )


def _holds(item: str | Path, own: tuple[int, int]) -> bool:
    """Whether an input is this file, or a folder that has it."""
    folder = os.path.expanduser(item)
    if os.path.isdir(folder):
        return any(_identity(file.path) == own for file in os.scandir(folder))
    return _identity(0 if item == "-" else item) == own


def _identity(path: str | Path | int) -> tuple[int, int] | None:
    """What tells a file, or an open one by its number, from all others; None for one not there."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino
