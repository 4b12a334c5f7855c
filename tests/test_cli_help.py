"""`homer`, `homer --help`, `homer --version` and the help of every command."""

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from command_line import run

import homer_triton
from homer_triton.cli.commands import app
from homer_triton.cli.help import _HEADINGS


def all_commands() -> list[tuple[str, ...]]:
    """The words after `homer` of every command and group."""

    def walk(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        yield words
        for name, below in getattr(command, "commands", {}).items():
            yield from walk(below, (*words, name))

    return list(walk(typer.main.get_command(app), ()))


def shown(words: tuple[str, ...], columns: int, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    result = run(*words, "--help")
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def sections(text: str) -> dict[str, list[str]]:
    """By heading, the first name of each option below it."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if re.fullmatch(r"[A-Z].*:", line):
            found[line[:-1]] = own = []
        elif found and (option := re.match(r"  (?:-\w, )?(--[\w-]+)", line)):
            own.append(option[1])
    return found


@pytest.mark.parametrize("words", all_commands(), ids=" ".join)
@pytest.mark.parametrize("columns", [60, 80])
def test_nothing_is_cut_and_there_is_an_example(
    words: tuple[str, ...], columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(words, columns, monkeypatch)
    assert not any(line.endswith("...") for line in text.splitlines()[1:])
    assert "((" not in text
    assert "x>=" not in text
    assert "<=x" not in text
    if words:
        assert re.search(r"^  Examples?:\n    homer ", text, re.MULTILINE)


def test_a_newcomer_learns_what_to_do_first(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown((), 80, monkeypatch)
    steps = [text.index(step) for step in ("homer demo", "homer generate --model", "homer COMMAND")]
    assert steps == sorted(steps)
    summaries = text.partition("\nCommands:\n")[2].splitlines()
    names = [line.split()[0] for line in summaries]
    assert names == [words[0] for words in all_commands() if len(words) == 1]  # a line for each


def test_homer_alone_prints_the_help(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run()
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == run("--help").stdout


def test_the_version_is_printed_without_torch() -> None:
    script = (
        "import sys; from homer_triton.cli import main\n"
        "sys.argv[1:] = ['--version']\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"homer {homer_triton.__version__}\n"


def test_generate_shows_what_matters_first(monkeypatch: pytest.MonkeyPatch) -> None:
    found = sections(shown(("generate",), 80, monkeypatch))
    assert list(found) == [
        *("Main options", "Text and prompt", "Answer", "Model", "HOMER settings"),
        *("Memory and speed", "Output and others"),
    ]
    first = ["--model", "--context-file", "--prompt", "--max-new-tokens", "--device"]
    assert found["Main options"] == first
    assert "--temperature" in found["Answer"]
    assert "--offload" in found["Memory and speed"]
    assert "--max-chunk-len" in found["HOMER settings"]


@pytest.mark.parametrize("words", all_commands(), ids=" ".join)
def test_every_option_is_under_one_known_heading(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    command: Any = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]
    found = sections(shown(words, 80, monkeypatch))
    names = [name for own in found.values() for name in own]
    assert sorted(set(names)) == sorted(names)
    known = {name for parameter in command.params for name in parameter.opts}
    assert {*names} - {"--help"} == {name for name in known if name.startswith("--")}
    if not hasattr(command, "commands"):
        assert {*found} <= {"Arguments", *_HEADINGS}
