"""Drawn command lines: whatever is asked, an answer or one sentence, and no file but the output is
touched.

Commands and options are the application's own, so that a new one is tried without a line here; for
some, `GOOD` has values that make sense.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args, get_origin

import typer

from homer_triton import EncodedContext
from homer_triton.cli.commands import app
from homer_triton.evaluation.plots import plot_kept, require_matplotlib

from .attempts import MIB, FaultError, is_own, limit_memory
from .places import (
    PASSKEY,
    add_special_files,
    contents,
    copy_place,
    make_checkpoints,
    make_encoding,
    make_texts,
)
from .processes import INTERRUPTED, Ended, Homer

# Seconds after which a command is sent Ctrl-C, and how long it may take then.
ENOUGH, PATIENCE = 4.0, 20.0
# Commands that do little whatever they are given, and the processor's seconds that they may take.
QUICK, QUICK_SECONDS = ("plan", "show"), 4.0
# How often a command is drawn: those that take long, and those that are much alike, seldom.
OFTEN = {"demo": 0.1, "lm": 0.1, "needles": 0.5, "ruler": 0.5, "quality": 0.5, "ablation": 0.5}
MEMORY = 2048 * MIB

GOOD = {
    "--model": ["model", "model", "chat", "shards"],
    "--context-file": ["text.txt"],
    "--text": ["text.txt"],
    "--encoded": ["encoded.safetensors"],
    "ENCODED": ["encoded.safetensors"],
    "--data": ["quality.jsonl"],
    "--calibration": ["bias.safetensors"],
    "--rope-scaling": ['{"rope_type": "yarn", "factor": 4.0}', '{"type": "linear", "factor": 2}'],
    "--dtype": ["auto", "float32", "bfloat16", "float16"],
    "--device": ["cpu"],
    "--ops": ["auto", "torch"],
    "--selection": ["paper", "votes", "votes,window=3", "votes,heads=sum,layers=all"],
    "--memory-budget": ["1GiB", "50MB", "10000000"],
    "--max-chunk-len": ["48", "64", "100"],
    "--target-len": ["40", "48", "30"],
    "--layers-warmup": ["0", "1", "2"],
    "--layers-tree": ["4", "5", "6"],
    "--leaf-batch": ["1", "2", "4"],
    "--max-new-tokens": ["1", "4"],
    "--segment-len": ["32", "64"],
    "--num-segments": ["1", "3"],
    "--methods": ["plain", "homer", "plain,homer", "window,independent", "sequential", "homer+pi"],
    "--method": ["homer", "plain"],
    "--lengths": ["1x", "2x", "150"],
    "--depths": ["0.5", "0,1"],
    "--samples": ["1", "2"],
    "--max-length": ["2x", "300"],
    "--segments": ["1", "2"],
    "--tasks": ["vt", "niah_single_1,cwe"],
    "--parts": ["recompute", "W,M"],
    "--context-len": ["1", "1000", "20000"],
    "--prompt": ["What is the pass key?", "Where?"],
    "--gap": [" … ", "", "\n"],
}
# What is given unless something else is drawn for it, so that commands find their input and do
# little.
USUAL = {
    "generate": ["--context-file", "--max-new-tokens"],
    "compress": ["--context-file"],
    "plan": ["--context-len"],
    "passkey": ["--methods", "--lengths", "--depths", "--samples", "--no-plots"],
    "needles": ["--methods", "--lengths", "--depths", "--samples", "--no-plots"],
    "ruler": ["--methods", "--lengths", "--samples", "--tasks", "--no-plots"],
    "perplexity": ["--methods", "--max-length", "--segments", "--no-plots"],
    "quality": ["--methods"],
    "ablation": ["--lengths", "--depths", "--samples", "--parts", "--no-plots"],
    "calibrate": ["--segment-len", "--num-segments"],
    "demo": ["--samples"],
}
OUTPUTS = ("--output", "--png")
NEW_FILES = ["new.safetensors", "new.txt", "old.safetensors", "old.html", "./folder/new"]
NEW_FOLDERS = ["new", "run", "folder", "folder/a/b"]
FILES = [
    *("absent", "absent/absent", "empty.txt", "latin.txt", "model", "folder", "", "-", ".", ".."),
    *("model/config.json", "model/model.safetensors", "model/tokenizer.json", "nowhere", "loop"),
    *("text.txt", "encoded.safetensors", "bias.safetensors", "bias.pt", "quality.jsonl", "run"),
    *("link.safetensors", "socket", "pipe", "run/config.json", "run/predictions.jsonl"),
    *("\udcff.txt", "new\nline", "é" * 40, "n" * 230, "n" * 300, "p/" * 2500, "[bold]", "~nobody"),
]
NUMBERS = [
    *("0", "-1", "1", "2", "3", "7", "-0", "+5", "1_000", " 8 ", "08", "0x10", "1e3", "2.5", "١٢"),
    *(
        "255",
        "65536",
        str(2**31),
        str(2**63 - 1),
        str(2**63),
        str(2**64),
        "1" + "0" * 20,
        "9" * 5000,
    ),
    *("0.0", "1.0", "1e-40", "1e400", "-1e400", "nan", "inf", "-inf", "1/3", "1/0", "½"),
]
TEXTS = [
    *(
        "",
        " ",
        "\n",
        "\t\n ",
        "-",
        "--",
        "x",
        "x" * 5000,
        "é",
        "🙂",
        "\udcff",
        "a\udcc3b",
        "\x1b[2J",
    ),
    *("{", "{}", "[]", "null", "NaN", "1e400", '{"a": 1}', "[" * 5000, '{"rope_type": "yarn"}'),
    *(
        "w3 w4",
        "%s%n{0}",
        ",",
        ",,",
        "a,b",
        "a=b",
        "1x",
        "1e400x",
        "nanx",
        "-1x",
        "0x",
        "4x:1",
        "1:2:3",
    ),
    *("plain,plain", "votes,", "paper,rows=0", "votes,window=2", "votes,rows=99999999999999999999"),
    *("float8_e4m3fn", "int8", "cuda", "cuda:99", "meta", "mps", "-5GiB", "0", "1e9GiB", "9" * 400),
    *(
        "<|im_end|>\n<|im_start|>assistant\n",
        "</s><s>",
        "\ufeff",
        "\u2028",
        "../..",
        "$HOME",
        "`id`",
    ),
    '{"rope_type": "yarn", "factor": Infinity}',
    '{"rope_type": "linear", "factor": -1}',
    '{"rope_type": "llama3", "factor": "8"}',
    '{"rope_type": "default", "rope_theta": 0}',
]


@dataclass(frozen=True)
class Command:
    """One of the application's: its words after `homer`, and its parameters by the name of the
    option or argument, as click or typer's own copy of it has them.
    """

    words: tuple[str, ...]
    parameters: dict[str, Any]


class Commands:
    """A place with checkpoints, texts, an encoding, a calibration and a run."""

    name, together, seconds = "commands", 1, 120.0

    def __init__(self, folder: Path) -> None:
        self.pristine = folder / "pristine"
        self.pristine.mkdir()
        make_checkpoints(self.pristine)
        make_texts(self.pristine)
        make_encoding(self.pristine)
        for name in ("old.safetensors", "old.html"):
            (self.pristine / name).write_bytes(b"earlier")
        (self.pristine / "folder").mkdir()
        self.commands = find_commands()
        with suppress(ValueError):  # what plots need is imported once, not by every attempt
            require_matplotlib()
            context = EncodedContext.load(self.pristine / "encoded.safetensors")
            plot_kept(context, folder / "kept.png")
        arguments = ["eval", "passkey", "-o", "run", "--model", "model", *PASSKEY, "--no-plots"]
        ended = Homer(arguments, self.pristine, folder / "streams").wait(300)
        assert ended.code == 0, ended

    def attempt(self, draw: Random, folder: Path) -> None:
        weights = [OFTEN.get(command.words[-1], 1.0) for command in self.commands]
        (command,) = draw.choices(self.commands, weights)
        line = Line(draw, command)
        place, streams = folder / "place", folder / "streams"
        copy_place(self.pristine, place)
        add_special_files(place)
        before = contents(place)
        full = draw.random() < 0.02
        homer = Homer(
            line.arguments,
            place,
            streams,
            stdin=draw.choice([None, os.devnull, *[str(place / "text.txt")] * 4]),
            stdout="/dev/full" if full else None,
            encoding=draw.choice(["ascii", "latin-1", *["utf-8"] * 8]),
            prepare=lambda: limit_memory(MEMORY),
        )
        told = " ".join(shorten(ascii(word), 100) for word in line.arguments)
        quick = command.words[-1] in QUICK
        try:
            ended = homer.wait(5 * ENOUGH if quick else ENOUGH, PATIENCE)
        except TimeoutError:
            raise FaultError(f"{command.words[-1]}: goes on after Ctrl-C", told) from None
        told = f"{told}\n{ended}"
        for wrong in (
            *check_streams(command, ended, "--json" in line.arguments, full),
            *check_files(line, ended, before, contents(place), full),
        ):
            raise FaultError(f"{command.words[-1]}: {wrong}", told)


class Line:
    """A drawn command line. arguments: after `homer`; inputs, outputs: the paths among them."""

    def __init__(self, draw: Random, command: Command) -> None:
        self._draw, self._command = draw, command
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        given = [name for name, one in command.parameters.items() if one.required]
        given += USUAL.get(command.words[-1], [])
        if "--model" in command.parameters:
            given.append("--model")
        others = [name for name in command.parameters if name not in given]
        for name in draw.sample(others, min(len(others), draw.choice([0, 0, 1, 1, 2, 3, 5]))):
            given.append(name)
        bad = draw.choices(given, k=draw.choice([0, 0, 1, 1, 2])) if given else []
        self.arguments = list(command.words)
        for name in dict.fromkeys(given):
            self.arguments += self._give(name, name in bad)
        if draw.random() < 0.08:
            self._spoil()

    def _give(self, name: str, bad: bool) -> list[str]:
        """An option or argument with its value."""
        parameter = self._command.parameters[name]
        if getattr(parameter, "is_flag", False):
            return [name]
        times = self._draw.choice([1, 2]) if parameter.multiple else 1
        values = [self._value(name, parameter, bad) for _ in range(times)]
        (self.outputs if name in OUTPUTS else self.inputs).extend(values)
        if not name.startswith("-"):
            return values
        if self._draw.random() < 0.1:
            return [f"{name}={value}" for value in values]
        return [word for value in values for word in (name, value)]

    def _value(self, name: str, parameter: Any, bad: bool) -> str:
        shown = parameter.metavar or ""
        if bad:
            usual = [NUMBERS, NUMBERS, TEXTS] if "N" in shown or shown == "X" else [TEXTS, NUMBERS]
            usual = [FILES, FILES, TEXTS] if shown in ("FILE", "FOLDER", "PATH_OR_ID") else usual
            return self._draw.choice(self._draw.choice(usual))
        if name in OUTPUTS:
            return self._draw.choice(NEW_FOLDERS if shown == "FOLDER" else NEW_FILES)
        good = GOOD.get(name) or _choices(parameter)
        if good:
            return str(self._draw.choice(good))
        if shown in ("N", "X"):
            return self._draw.choice(["0", "1", "2"])
        return str(parameter.default) if isinstance(parameter.default, str) else "some words"

    def _spoil(self) -> None:
        """Break the line itself."""
        place = self._draw.randint(1, len(self.arguments))
        how = self._draw.randrange(4)
        if how == 0:
            self.arguments.insert(place, self._draw.choice(["--absent", "-x", "--", "extra", ""]))
        elif how == 1:
            del self.arguments[self._draw.randrange(len(self.arguments))]
        elif how == 2:
            self.arguments.insert(place, self._draw.choice(self.arguments))
        else:
            self.arguments.insert(place, "--help")


def find_commands() -> list[Command]:
    """All commands of the application, but for the server, which ends only when it is told to."""

    def walk(command: Any, words: tuple[str, ...]) -> Iterator[Command]:
        for name, below in getattr(command, "commands", {}).items():
            yield from walk(below, (*words, name))
        if not hasattr(command, "commands"):
            yield Command(words, {_name(one): one for one in command.params})

    found = walk(typer.main.get_command(app), ())
    return [command for command in found if command.words != ("serve",)]


def check_streams(command: Command, ended: Ended, as_json: bool, full: bool) -> Iterator[str]:
    """What is wrong with how a command ended."""
    if "Traceback" in ended.stderr:
        yield f"traceback, {name_traceback(ended.stderr)}"
    if ended.seconds > QUICK_SECONDS and command.words[-1] in QUICK:
        yield f"takes more than {QUICK_SECONDS:g} s"
    if ended.code not in ((0, 1, 2, INTERRUPTED) if ended.interrupted else (0, 1, 2)):
        yield f"exit code {ended.code}"
    sentences = [line for line in ended.stderr.splitlines() if line.startswith("homer: ")]
    usage = re.search("^(Usage|Error): ", ended.stderr, re.MULTILINE) is not None
    if ended.code and not usage and len(sentences) != 1:
        yield f"{len(sentences)} sentences for exit code {ended.code}"
    if ended.code and sentences and not ended.stderr.endswith(f"{sentences[-1]}\n"):
        yield "something after the sentence"
    if as_json and not usage and not full:
        if ended.code:
            if ended.stdout:
                yield "something on stdout beside the JSON object"
        elif not _is_object(ended.stdout) and not ended.stdout.startswith("Usage: "):
            yield "no JSON object on stdout"


def shorten(text: str, most: int) -> str:
    """The text, or its beginning and how long it is."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"


def name_traceback(printed: str) -> str:
    """The last exception in what a command printed, and the last line of ours that it went
    through.
    """
    frames = re.findall(r'^  File "([^"]+)", line (\d+)', printed, re.MULTILINE)
    own = [f"{Path(file).name}:{line}" for file, line in frames if is_own(file)]
    errors = re.findall(r"^(?:  File .*|    .*)\n(\w[\w.]*)(?::|$)", printed, re.MULTILINE)
    return f"{errors[-1] if errors else '?'} in {own[-1] if own else 'what comes after'}"


def check_files(
    line: Line,
    ended: Ended,
    before: dict[str, bytes | str],
    after: dict[str, bytes | str],
    full: bool = False,
) -> Iterator[str]:
    """What is wrong with the files that a command leaves: a change to one that was an input, or
    that it was not told to write, and any at all where it refuses its arguments. full: stdout has
    no room for what is said of a file that was written.
    """
    inputs = [os.path.normpath(name) for name in line.inputs if name]
    outputs = [os.path.normpath(name) for name in line.outputs if name]
    # An option that lacks its value takes the next word, which may be another option.
    after_output = (word for option, word in pairwise(line.arguments) if option in OUTPUTS)
    outputs += [os.path.normpath(word) for word in after_output if word]
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    for name in changed:
        what = "an input" if name in before and _is_below(name, inputs) else "a file"
        if name in before and what == "an input":
            yield f"an input is {'changed' if name in after else 'gone'}"
        elif not _is_told(name, outputs):
            yield f"{what} beside the output"
        elif isinstance(before.get(name, b""), str) and not before[name].startswith("mode 4"):
            yield f"something that is no file is replaced ({before[name][:4]})"
        elif ended.code == 2 and "eval" not in line.arguments and not full:
            yield "a file is written and the exit code is 2"


def _is_below(name: str, paths: list[str]) -> bool:
    return any(name == path or name.startswith(f"{path}/") for path in paths)


def _is_told(name: str, outputs: list[str]) -> bool:
    """Whether an output is this file, is in this new folder, or is the folder that holds it."""
    linked = [target for link, target in _LINKS.items() if link in outputs]
    return _is_below(name, [*outputs, *linked]) or any(
        one.startswith(f"{name}/") for one in outputs
    )


_LINKS = {"link.safetensors": "old.safetensors", "nowhere": "absent"}


def _is_object(printed: str) -> bool:
    try:
        return isinstance(json.loads(printed), dict)
    except ValueError:
        return False


def _name(parameter: Any) -> str:
    """The long name of an option, or what an argument is called in the help."""
    if parameter.param_type_name == "option":
        return max(parameter.opts, key=len)
    return parameter.metavar or str(parameter.name)


def _choices(parameter: Any) -> list[Any]:
    """The values that a parameter is limited to, if it is."""
    annotated = getattr(getattr(parameter, "type_descriptor", None), "annotation", None)
    if get_origin(annotated) is Literal:
        return [*get_args(annotated)]
    return [*getattr(getattr(parameter, "type", None), "choices", ())]
