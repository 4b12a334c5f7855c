"""Commands ended at drawn moments, by SIGKILL or Ctrl-C: nothing is lost, and the next run finds
nothing in its way.

Half of the moments are drawn from the command's time, half from what it does with files, where a
kill hurts most.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import homer_triton as ht
from homer_triton.demo import CHECKPOINT

from .attempts import FaultError
from .files import digest
from .places import PASSKEY, contents, text
from .processes import INTERRUPTED, Ended, Homer

# How long a command may take, and a cold start at most, in seconds.
ENOUGH, COLD = 120.0, 4.0
MODEL = ("--model", "model")
COMMANDS = {
    "encode": ("encode", *MODEL, "--context-file", "text.txt", "-o", "out.safetensors"),
    "calibrate": (
        *("calibrate", *MODEL, "--text", "text.txt", "--num-segments", "3"),
        *("--segment-len", "64", "-o", "bias.safetensors"),
    ),
    "show": ("show", "encoded.safetensors", *MODEL, "-o", "page.html"),
    "eval": ("eval", "passkey", *MODEL, *PASSKEY, "--no-plots", "-o", "run"),
}
OUTPUTS = {
    "encode": "out.safetensors",
    "calibrate": "bias.safetensors",
    "show": "page.html",
    "eval": "run",
}
EARLIER = b"what was there before"
# In a traceback: the command has begun to listen to Ctrl-C.
_LISTENING = re.compile(r'homer_triton/cli/__init__\.py", line \d+, in main')
# Runs homer as its console script does, from the first import on.
COLD_START = "from homer_triton.cli import main; main()"
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "os.chmod", "os.link")


@dataclass(frozen=True)
class Undisturbed:
    """A command that nothing ended: its seconds, its events with files (each by its number in
    `FILE_EVENTS`), the names of the files that it left, and what they hold.
    """

    seconds: float
    events: bytes
    left: frozenset[str]
    result: object


class Kills:
    """The demo's checkpoint, a short text and an encoding of it, and what every command makes of
    them.
    """

    name, together, seconds = "kills", 1, 600.0

    def __init__(self, folder: Path) -> None:
        self.pristine = folder / "pristine"
        shutil.copytree(CHECKPOINT, self.pristine / "model")
        (self.pristine / "text.txt").write_text(text(100))
        llama = ht.load(self.pristine / "model", device="cpu")
        encoded = ht.encode(llama, text(100), suffix="What is the pass key?")
        encoded.save(self.pristine / "encoded.safetensors")
        self.inputs = contents(self.pristine)
        self.undisturbed = {name: self._run(name, folder / name) for name in COMMANDS}

    def attempt(self, draw: Random, folder: Path) -> None:
        command = draw.choice(list(COMMANDS))
        place, output = self._place(folder), OUTPUTS[command]
        earlier = command != "eval" and draw.random() < 0.5
        if earlier:
            (place / output).write_bytes(EARLIER)
        number = draw.choice([signal.SIGKILL, signal.SIGINT])
        for _ in range(draw.choice([1, 1, 2])):
            moment, ended = self._end(draw, command, folder, number)
            told = f"{number.name} {moment}: {ended}"
            try:
                if number == signal.SIGINT:
                    check_interrupted(ended)
                self._check(command, place, earlier, number)
            except FaultError as fault:
                raise FaultError(f"{command}: {fault.what}", f"{fault.detail} {told}") from fault
        again = Homer(COMMANDS[command], place, folder / "streams").wait(ENOUGH)
        if again.code:
            raise FaultError(f"{command}: does not run after {number.name}", f"{told}, {again}")
        if read_result(command, place) != self.undisturbed[command].result:
            raise FaultError(f"{command}: another result after {number.name}", told)
        left = self._left(place)
        if left != self.undisturbed[command].left:
            raise FaultError(f"{command}: something is left after {number.name}", f"{left} {told}")

    def _end(
        self, draw: Random, command: str, folder: Path, number: signal.Signals
    ) -> tuple[str, Ended]:
        """Start a command and end it; when that was, and how it ended."""
        known, place = self.undisturbed[command], folder / "place"
        how = draw.choices(["time", "file", "cold"], [9, 9, 2])[0]
        if how == "cold":
            moment = draw.uniform(0.0, COLD)
            return f"{moment:.3f} s after a cold start", _end_cold(command, place, number, moment)
        after = draw.randrange(len(known.events))
        if how == "time":
            after, moment = -1, draw.uniform(0.0, 1.1 * known.seconds)
        ready, started = os.pipe()
        homer = Homer(
            COMMANDS[command],
            place,
            folder / "streams",
            prepare=lambda: _watch_files(place, started, after, number),
        )
        os.close(started)
        os.read(ready, 1)
        if how == "time":
            time.sleep(moment)
            homer.send(number)
        ended = homer.wait(ENOUGH)
        os.close(ready)
        return (f"after {moment:.3f} s" if how == "time" else f"at file event {after}"), ended

    def _check(self, command: str, place: Path, earlier: bool, number: signal.Signals) -> None:
        """Raise `FaultError` unless the inputs are as they were, and the output is whole, an old or
        a new one.
        """
        now = contents(place)
        if any(now.get(name) != content for name, content in self.inputs.items()):
            raise FaultError("an input is changed")
        output = OUTPUTS[command]
        if command != "eval" and (output in now or earlier) and now.get(output) != EARLIER:
            try:
                result = read_result(command, place)
            except Exception as error:
                raise FaultError("the output is damaged", str(error)) from error
            if result != self.undisturbed[command].result:
                raise FaultError("the output is neither the old one nor the new one")
        strange = self._left(place) - self.undisturbed[command].left
        if number == signal.SIGINT and strange:
            raise FaultError("Ctrl-C leaves a temporary file", str(strange))

    def _run(self, command: str, folder: Path) -> Undisturbed:
        place = self._place(folder)
        counted, counting = os.pipe()
        start = time.perf_counter()
        homer = Homer(
            COMMANDS[command],
            place,
            folder / "streams",
            prepare=lambda: _watch_files(place, counting, -1, signal.SIGKILL),
        )
        os.close(counting)
        ended = homer.wait(ENOUGH)
        assert ended.code == 0, ended
        seconds = time.perf_counter() - start
        events = os.read(counted, 2**16)[1:]
        os.close(counted)
        return Undisturbed(seconds, events, self._left(place), read_result(command, place))

    def _left(self, place: Path) -> frozenset[str]:
        """The names of the files in a place that are no inputs."""
        return frozenset(contents(place).keys() - self.inputs.keys())

    def _place(self, folder: Path) -> Path:
        place = folder / "place"
        shutil.copytree(self.pristine, place)
        return place


def check_interrupted(ended: Ended) -> None:
    """Raise `FaultError` unless Ctrl-C ended a command in a sentence, or came too late."""
    starting = ended.code == -signal.SIGINT or "Fatal Python error: init_" in ended.stderr
    if starting and _LISTENING.search(ended.stderr) is None:
        return  # while Python itself starts
    if "Traceback" in ended.stderr:
        raise FaultError("Ctrl-C leaves a traceback")
    if ended.code not in (0, INTERRUPTED):
        raise FaultError(f"Ctrl-C gives exit code {ended.code}")
    if ended.code and not ended.stderr.endswith("homer: interrupted.\n"):
        raise FaultError("Ctrl-C gives no sentence")


def read_result(command: str, place: Path) -> object:
    """What a command made, as far as it is the same each time."""
    output = place / OUTPUTS[command]
    if command == "encode":
        encoded = ht.EncodedContext.load(output)
        parts = ("keys", "values", "positions", "source_indices", "pruned_at", "logits")
        return digest({name: getattr(encoded, name) for name in parts})
    if command == "calibrate":
        return digest({"bias": ht.Calibration.load(output).bias})
    if command == "show":
        return output.read_bytes()
    metrics = json.loads((output / "metrics.json").read_text())
    answers = [json.loads(line) for line in (output / "predictions.jsonl").open()]
    rows = [*metrics["by_length"], *metrics["by_depth"], *answers]
    return [_without_costs(row) for row in rows]


def _without_costs(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in row if name not in ("seconds", "peak_bytes")}


def _watch_files(place: Path, pipe: int, after: int, number: signal.Signals) -> None:
    """Write a byte to the pipe now and at every event with a file of the place; end this process at
    the event `after`, counted from 0, or at the next one where Ctrl-C would fall on a removal: what
    is interrupted while it tidies up has no second chance before the next run.
    """
    seen, ended = 0, after < 0
    root = str(place)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen, ended
        if event in FILE_EVENTS and _is_in(root, arguments[0]):
            os.write(pipe, bytes([FILE_EVENTS.index(event)]))
            seen += 1
            tidies = number == signal.SIGINT and event == "os.remove"
            if not ended and seen > after and not tidies:
                ended = True  # first: an interrupt leaves from here
                os.kill(os.getpid(), number)

    os.write(pipe, b".")
    sys.addaudithook(watch)


def _is_in(root: str, path: object) -> bool:
    """Whether an audited path is in a folder, which is the working folder."""
    if not isinstance(path, str | os.PathLike):
        return False
    return os.path.join(root, os.fspath(path)).startswith(f"{root}/")


def _end_cold(command: str, place: Path, number: signal.Signals, moment: float) -> Ended:
    """Start a command as the shell does and end it some seconds later."""

    def heed_interrupts() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, "-c", COLD_START, *COMMANDS[command]],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,  # a run in the background may ignore them
    )
    time.sleep(moment)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=ENOUGH)
    return Ended(process.returncode, stdout, stderr)
