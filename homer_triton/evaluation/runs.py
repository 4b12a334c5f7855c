"""Run folders: a run's settings, every prediction as it is made, and the figures at the end.

A run that was killed goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import IO, Any

from ..storage.files import check_writable, is_leftover, sweep, write_atomically

Record = dict[str, Any]

# What JSON may write, and UTF-8 may not: half a character, as in a file's name of other bytes.
_ESCAPED = "backslashreplace"

# What reading a damaged file raises.
_DAMAGED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)

# What records say in numbers, where they say it.
FIGURES = ("right", "held", "seconds", "peak_bytes")
# Settings that say which predictions there are and not what they are: a run may grow.
COUNTS = ("methods", "tasks", "lengths", "depths", "samples", "segments", "max_length")


class RunFolder:
    """An evaluation's folder: config.json, predictions.jsonl, metrics.json and plots.

    A prediction is a record with an "id" that names it within the run.
    """

    def __init__(self, path: str | Path, settings: Record, environment: Record) -> None:
        """Open a folder, or make it.

        settings: what decides the results; a folder made with others is refused, but for those of
        `COUNTS`, which only say which predictions there are. environment: what else to remember.
        Raises `ValueError` for such a folder, for one that holds something else, and where it
        cannot be written.
        """
        self.path = Path(path)
        self._predictions = self.path / "predictions.jsonl"
        settings = json.loads(json.dumps(settings))
        config = self.path / "config.json"
        try:
            if config.is_file():
                for name in ("predictions.jsonl", "metrics.json"):
                    check_writable(self.path / name)
                there = _read_config(config)
                _refuse_other_settings(config, there["settings"], settings)
                if there["settings"] != settings:
                    self._write("config.json", {**there, "settings": settings})
            elif self.path.is_dir() and not all(map(is_leftover, self.path.iterdir())):
                raise ValueError(
                    f"The folder {self.path} is not empty and holds no run; name another."
                )
            else:
                self.path.mkdir(parents=True, exist_ok=True)
                self._write("config.json", {"settings": settings, "environment": environment})
            sweep(self.path)
        except OSError as error:
            raise ValueError(f"Cannot write {self.path}: {error.strerror}.") from error
        self.records = self._read_predictions()

    def complete(self, cell: Record, predict: Callable[[], Record]) -> None:
        """Make a prediction unless it is there, and write it at once.

        cell: the record's "id" and what else says which prediction it is; `predict` adds the rest.
        One that fails is recorded with its error.
        """
        if cell["id"] in self.records:
            return
        try:
            outcome = predict()
        except Exception as error:  # one bad sample must not end hours of work, nor be left out
            outcome = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        record = {**cell, **outcome}
        with self._predictions.open("a", encoding="utf-8", errors=_ESCAPED) as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.records[cell["id"]] = record

    def finish(self, metrics: Record) -> None:
        """Write the figures."""
        self._write("metrics.json", metrics)

    def _write(self, name: str, content: Record) -> None:
        text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        encoded = text.encode(errors=_ESCAPED)
        write_atomically(self.path / name, lambda file: file.write_bytes(encoded))

    def _read_predictions(self) -> dict[str, Record]:
        """The predictions so far, by id; a last line cut short is dropped from the file."""
        if not self._predictions.exists():
            return {}
        records: dict[str, Record] = {}
        with self._predictions.open("rb+") as file:
            for number, line in enumerate(iter(file.readline, b""), 1):
                if not line.endswith(b"\n"):
                    _cut(file, len(line))
                    break
                try:
                    record = json.loads(line)
                    for name in FIGURES:
                        figure = record.get(name, 0)
                        if figure is None and name != "right":  # not known
                            continue
                        if not isinstance(figure, float | int) or not isfinite(figure):
                            raise TypeError("a figure is no number")
                    records[record["id"]] = record
                except _DAMAGED as error:
                    raise ValueError(
                        f"Line {number} of {self._predictions} is damaged; delete that line."
                    ) from error
        return records


def _read_config(config: Path) -> Record:
    """A run's settings and environment."""
    try:
        there: Record = json.loads(config.read_text(encoding="utf-8"))
        if not isinstance(there["settings"], dict):
            raise TypeError("settings are by name")
    except _DAMAGED as error:
        raise ValueError(f"{config} is not a run's config; name another folder.") from error
    return there


def _refuse_other_settings(config: Path, there: Record, settings: Record) -> None:
    names = sorted((settings.keys() | there.keys()) - set(COUNTS))
    other = [name for name in names if settings.get(name) != there.get(name)]
    if other:
        raise ValueError(
            f"{config.parent} holds a run with other settings ({', '.join(other)}); name another "
            "folder or repeat that run's command."
        )


def _cut(file: IO[bytes], length: int) -> None:
    """Take the last `length` bytes off a file."""
    file.seek(-length, 2)
    file.truncate()
