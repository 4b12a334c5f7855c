"""Safetensors files that know whether they are whole: tensors, a description in JSON, and a
checksum over both.

A header says how large everything is, so that nothing large need be read, or made, before it is
known to fit.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import write_atomically

_CHECKSUM = "homer_triton.checksum"
# Descriptions take some kilobytes; parsed, JSON may take thirty times its length.
LONGEST_DESCRIPTION = 1 << 20

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorFile:
    """An opened file's description, and the names of its tensors' types and their shapes; the
    tensors themselves are still unread.
    """

    path: Path
    described: dict[str, Any]
    dtypes: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    text: str
    checksum: str

    @classmethod
    def open(cls, path: Path, kind: str, names: Iterable[str]) -> TensorFile:
        """Read the header of a file that `save_tensors` wrote. Raises `ValueError` for any other
        file, and for one with other tensors than `names`.
        """
        try:
            with _opened(path) as file:
                metadata = file.metadata() or {}
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                dtypes = {name: own.get_dtype() for name, own in slices.items()}
                shapes = {name: tuple(own.get_shape()) for name, own in slices.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(str(error)) from error
        if kind not in metadata:
            raise ValueError(f"its metadata has no {kind}")
        described = parse_description(metadata[kind])
        if _CHECKSUM not in metadata:
            raise ValueError("it has no checksum, so that an earlier version must have written it")
        if sorted(names) != sorted(shapes):
            raise ValueError(f"it holds {', '.join(sorted(shapes))}, not {', '.join(names)}")
        return cls(path, described, dtypes, shapes, metadata[kind], metadata[_CHECKSUM])

    def require(self, name: str, dtypes: Iterable[str], shape: tuple[int | None, ...]) -> None:
        """Raise `ValueError` unless a tensor has one of these types, and this shape; None is any
        size from 1 on.
        """
        found = self.shapes[name]
        if self.dtypes[name] not in dtypes:
            raise ValueError(f"{name} is of type {self.dtypes[name]} instead of {'/'.join(dtypes)}")
        fits = len(found) == len(shape) and all(
            size >= 1 if wanted is None else size == wanted
            for size, wanted in zip(found, shape, strict=True)
        )
        if not fits:
            wanted_sizes = ", ".join("…" if size is None else str(size) for size in shape)
            raise ValueError(f"{name} has the shape {list(found)} instead of [{wanted_sizes}]")

    def read(self) -> dict[str, Tensor]:
        """The tensors, on the CPU. Raises `ValueError` where they or the description have changed
        since they were saved.
        """
        try:
            with _opened(self.path) as file:
                tensors = {name: file.get_tensor(name) for name in self.shapes}
        except (SafetensorError, OSError) as error:
            raise ValueError(str(error)) from error
        if checksum_of(self.text, tensors) != self.checksum:
            raise ValueError("its checksum is another: some of it has changed since it was saved")
        return tensors


def save_tensors(
    path: str | Path, kind: str, described: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write one such file atomically; raises `ValueError` as `write_atomically` does."""
    text = json.dumps(described)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {kind: text, _CHECKSUM: checksum_of(text, contiguous)}
    write_atomically(path, lambda target: save_file(contiguous, target, metadata=metadata))


def parse_description(text: str) -> dict[str, Any]:
    """The JSON object in a file's metadata. Raises `ValueError` for anything else."""
    if len(text) > LONGEST_DESCRIPTION:
        raise ValueError(f"its description is too long ({len(text):,} characters)")
    try:
        described = json.loads(text)
    except RecursionError:
        raise ValueError("its description is nested too deeply") from None
    if not isinstance(described, dict):
        raise ValueError(f"its description is JSON's {text[:20]}, not an object")
    return described


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise `ValueError` for a tensor [n, ...] that holds NaN or infinity."""
    for part in tensor:  # one at a time bounds the memory
        # The two extremes show any NaN (it spreads) and any infinity, without a copy.
        low, high = part.aminmax()
        if not (low.isfinite() and high.isfinite()):
            raise ValueError(f"{name} holds NaN or infinity")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, which libraries open by names in UTF-8 alone: another by its number."""
    with ExitStack() as stack:
        name = os.fsencode(path).decode(errors="replace")
        if os.fsencode(path) != name.encode():
            name = f"/dev/fd/{stack.enter_context(path.open('rb')).fileno()}"
        yield stack.enter_context(safe_open(name, "pt"))


def checksum_of(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Thirty-two hexadecimal digits that depend on every bit."""
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        content = tensor.detach().contiguous().cpu().flatten()
        digest.update(content.view(torch.uint8).numpy().data)
    return digest.hexdigest()
