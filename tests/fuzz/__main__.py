"""`python -m fuzz`: attempts of all kinds until the time is over or there are enough of them.

Prints how many there were of each kind and every seed that failed, and exits with 1 where one did.
A seed's attempt is made again by `--kinds KIND --seed SEED --KIND 1`.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path

from .answers import Answers
from .attempts import Kind, run_attempts
from .commands import Commands
from .files import Files
from .kills import Kills
from .trees import Trees

KINDS: dict[str, type[Kind]] = {
    "trees": Trees,
    "answers": Answers,
    "files": Files,
    "commands": Commands,
    "kills": Kills,
}
# Seconds that one kind is given before another has its turn.
TURN = 20.0
LONGEST_DETAIL = 4000


@dataclass
class Tally:
    """What was tried of a kind. most: how many attempts to make, None for as many as there is time
    for; seconds, processor: how long they took, by the clock and of the processor's time; failed:
    seeds by what was wrong.
    """

    kind: Kind
    folder: Path
    most: int | None
    tried: int = 0
    seconds: float = 0.0
    processor: float = 0.0
    failed: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    @property
    def done(self) -> bool:
        return self.most is not None and self.tried >= self.most

    def go_on(self, first: int, until: float) -> None:
        """Make attempts until a time, an attempt's end after it; first: the run's first seed."""
        start, used = time.perf_counter(), _processor_time()
        most = None if self.most is None else self.most - self.tried
        seeds = islice(count(first + self.tried), most)
        while batch := [*islice(seeds, self.kind.together)]:
            for seed, what, detail in run_attempts(self.kind, batch, self.folder):
                self.tried += 1
                if what:
                    self._note(seed, what, detail)
            if time.perf_counter() > until:
                break
        self.seconds += time.perf_counter() - start
        self.processor += _processor_time() - used

    def _note(self, seed: int, what: str, detail: str) -> None:
        """Remember a failure, and show the first one of its sort at once."""
        if what not in self.failed:
            shown = detail[-LONGEST_DETAIL:]
            print(f"{self.kind.name} {seed}: {what}\n{shown}\n", file=sys.stderr, flush=True)
        self.failed[what].append(seed)


def fuzz(
    kinds: Sequence[str], folder: Path, seed: int, most: dict[str, int | None], minutes: float
) -> list[Tally]:
    """Make attempts of these kinds by turns, from the seed on, until the minutes are over or there
    are enough of each, or Ctrl-C comes.
    """
    tallies = []
    for name in kinds:
        own = folder / name
        for part in ("kept", "attempts"):
            (own / part).mkdir(parents=True)
        tallies.append(Tally(KINDS[name](own / "kept"), own / "attempts", most.get(name)))
    end = time.perf_counter() + 60 * minutes
    with suppress(KeyboardInterrupt):  # what there is so far is worth telling
        while waiting := [tally for tally in tallies if not tally.done]:
            if time.perf_counter() > end:
                break
            next_one = min(waiting, key=lambda tally: tally.seconds)
            next_one.go_on(seed, min(end, time.perf_counter() + TURN))
    return tallies


def _processor_time() -> float:
    """Seconds that this process and those that it has started have computed."""
    return sum(os.times()[:4])


def report(tallies: Sequence[Tally]) -> str:
    """A line for each kind, and all seeds that failed by what was wrong."""
    headings = ("tried", "failed", "minutes", "processor's", "per minute of it")
    lines = ["kind      " + "".join(f"{name:>18}" for name in headings)]
    for tally in tallies:
        failed = sum(map(len, tally.failed.values()))
        rate = 60 * tally.tried / tally.processor if tally.processor else 0.0
        lines.append(
            f"{tally.kind.name:<10}{tally.tried:>18,}{failed:>18,}{tally.seconds / 60:>18.1f}"
            f"{tally.processor / 60:>18.1f}{rate:>18,.0f}"
        )
    for tally in tallies:
        for what, seeds in sorted(tally.failed.items()):
            lines += ["", f"{tally.kind.name}: {what}", f"  seeds {' '.join(map(str, seeds))}"]
    return "\n".join(lines)


def main() -> int:
    """The exit code: 1 where an attempt failed."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="the most that all take")
    parser.add_argument("--seed", type=int, default=0, help="of the first attempt of each kind")
    parser.add_argument("--kinds", default=",".join(KINDS), help="which, with commas")
    for name in KINDS:
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"no more {name} than this")
    given = vars(parser.parse_args())
    kinds = [name.strip() for name in given["kinds"].split(",")]
    if unknown := [name for name in kinds if name not in KINDS]:
        parser.error(f"--kinds {unknown[0]!r} is none of {', '.join(KINDS)}.")
    folder = Path(tempfile.mkdtemp(prefix="homer-fuzz-"))
    try:
        most = {name: given[name] for name in KINDS}
        tallies = fuzz(kinds, folder, given["seed"], most, given["minutes"])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(report(tallies))
    return int(any(tally.failed for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
