"""A failure in the middle of a tree, whatever its kind: it is passed on and hurts nothing else.

Afterwards the same model gives the same bits, no memory is kept, and no file has been touched.
"""

import gc
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import LAYERS, random_tokens
from checkpoints import random_model
from command_line import checkpoint, run, text

import homer_triton as ht
from homer_triton.demo import CHECKPOINT
from homer_triton.engine.tree import Node
from homer_triton.kernels import reference

TOKENS = random_tokens(120)
CONFIG = ht.HomerConfig(16, 14, 2, leaf_batch=2, recompute="suffix")
OUT_OF_MEMORY = torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 …"
BROKEN_KERNEL = RuntimeError, "Triton Error: an illegal memory access was encountered"
INTERRUPT = KeyboardInterrupt, ""
BEFORE = b"what was there before"


class Fuse:
    """A function whose call number `at` fails with `error`, a class and a message."""

    def __init__(self, function: Callable[..., Any], at: int = 0, error: Any = None) -> None:
        self.function, self.at, self.error, self.calls = function, at, error, 0

    def __call__(self, *args: object, **kwargs: object) -> Any:
        self.calls += 1
        if self.calls == self.at:
            kind, message = self.error
            raise kind(message)
        return self.function(*args, **kwargs)


@pytest.fixture(scope="module")
def model() -> ht.Llama:
    return ht.from_transformers(random_model(num_hidden_layers=LAYERS), ops="torch")


def with_fuse(model: ht.Llama, op: str) -> tuple[ht.Llama, Fuse]:
    """The same weights with one op that can be made to fail."""
    fuse = Fuse(getattr(model.ops, op))
    ops: Any = SimpleNamespace(**{**vars(model.ops), op: fuse})
    return ht.Llama(model.config, model.weights, ops), fuse


def read(
    model: ht.Llama, tokens: list[int] = TOKENS, progress: bool | Callable[[Node], None] = False
) -> ht.EncodedContext:
    return ht.encode(model, tokens[2:-3], tokens[:2], tokens[-3:], CONFIG, progress)


def assert_same_bits(first: ht.EncodedContext, second: ht.EncodedContext) -> None:
    for name in ("keys", "values", "positions", "source_indices", "pruned_at", "logits"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize("moment", ["first", "middle", "last"])
@pytest.mark.parametrize(
    ("op", "error"),
    [
        ("causal_attention", OUT_OF_MEMORY),
        ("vote_and_select", OUT_OF_MEMORY),
        ("gather_cache_", OUT_OF_MEMORY),
        ("rotary_and_store_", BROKEN_KERNEL),
        ("prune_and_concatenate", BROKEN_KERNEL),
        ("average_affix_", BROKEN_KERNEL),
    ],
)
def test_after_an_op_fails_the_next_encoding_is_right(
    model: ht.Llama, op: str, error: tuple[type[Exception], str], moment: str
) -> None:
    fragile, fuse = with_fuse(model, op)
    expected, calls = read(fragile), fuse.calls
    assert calls >= 3
    fuse.at, fuse.error = calls + {"first": 1, "middle": calls // 2, "last": calls}[moment], error
    with pytest.raises(error[0], match=re.escape(error[1])):
        read(fragile)
    assert_same_bits(read(fragile), expected)


def test_after_generating_fails_the_encoding_answers_as_before(model: ht.Llama) -> None:
    fragile, fuse = with_fuse(model, "causal_attention")
    encoded, untouched = read(fragile), read(model)
    expected = ht.generate(fragile, encoded, [5, 6, 7], 8).token_ids
    fuse.at, fuse.error = fuse.calls + 3 * LAYERS, OUT_OF_MEMORY
    with pytest.raises(torch.OutOfMemoryError):
        ht.generate(fragile, encoded, [5, 6, 7], 8)
    assert_same_bits(encoded, untouched)
    assert ht.generate(fragile, encoded, [5, 6, 7], 8).token_ids == expected


def live_tensors() -> int:
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


@pytest.mark.slow
@pytest.mark.parametrize("height", [1, 3])
def test_an_interrupt_keeps_no_memory(model: ht.Llama, height: int) -> None:
    def interrupt(node: Node) -> None:
        if node.height == height:
            raise KeyboardInterrupt

    expected = read(model)
    gc.collect()
    gc.disable()  # memory that only the collector can free may be missed for long
    try:
        before = live_tensors()
        with pytest.raises(KeyboardInterrupt):
            read(model, progress=interrupt)
        assert live_tensors() == before
    finally:
        gc.enable()
    assert_same_bits(read(model), expected)


def test_a_failure_leaves_other_threads_alone(model: ht.Llama) -> None:
    others = random_tokens(len(TOKENS), seed=1)
    expected = read(model, others)
    half_way, failed = Event(), Event()

    def wait(node: Node) -> None:
        if node.height == 1:
            half_way.set()
            assert failed.wait(10)

    def fail(node: Node) -> None:
        if node.height == 1:
            assert half_way.wait(10)
            raise RuntimeError("in mid-tree")

    with ThreadPoolExecutor(2) as threads:
        other = threads.submit(read, model, others, wait)
        with pytest.raises(RuntimeError, match="in mid-tree"):
            threads.submit(read, model, TOKENS, fail).result()
        failed.set()
        assert_same_bits(other.result(), expected)


@pytest.mark.parametrize("before", [None, BEFORE])
@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (INTERRUPT, 130, r"homer: interrupted\.\n"),
        (OUT_OF_MEMORY, 2, "homer: out of memory; .*--max-chunk-len.*--leaf-batch.*--dtype.*\n"),
    ],
)
def test_commands_say_one_sentence_and_leave_files_alone(
    error: object,
    code: int,
    line: str,
    before: bytes | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, context, output = (tmp_path / name for name in ("model", "text", "out"))
    checkpoint(model, num_hidden_layers=LAYERS)
    context.write_text(text(200))
    if before is not None:
        output.write_bytes(before)
    files = sorted(tmp_path.iterdir())
    options = ("--model", model, "--context-file", context, "--device", "cpu")
    for command in (("encode", "-o", output), ("generate",)):
        fuse = Fuse(reference.causal_attention, 20, error)
        with monkeypatch.context() as patch:
            patch.setattr(reference, "causal_attention", fuse)
            result = run(*command, *options)
        assert (result.exit_code, result.stdout, fuse.calls) == (code, "", 20)
        assert re.fullmatch(line, result.stderr)
        assert sorted(tmp_path.iterdir()) == files
        assert before is None or output.read_bytes() == before


def interrupt_at_a_terminal(arguments: list[object]) -> tuple[int, bytes, str]:
    """Give a command Ctrl-C when its progress bar has come to the second height of the tree.

    Returns its exit code, its stdout, and what stands below the bar in the end.
    """
    screen, stderr = pty.openpty()
    termios.tcsetwinsize(stderr, (24, 80))
    process = subprocess.Popen(
        [sys.executable, "-c", "from homer_triton.cli import main; main()", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=stderr,
        # A test run in the background may have inherited that interrupts are ignored.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    os.close(stderr)
    shown, interrupted = "", False
    with process, open(screen, "rb", 0) as lines:
        try:
            while piece := lines.read(4096):
                shown += piece.decode(errors="replace")
                # Depth first, the third of the finished nodes is above the leaves.
                if not interrupted and re.search(r"\b([3-9]|\d\d+)/\d+ \[", shown):
                    process.send_signal(signal.SIGINT)
                    interrupted = True
        except OSError:  # how Linux says that nobody writes to a terminal any more
            pass
        stdout, _ = process.communicate(timeout=60)
    return process.returncode, stdout, re.split(r"chunk/s\]|s/chunk\]", shown)[-1].strip()


@pytest.mark.process
def test_ctrl_c_at_a_terminal(tmp_path: Path) -> None:
    context, output = tmp_path / "text", tmp_path / "out"
    context.write_text("The grass is green. The sky is blue. " * 2000)
    output.write_bytes(BEFORE)
    options = ["--model", CHECKPOINT, "--context-file", context, "--device", "cpu"]
    commands = [["encode", "-o", output, *options], ["generate", "--prompt", "Why?", *options]]
    with ThreadPoolExecutor() as threads:
        for seen in threads.map(interrupt_at_a_terminal, commands):
            assert seen == (130, b"", "homer: interrupted.")
    assert sorted(tmp_path.iterdir()) == [output, context]
    assert output.read_bytes() == BEFORE
