"""`homer encode` on several ranks: the same file, one voice, one sentence on failure."""

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

import homer_triton as ht
from homer_triton.cli.ranks import _without
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


def start(arguments: list[str], *launcher: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "homer_triton", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background may have inherited that interrupts are ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


@pytest.fixture(scope="module")
def alone(story: Path, tmp_path_factory: pytest.TempPathFactory) -> ht.EncodedContext:
    output = tmp_path_factory.mktemp("alone") / "out.safetensors"
    assert finish(start(command(story, output)))[0] == 0
    return ht.EncodedContext.load(output)


@pytest.mark.parametrize(
    ("launcher", "options"),
    [
        ((), ("--devices", "3", "--json")),
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


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--target-len", "1"), "target_len=1 leaves no room"),
        (("--context-file", "-"), "Several processes cannot read standard input"),
        (("--model", "absent"), "absent"),
        (("--dtype", "float1"), "float1"),
    ],
)
def test_bad_input_is_one_sentence(
    story: Path, tmp_path: Path, options: tuple[str, ...], sentence: str
) -> None:
    arguments = command(story, tmp_path / "out.safetensors", "--devices", 2, *options)
    code, stdout, stderr = finish(start(arguments))
    assert (code, stdout) == (2, "")
    (line,) = [line for line in stderr.splitlines() if line.startswith("homer: ")]
    assert sentence in line
    assert "Traceback" not in stderr
    assert not os.listdir(tmp_path)


def children(process: subprocess.Popen[str], count: int) -> Iterator[int]:
    """The processes that one has started, once there are so many."""
    file = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(found := file.read_text().split()) < count:
        time.sleep(0.02)
    return map(int, found)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_killed_rank_ends_all(story: Path, tmp_path: Path, rank: int) -> None:
    process = start(command(story, tmp_path / "out.safetensors", "--devices", 3))
    ranks = list(children(process, 3))
    time.sleep(1.0)
    os.kill(ranks[rank], signal.SIGKILL)
    code, stdout, stderr = finish(process)
    assert (code, stdout) == (1, "")
    assert stderr.splitlines()[-1:] == [
        f"homer: Rank {rank} was ended by SIGKILL; the others were, too."
    ]
    assert "Traceback" not in stderr
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert not os.listdir(tmp_path)


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


def test_an_option_is_taken_out_of_a_command_line() -> None:
    words = ["encode", "--devices", "3", "-o", "x", "--devices=3"]
    assert _without("--devices", words) == ["encode", "-o", "x"]
