"""A short part of `make fuzz`, the same in every run; and what its processes notice."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from fuzz.__main__ import KINDS, Tally, fuzz, report
from fuzz.attempts import FaultError, run_attempts
from fuzz.commands import check_files, check_streams, find_commands
from fuzz.damage import damage
from fuzz.files import check_sentence
from fuzz.kills import check_interrupted
from fuzz.processes import Ended, Homer

# Attempts of each kind: a few seconds of each.
SHORT = {"trees": 20, "answers": 20, "files": 40, "commands": 8, "kills": 1}
PIECES = (b'{"a": [1, 2], "b": "x"}', b'{"a": 1}\n{"a": 2}\n', b"plain", b"")


@pytest.mark.process
@pytest.mark.parametrize("kind", KINDS)
def test_a_short_part(kind: str, tmp_path: Path) -> None:
    (tally,) = fuzz([kind], tmp_path, 0, SHORT, minutes=60)
    assert tally.tried == SHORT[kind]
    assert not tally.failed, report([tally])


class Planted:
    """Attempts that do what a test says, one of five; the others are good."""

    name, together, seconds = "planted", 3, 1.0

    def __init__(self, function: Callable[[], object]) -> None:
        self.function = function

    def attempt(self, draw: Random, folder: Path) -> None:
        (folder / "file").touch()
        if folder.name == "1":
            self.function()


def fail() -> None:
    raise FaultError("a fault", "of this case")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "what"),
    [
        (fail, "a fault"),
        (lambda: {}["absent"], "KeyError at test_fuzz.py"),
        (lambda: time.sleep(60), "took more than 1 s"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "ended with SIGKILL"),
        (lambda: os._exit(3), "ended with exit code 3"),
    ],
)
def test_what_goes_wrong_is_seen_and_the_others_go_on(
    function: Callable[[], object], what: str, tmp_path: Path
) -> None:
    found = list(run_attempts(Planted(function), range(5), tmp_path))
    assert [seed for seed, *_ in found] == [0, 1, 2, 3, 4]
    assert [seed for seed, wrong, _ in found if wrong] == [1]
    assert what in found[1][1]
    assert list(tmp_path.iterdir()) == []


def test_a_report_names_every_failing_seed(tmp_path: Path) -> None:
    tally = Tally(Planted(fail), tmp_path, 4)
    tally.go_on(0, time.perf_counter() + 60)
    assert (tally.tried, dict(tally.failed)) == (4, {"a fault": [1]})
    assert "planted: a fault\n  seeds 1" in report([tally])


def test_damage_is_the_same_for_the_same_seed() -> None:
    for content in PIECES:
        for seed in range(200):
            made = damage(Random(seed), content)
            assert made == damage(Random(seed), content)
            assert isinstance(made[1], bytes)
    changed = [damage(Random(seed), PIECES[0])[1] != PIECES[0] for seed in range(200)]
    assert sum(changed) > 180


def test_only_a_sentence_of_the_librarys_own_is_one() -> None:
    def caught(function: Callable[[], object]) -> Exception:
        try:
            function()
        except Exception as error:
            return error
        raise AssertionError

    import homer_triton as ht

    check_sentence("x", "y", caught(lambda: ht.HomerConfig(max_chunk_len=0)))
    for other in (lambda: int("x"), lambda: ht.HomerConfig(max_chunk_len="a\nb" * 2000)):
        with pytest.raises(FaultError):
            check_sentence("x", "y", caught(other))


def test_every_command_and_option_is_tried(tmp_path: Path) -> None:
    found = {command.words: command.parameters for command in find_commands()}
    assert {("encode",), ("show",), ("eval", "lm")} <= found.keys()
    assert {"--model", "--context-file", "--target-len"} <= found["encode",].keys()


@pytest.mark.parametrize(
    ("ended", "wrong"),
    [
        (Ended(0, "", ""), None),
        (Ended(2, "", "homer: There is no file x.\n"), None),
        (Ended(2, "", "Usage: homer\n\nError: no\n"), None),
        (Ended(130, "", "homer: interrupted.\n", interrupted=True), None),
        (Ended(130, "", "homer: interrupted.\n"), "exit code 130"),
        (Ended(0, "", "", seconds=9.0), "more than 4 s"),
        (Ended(-11, "", ""), "exit code -11"),
        (Ended(2, "", ""), "0 sentences"),
        (Ended(2, "", "homer: a.\nhomer: b.\n"), "2 sentences"),
        (Ended(2, "", "homer: a.\nand so on\n"), "after the sentence"),
        (Ended(1, "", 'Traceback (most…):\n  File "x.py", line 1\n    y\nKeyError: 1\n'), "KeyErr"),
    ],
)
def test_how_a_command_may_end(ended: Ended, wrong: str | None) -> None:
    (plan,) = (command for command in find_commands() if command.words == ("plan",))
    found = list(check_streams(plan, ended, as_json=False, full=False))
    assert bool(found) == (wrong is not None)
    assert wrong is None or wrong in found[0]


def test_which_files_a_command_may_write() -> None:
    class Line:
        arguments, inputs, outputs = ("encode",), ("text.txt", "model"), ("old", "new/run")

    before = {"text.txt": b"1", "model": "mode 4", "model/x": b"2", "old": b"3", "other": b"4"}

    def wrong(code: int = 0, **changes: bytes) -> list[str]:
        after = before | {name.replace("_", "/"): value for name, value in changes.items()}
        return list(check_files(Line(), Ended(code, "", ""), before, after))

    assert wrong() == wrong(old=b"new") == wrong(new="mode 4", new_run=b"new") == []
    assert wrong(model_x=b"new") == wrong(**{"text.txt": b"new"}) == ["an input is changed"]
    assert wrong(other=b"new") == wrong(strange=b"new") == ["a file beside the output"]
    assert wrong(2, old=b"new") == ["a file is written and the exit code is 2"]


def test_homer_in_a_process_of_its_own(tmp_path: Path) -> None:
    streams = tmp_path / "streams"
    ended = Homer(["plan", "--model", "absent"], tmp_path, streams).wait(60)
    assert (ended.code, ended.stdout) == (2, "")
    assert ended.stderr.startswith("homer: ")
    ended = Homer(["--help"], tmp_path, streams).wait(60)
    assert ended.code == 0
    assert "Usage: homer" in ended.stdout
    reading = Homer(["encode", "--model", "m", "--context-file", "-", "-o", "o"], tmp_path, streams)
    assert reading.wait(60).code == 2


@pytest.mark.parametrize(
    ("ended", "wrong"),
    [
        (Ended(0, "", ""), None),
        (Ended(130, "", "homer: interrupted.\n"), None),
        (Ended(130, "", ""), "no sentence"),
        (Ended(1, "", "homer: interrupted.\n"), "exit code 1"),
        (Ended(130, "", "Traceback (most recent call last):\n"), "traceback"),
        # Python's own start, before any line of ours.
        (Ended(-2, "", ""), None),
        (Ended(-2, "", 'Traceback\n  File "<frozen site>", line 599\nKeyboardInterrupt\n'), None),
        (Ended(1, "", "Fatal Python error: init_import_site\nTraceback\n"), None),
        (
            Ended(-2, "", 'Traceback\n  File "x/homer_triton/__init__.py", line 6, in <module>\n'),
            None,
        ),
        (
            Ended(-2, "", 'Traceback\n  "x/homer_triton/cli/__init__.py", line 9, in main'),
            "traceback",
        ),
    ],
)
def test_how_an_interrupted_command_may_end(ended: Ended, wrong: str | None) -> None:
    if wrong is None:
        check_interrupted(ended)
    else:
        with pytest.raises(FaultError, match=wrong):
            check_interrupted(ended)
