"""Commands on several ranks: the same result, one voice, one sentence on failure."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from rank_processes import run_command

import homer_triton as ht
from homer_triton.cli.interrupts import AGAIN
from homer_triton.cli.ranks import _without, joined
from homer_triton.demo import CHECKPOINT

STORY = "The grass is green. The sky is blue. " * 120
SETTINGS = ("--max-chunk-len", "128", "--layers-warmup", "1", "--dtype", "float32")


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "story.txt"
    file.write_text(STORY + "The pass key is 71432. " + STORY)
    return file


def command(story: Path, output: Path, *options: object) -> list[str]:
    words = ("encode", "--model", CHECKPOINT, "--context-file", story, "-o", output, *SETTINGS)
    return [*map(str, (*words, "--prompt", "What is the pass key?", *options))]


# Waits a second only for ranks that were asked to end.
IMPATIENT = "from homer_triton.cli import main, ranks; ranks._PATIENCE = 1.0; main()"


def start(arguments: list[str], *launcher: str) -> subprocess.Popen[str]:
    module = () if "-c" in launcher else ("-m", "homer_triton")
    return subprocess.Popen(
        [sys.executable, *launcher, *module, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_interrupts,
    )


def hear_interrupts() -> None:
    """A test run in the background may have inherited that interrupts are ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "3"), ("RANK", "2"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="process 3 on a machine with 2 GPUs"), joined(None):
        raise AssertionError("it was let in")


@pytest.fixture(scope="module")
def alone(story: Path, tmp_path_factory: pytest.TempPathFactory) -> ht.EncodedContext:
    output = tmp_path_factory.mktemp("alone") / "out.safetensors"
    assert run(*command(story, output)).exit_code == 0
    return ht.EncodedContext.load(output)


@pytest.mark.process
@pytest.mark.parametrize(
    ("launcher", "options"),
    [
        ((), ("--devices", "2", "--json")),
        (("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"), ("--json",)),
    ],
    ids=["devices", "torchrun"],
)
def test_several_processes_write_what_one_does(
    story: Path, tmp_path: Path, alone: ht.EncodedContext, launcher: Any, options: Any
) -> None:
    output = tmp_path / "out.safetensors"
    code, stdout, stderr = finish(start(command(story, output, *options), *launcher))
    assert code == 0, stderr
    assert json.loads(stdout)["output"] == str(output)  # said once
    found = ht.EncodedContext.load(output)
    assert torch.equal(found.source_indices, alone.source_indices)
    torch.testing.assert_close(found.keys, alone.keys)
    torch.testing.assert_close(found.logits, alone.logits)
    assert os.listdir(tmp_path) == ["out.safetensors"]


@pytest.mark.slow
def test_generate_and_compress_share_the_reading(story: Path, tmp_path: Path) -> None:
    read = ("--model", CHECKPOINT, "--context-file", story, "--prompt", "What is the pass key?")
    for words in (("generate", "--max-new-tokens", "8", "--json"), ("compress", "--json")):
        arguments = (words[0], *read, *words[1:], *SETTINGS)
        folder = tmp_path / words[0]
        folder.mkdir()
        first, second = run_command(2, folder, *arguments)
        assert (first.exit_code, second.exit_code) == (0, 0), (first, second)
        said, expected = json.loads(first.stdout), json.loads(run(*arguments).stdout)
        assert said["plan"] == expected["plan"]
        for found in (said, expected):
            found["answers"] = [answer["token_ids"] for answer in found.get("answers", [])]
        assert (said["answers"], said.get("text")) == (expected["answers"], expected.get("text"))


@pytest.mark.slow
def test_an_evaluation_deals_out_its_questions(tmp_path: Path) -> None:
    words = ("eval", "passkey", "--methods", "window,homer", "--lengths", "2x", "--depths", "0.3")
    options = ("--samples", "3", "--no-plots", "--json", "-o")
    assert run(*words, *options, tmp_path / "alone").exit_code == 0
    first, second = run_command(2, tmp_path, *words, *options, tmp_path / "shared")
    assert (first.exit_code, second.exit_code) == (0, 0), (first, second)
    assert len(json.loads(first.stdout)["by_length"]) == 2
    told = []
    for folder in ("alone", "shared"):
        records = map(json.loads, (tmp_path / folder / "predictions.jsonl").open())
        told.append({record["id"]: (record["text"], record["held"]) for record in records})
    assert len(told[0]) == 6
    assert told[0] == told[1]
    assert sorted(os.listdir(tmp_path / "shared")) == sorted(os.listdir(tmp_path / "alone"))


@pytest.mark.parametrize(
    ("arguments", "ranks", "sentence"),
    [
        (
            ("eval", "lm", "--tasks", "x", "-o", "run"),
            "2",
            "`homer eval lm` runs as one process; start it without torchrun.",
        ),
        (
            ("generate", "--model", CHECKPOINT, "--encoded", "x", "--devices", "2"),
            "1",
            "With --encoded, several processes have nothing to share; leave --devices out.",
        ),
        (
            ("encode", "--model", CHECKPOINT, "--context-file", "-", "-o", "x", "--devices", "2"),
            "1",
            "Several processes cannot read standard input; give the text as a file.",
        ),
    ],
    ids=["harness", "encoding", "stdin"],
)
def test_what_cannot_be_shared_is_refused_before_any_process_starts(
    arguments: Any, ranks: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_process(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(subprocess, "Popen", no_process)
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (2, f"homer: {sentence}\n")


@pytest.mark.process
def test_bad_input_is_one_sentence(story: Path, tmp_path: Path) -> None:
    arguments = command(story, tmp_path / "out.safetensors", "--devices", 2, "--target-len", "1")
    code, stdout, stderr = finish(start(arguments))
    assert (code, stdout) == (2, "")
    (line,) = [line for line in stderr.splitlines() if line.startswith("homer: ")]
    assert "target_len=1 leaves no room" in line
    assert "Traceback" not in stderr
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_every_rank_refuses_a_model_that_is_not_there(story: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    for found in run_command(2, tmp_path, *command(story, output, "--model", "absent")):
        assert (found.exit_code, found.stdout) == (2, "")
        (line,) = found.stderr.splitlines()
        assert line.startswith("homer: ")
        assert "absent" in line
    assert not output.exists()


def children(process: subprocess.Popen[str], count: int) -> Iterator[int]:
    """The processes that one has started, once there are so many."""
    file = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(found := file.read_text().split()) < count:
        time.sleep(0.02)
    return map(int, found)


@pytest.mark.process
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_all(story: Path, tmp_path: Path, rank: int) -> None:
    arguments = command(story, tmp_path / "out.safetensors", "--devices", 2)
    process = start(arguments, "-c", IMPATIENT)
    ranks = list(children(process, 2))
    time.sleep(1.0)
    os.kill(ranks[rank], signal.SIGKILL)
    code, stdout, stderr = finish(process)
    assert (code, stdout) == (1, "")
    assert stderr.splitlines()[-1:] == [
        f"homer: Rank {rank} was ended by SIGKILL, so all ranks were stopped."
    ]
    assert "Traceback" not in stderr
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert not os.listdir(tmp_path)


@pytest.mark.process
def test_an_interrupt_ends_all(story: Path, tmp_path: Path) -> None:
    process = start(command(story, tmp_path / "out.safetensors", "--devices", 2))
    ranks = list(children(process, 2))
    time.sleep(2.0)
    process.send_signal(signal.SIGINT)
    code, stdout, stderr = finish(process)
    assert (code, stdout) == (130, "")
    assert stderr.count("homer: interrupted.") == 1
    assert "Traceback" not in stderr
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert not os.listdir(tmp_path)


@pytest.mark.process
def test_ranks_that_take_long_to_end_are_waited_for() -> None:
    """Longer than an interrupt takes to come once more."""
    command = f"""
import signal, subprocess, sys, time
from homer_triton.cli import ranks
from homer_triton.cli.interrupts import heard_interrupts
slow = "import os, signal, time; " \
    "signal.signal(2, lambda *_: (time.sleep({AGAIN + 1.0}), os._exit(0))); " \
    "print(flush=True); time.sleep(60)"
with heard_interrupts():
    process = subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.PIPE)
    process.stdout.readline()
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        ranks._end([process])
print(process.returncode)
"""
    done = subprocess.run(
        [sys.executable, "-c", command],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=hear_interrupts,
    )
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_an_option_is_taken_out_of_a_command_line() -> None:
    words = ["encode", "--devices", "3", "-o", "x", "--devices=3"]
    assert _without("--devices", words) == ["encode", "-o", "x"]
