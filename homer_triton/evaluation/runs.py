"""Run folders: a run's settings, every prediction as it is made, and the figures at the end.

A run that was killed goes on where it stopped when the same command is given again, on as many
processes as before or on others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import IO, Any

from ..ranks import Ranks
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

    A prediction is a record with an "id" that names it within the run. Ranks that share a run write
    theirs to files of their own, predictions-1.jsonl and so on, which the first one takes in.
    """

    def __init__(
        self,
        path: str | Path,
        settings: Record,
        environment: Record,
        ranks: Ranks | None = None,
    ) -> None:
        """Open a folder, or make it.

        settings: what decides the results; a folder made with others is refused, but for those of
        `COUNTS`, which only say which predictions there are. environment: what else to remember.
        ranks: the processes that share the run, and all see the folder; this one alone if left out.
        Raises `ValueError` for such a folder, for one that holds something else, where it cannot be
        written, and where ranks have other settings.
        """
        self.path = Path(path)
        self.records: dict[str, Record] = {}
        self._ranks, self._groups = ranks, 0
        settings = json.loads(json.dumps(settings))
        if ranks is None:
            self._open(settings, environment)
            return
        with ranks.agreeing() as facts:
            facts.update(settings)
            if not ranks.rank:
                self._open(settings, environment)
        self.records = ranks.share(self.records)

    def _open(self, settings: Record, environment: Record) -> None:
        """Open the folder as its first rank, with all predictions that are there."""
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
        self._take_in()

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes the figures."""
        return self._ranks is None or self._ranks.rank == 0

    def mine(self, ids: Sequence[str]) -> list[str]:
        """Those of a group of predictions that this process has to make: all that are missing, or
        none where they are another rank's. Ranks take turns, group by group, so all of them must
        ask for the same groups in the same order.
        """
        missing = [name for name in ids if name not in self.records]
        if self._ranks is None or not missing:
            return missing
        self._groups += 1
        return missing if self._groups % self._ranks.size == self._ranks.rank else []

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
        self._append(self._own_file, [record])

    def gather(self) -> None:
        """Bring together what all ranks predicted, once each has made what it had to."""
        if self._ranks is None:
            return
        self._ranks.gather(None)
        if self.is_first:
            self._take_in()
        self.records = self._ranks.share(self.records)

    def finish(self, metrics: Record) -> None:
        """Write the figures, on the first rank."""
        if self.is_first:
            self._write("metrics.json", metrics)

    @property
    def _own_file(self) -> Path:
        """Where this process's predictions go."""
        rank = "" if self._ranks is None or self.is_first else f"-{self._ranks.rank}"
        return self.path / f"predictions{rank}.jsonl"

    def _append(self, path: Path, records: Sequence[Record]) -> None:
        with path.open("a", encoding="utf-8", errors=_ESCAPED) as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        self.records.update((record["id"], record) for record in records)

    def _take_in(self) -> None:
        """Read all predictions, and move those of other ranks to where they all belong."""
        self.records = _read_predictions(self.path / "predictions.jsonl")
        for path in sorted(self.path.glob("predictions-*.jsonl")):
            theirs = _read_predictions(path)
            new = [record for name, record in theirs.items() if name not in self.records]
            self._append(self.path / "predictions.jsonl", new)
            path.unlink()

    def _write(self, name: str, content: Record) -> None:
        text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        encoded = text.encode(errors=_ESCAPED)
        write_atomically(self.path / name, lambda file: file.write_bytes(encoded))


def _read_predictions(path: Path) -> dict[str, Record]:
    """The predictions so far, by id; a last line cut short is dropped from the file."""
    if not path.exists():
        return {}
    records: dict[str, Record] = {}
    with path.open("rb+") as file:
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
                    f"Line {number} of {path} is damaged; delete that line."
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
