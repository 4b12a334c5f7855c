"""The file of a document: a safetensors file that is mapped into memory, and filled chunk by chunk.

It has its full size from the start. A reading that was interrupted goes on where it stopped: the
checksums say which chunks are there.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from fcntl import LOCK_EX, LOCK_NB, flock
from math import prod
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from .files import find_target
from .tensor_file import LONGEST_DESCRIPTION, parse_description

KIND = "homer_triton.document"
# Tensors by name, with their dtype, in the order of the file: the widest come first, so that all
# are aligned.
DTYPES = {
    "unit_starts": ("I64", np.int64),
    "unit_spans": ("I64", np.int64),
    "checksums": ("I64", np.int64),
    "token_ids": ("I32", np.int32),
    "scales": ("F16", np.float16),
    "keys": ("I8", np.int8),
    "text": ("U8", np.uint8),
}
# What `create` is given whole; the rest is filled while the text is read.
GIVEN = ("unit_starts", "unit_spans", "token_ids", "text")
_LONGEST_HEADER = 1 << 24


class DocumentFile:
    """A document's tensors: views of a mapped file, or in memory alone.

    Attributes:
        described: What the reading depends on and what was read.
        tensors: By their names in `DTYPES`. `checksums` [chunks] are 0 for chunks that were not
            read.
    """

    def __init__(
        self, described: dict[str, Any], tensors: dict[str, Tensor], path: Path | None = None
    ) -> None:
        self.described = described
        self.tensors = tensors
        self.path = path
        self._lock: Any = None
        self._checked = torch.zeros(len(tensors["checksums"]), dtype=torch.bool, device="cpu")

    @classmethod
    def create(
        cls,
        described: dict[str, Any],
        given: Mapping[str, Tensor],
        shape: tuple[int, int, int],
        chunk_len: int,
        path: Path | None,
    ) -> DocumentFile:
        """Make room for a document's keys [N, G, D], or find what an earlier try has read of it.

        path: the finished file. What is not finished has ".partial" added to its name.

        Raises `ValueError` if the file cannot be written, or the disk has no room for all of it.
        """
        tokens, heads, _ = shape
        shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
        shapes |= {"keys": shape, "scales": (tokens, heads)}
        shapes["checksums"] = (-(-tokens // chunk_len),)
        described = {**described, "chunk_len": chunk_len, "given": _checksum_of(given)}
        if len(json.dumps(described)) > LONGEST_DESCRIPTION:
            raise ValueError("The texts' names are too many or too long; shorten them.")
        if path is None:
            tensors = {
                name: torch.from_numpy(np.zeros(shapes[name], own))
                for name, (_, own) in DTYPES.items()
            }
            file = cls(described, tensors)
        else:
            file = _open_partial(described, shapes, path)
        for name in GIVEN:
            file.tensors[name].copy_(given[name])
        return file

    @classmethod
    def open(cls, path: Path) -> DocumentFile:
        """Map a finished file. The keys are checked when they are first used.

        Raises `ValueError` for any other file, a damaged one, and one that is not finished.
        """
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_LONGEST_HEADER, path.stat().st_size - 8):
                raise ValueError("it has no header")
            try:
                header = json.loads(file.read(length))
                described = parse_description(header.pop("__metadata__")[KIND])
                shapes = {name: tuple(own["shape"]) for name, own in header.items()}
            except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
                raise ValueError("its header is that of another kind of file") from error
        _check_shapes(shapes, described)
        if header != _entries(shapes) or path.stat().st_size != _size(length, shapes):
            raise ValueError("its size or its tensors are not those of a document")
        tensors = _mapped(path, length, shapes, "c")
        if described["given"] != _checksum_of({name: tensors[name] for name in GIVEN}):
            raise ValueError("its checksum is another: some of it has changed since it was written")
        starts = tensors["unit_starts"]
        if starts[0] != 0 or (starts.diff() <= 0).any() or starts[-1] >= len(tensors["token_ids"]):
            raise ValueError("its units do not begin one after another within the text")
        if not tensors["checksums"].all():
            done = int((tensors["checksums"] != 0).sum())
            raise ValueError(f"only {done} of its {len(tensors['checksums'])} chunks were read")
        return cls(described, tensors, path)

    def write(self, path: Path) -> None:
        """Write all of it to another file.

        Raises `ValueError` if the file cannot be written.
        """
        described = {k: own for k, own in self.described.items() if k not in ("chunk_len", "given")}
        given = {name: self.tensors[name] for name in GIVEN}
        tokens, heads, dim = self.tensors["keys"].shape
        chunk_len = self.described["chunk_len"]
        file = DocumentFile.create(described, given, (tokens, heads, dim), chunk_len, path)
        for start in range(0, tokens, chunk_len):
            rows = slice(start, start + chunk_len)
            file.put(start, self.tensors["keys"][rows], self.tensors["scales"][rows])
        file.finish()

    def first_unread(self) -> int:
        """The first token of the first chunk that is not there."""
        unread = (self.tensors["checksums"] == 0).nonzero()
        chunk = int(unread[0]) if len(unread) else len(self.tensors["checksums"])
        return min(chunk * self.described["chunk_len"], len(self.tensors["token_ids"]))

    def put(self, start: int, keys: Tensor, scales: Tensor) -> None:
        """Write the keys of a chunk's tokens from `start` to the chunk's end."""
        stop = start + len(keys)
        self.tensors["keys"][start:stop] = keys
        self.tensors["scales"][start:stop] = scales
        chunk = start // self.described["chunk_len"]
        self.tensors["checksums"][chunk] = self._sum(chunk)
        self._checked[chunk] = True

    def finish(self) -> None:
        """Give a file that is complete its name."""
        if self._lock is None:
            return
        assert self.path is not None
        partial = _partial_of(self.path)
        try:
            os.fsync(self._lock.fileno())
            if self.path.exists():
                os.fchmod(self._lock.fileno(), stat.S_IMODE(self.path.stat().st_mode))
            os.replace(partial, self.path)
        except OSError as error:
            raise ValueError(f"Cannot write {self.path}: {error.strerror}.") from error
        finally:
            self.release()

    def release(self) -> None:
        """Let others go on with a file that is not finished."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def check(self) -> None:
        """Check the keys that were not checked so far. Raises `ValueError` if they changed."""
        for chunk in (~self._checked).nonzero()[:, 0].tolist():
            if self.tensors["checksums"][chunk] != self._sum(chunk):
                raise ValueError(
                    f"{self.path} is damaged: the keys of chunk {chunk} have changed since they "
                    "were written; read the text again."
                )
            self._checked[chunk] = True

    def _sum(self, chunk: int) -> int:
        """A chunk's checksum, above 0."""
        rows = slice(chunk * self.described["chunk_len"], (chunk + 1) * self.described["chunk_len"])
        total = 0
        for name in ("keys", "scales"):
            total = crc32(
                self.tensors[name][rows].contiguous().view(torch.uint8).numpy().data, total
            )
        return total + 1


def _open_partial(
    described: dict[str, Any], shapes: dict[str, tuple[int, ...]], path: Path
) -> DocumentFile:
    """The unfinished file of a reading, locked: an earlier one where it is of the same reading."""
    header = json.dumps(
        {"__metadata__": {KIND: json.dumps(described)}, **_entries(shapes)}
    ).encode()
    header += b" " * (-len(header) % 8)
    begin = len(header).to_bytes(8, "little") + header
    partial = _partial_of(find_target(path))
    lock = _locked(partial, path)
    try:
        if lock.read(len(begin)) != begin:
            lock.truncate(0)
            os.posix_fallocate(lock.fileno(), 0, _size(len(header), shapes))
            lock.seek(0)
            lock.write(begin)
            lock.flush()
        tensors = _mapped(partial, len(header), shapes, "r+")
    except OSError as error:
        if os.fstat(lock.fileno()).st_size == 0:
            partial.unlink(missing_ok=True)
        lock.close()
        raise ValueError(f"Cannot write {path}: {error.strerror}.") from error
    file = DocumentFile(described, tensors, find_target(path))
    file._lock = lock
    done = tensors["checksums"].nonzero()[:, 0].tolist()
    for chunk in done:  # a crash may have lost what was not yet on the disk
        if tensors["checksums"][chunk] != file._sum(chunk):
            tensors["checksums"][chunk] = 0
        else:
            file._checked[chunk] = True
    return file


def _locked(partial: Path, path: Path) -> BinaryIO:
    """The unfinished file of `path`, for this process alone, at its beginning.

    Raises `ValueError` if it is not one, or another process has it.
    """
    while True:
        try:
            number = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            lock = os.fdopen(number, "r+b")
        except OSError as error:
            raise ValueError(f"Cannot write {path}: {partial}: {error.strerror}.") from error
        try:
            flock(lock, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise ValueError(f"Another process is writing {path}; wait for it.") from None
        # Another process may have finished this very file, and renamed it.
        if partial.exists() and os.path.samestat(os.fstat(lock.fileno()), os.stat(partial)):
            break
        lock.close()
    found = lock.read(2048)
    if found and KIND.encode() not in found:
        lock.close()
        raise ValueError(f"{partial} is in the way and is no unfinished document; move it.")
    lock.seek(0)
    return lock


def _check_shapes(shapes: Mapping[str, tuple[Any, ...]], described: Mapping[str, Any]) -> None:
    """Raise `ValueError` for shapes that do not fit each other."""
    sizes = [size for shape in shapes.values() for size in shape]
    if shapes.keys() != DTYPES.keys() or any(type(size) is not int or size < 0 for size in sizes):
        raise ValueError("its tensors are not those of a document")
    tokens, units = prod(shapes["token_ids"]), prod(shapes["unit_starts"])
    chunk_len = described.get("chunk_len")
    if type(chunk_len) is not int or min(chunk_len, tokens, units) < 1:
        raise ValueError("it has no tokens, units or chunks")
    heads, dim = (*shapes["keys"], 0, 0, 0)[1:3]
    expected = {
        "token_ids": (tokens,),
        "unit_starts": (units,),
        "unit_spans": (units, 2),
        "keys": (tokens, heads, dim),
        "scales": (tokens, heads),
        "checksums": (-(-tokens // chunk_len),),
        "text": (prod(shapes["text"]),),
    }
    if shapes != expected:
        raise ValueError("its tensors do not fit each other")


def _partial_of(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _entries(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The header's entries of tensors with these shapes."""
    entries, reached = {}, 0
    for name, (kind, own) in DTYPES.items():
        if name not in shapes:
            raise ValueError(f"it has no {name}")
        stop = reached + prod(shapes[name]) * np.dtype(own).itemsize
        entries[name] = {
            "dtype": kind,
            "shape": list(shapes[name]),
            "data_offsets": [reached, stop],
        }
        reached = stop
    return entries


def _size(header: int, shapes: Mapping[str, tuple[int, ...]]) -> int:
    return 8 + header + _entries(shapes)["text"]["data_offsets"][1]


def _mapped(
    path: Path, header: int, shapes: Mapping[str, tuple[int, ...]], mode: Any
) -> dict[str, Tensor]:
    entries = _entries(shapes)
    tensors = {}
    for name, (_, own) in DTYPES.items():
        offset = 8 + header + entries[name]["data_offsets"][0]
        # Nothing can be mapped of a tensor without elements.
        is_empty = not prod(shapes[name])
        shape = tuple(shapes[name])
        array = np.zeros(shape, own) if is_empty else np.memmap(path, own, mode, offset, shape)
        tensors[name] = torch.from_numpy(array)
    return tensors


def _checksum_of(tensors: Mapping[str, Tensor]) -> int:
    total = 0
    for name in GIVEN:
        content = tensors[name].contiguous().flatten().view(torch.uint8)
        total = crc32(content.numpy().data, total)
    return total
