"""A checkpoint's safetensors files: what their headers list, and tensors read block by block."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import read_json
from .errors import CheckpointError, MissingCheckpointError

# A mapped file is resident memory as far as it was read, so every block has a mapping of its own.
_BLOCK_BYTES = 8 << 20
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, as the file's header describes it."""

    file: Path
    name: str
    shape: tuple[int, ...]


def catalogue(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in `folder`, by name, from the headers of its files.

    Raises `MissingCheckpointError` for files that are not there and `CheckpointError` for corrupt
    ones and for tensors that are not floats.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return _read_header(single)
    if not index.is_file():
        raise MissingCheckpointError(
            f"{folder} has neither {single.name} nor {index.name}; "
            "weights in .bin or .pth files are not read."
        )
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(_is_file_name(x) for x in shard_of.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to file names.")
    stored: dict[str, StoredTensor] = {}
    for shard in sorted(set(shard_of.values())):
        if not os.path.isfile(folder / shard):  # nor may the name be too long for one
            raise MissingCheckpointError(f"{index} names the shard {shard}, which is not there.")
        stored |= _read_header(folder / shard)
    absent = sorted(shard_of.keys() - stored.keys())
    if absent:
        raise CheckpointError(f"{index} lists {some(absent)}, which no shard holds.")
    return stored


def read_into(tensor: StoredTensor, place: Tensor) -> None:
    """Copy a stored tensor to `place`, which has its shape and any device and float dtype.

    Raises `CheckpointError` if a value is not finite, in the file or in `place`'s dtype.
    """
    rows = max(1, _BLOCK_BYTES // place[0].nbytes)
    for start in range(0, len(place), rows):
        block = slice(start, start + rows)
        with safe_open(tensor.file, framework="pt") as shard:
            place[block].copy_(shard.get_slice(tensor.name)[block])
    # The two extremes show any NaN (it spreads) and any infinity, without a copy of the tensor.
    low, high = torch.stack(place.aminmax()).tolist()
    if not -torch.inf < low <= high < torch.inf:
        raise CheckpointError(
            f"{tensor.name} in {tensor.file} holds NaN or infinity (read as {place.dtype})."
        )


def map_tensors(stored: Iterable[StoredTensor]) -> Iterator[Tensor]:
    """Each stored tensor as a view of its file, of which no more is read than is looked at."""
    for tensor in stored:
        with safe_open(tensor.file, framework="pt") as shard:
            yield shard.get_tensor(tensor.name)


def some(names: list[str]) -> str:
    """Up to three of the names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors that one file lists."""
    stored = {}
    try:
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (an open file is not a mapping)
                tensor = shard.get_slice(name)
                if tensor.get_dtype() not in _FLOATS:
                    raise CheckpointError(
                        f"{name} in {file} is of type {tensor.get_dtype()}; "
                        f"only {', '.join(_FLOATS)} are read."
                    )
                stored[name] = StoredTensor(file, name, tuple(tensor.get_shape()))
    except SafetensorError as error:
        raise CheckpointError(f"{file} is truncated or corrupt: {error}.") from error
    return stored


def _is_file_name(value: Any) -> bool:
    """Whether it names a file in the same folder."""
    return isinstance(value, str) and value != "" and Path(value).name == value
