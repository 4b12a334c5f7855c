"""Damaged files: whatever a file holds, it is read as it was, or refused in one sentence, at once.

Some files cannot be told from others of their kind when they are damaged (a text, a checkpoint,
answers of a run): what is read from them has to make sense then.
"""

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from random import Random
from typing import Any

import torch

import homer_triton as ht
from homer_triton.chat import chat_affixes
from homer_triton.cli.inputs import compose, read_text
from homer_triton.evaluation.methods import make_readers
from homer_triton.evaluation.passkey import PASSKEY
from homer_triton.evaluation.quality import read_quality
from homer_triton.evaluation.questions import Questions, ask
from homer_triton.evaluation.runs import RunFolder
from homer_triton.loading import load_tokenizer

from .attempts import MIB, FaultError, describe, is_own, limit_memory, peak_rss
from .damage import damage
from .places import CONFIG, make_checkpoints, make_encoding, make_texts, text

# What reading any of these files, none above a megabyte, may take.
SECONDS, MEMORY = 2.0, 200 * MIB
# More than this ends the attempt before it ends the machine.
MOST_MEMORY = 1024 * MIB
LONGEST_SENTENCE = 2000
EVIL = "open('executed', 'w').close()\n\n\nclass Evil:\n    pass\n"


@dataclass(frozen=True)
class Target:
    """A file that is damaged: its path, the folder that is needed to read it, and how it is read.

    read: given the folder; returns what tells results apart, and raises `FaultError` for one that
    makes no sense. exact: whether only the undamaged file's result is right.
    """

    folder: str
    file: str
    read: Callable[[Path], object]
    exact: bool = False


class Files:
    """One of each file that the library reads, and what it gives undamaged."""

    name, together, seconds = "files", 1, 30.0

    def __init__(self, folder: Path) -> None:
        self.pristine = folder
        make_checkpoints(folder)
        for checkpoint in ("model", "chat", "shards"):
            (folder / checkpoint / "evil.py").write_text(EVIL)
        for name in ("encoding", "texts"):
            (folder / name).mkdir()
        make_texts(folder / "texts")
        make_encoding(folder / "encoding", "../model")
        self.model = ht.load(folder / "model", device="cpu")
        read_run(self.model, folder / "run")
        self.targets = self._targets()
        self.expected = {one: one.read(folder / one.folder) for one in self.targets}

    def _targets(self) -> list[Target]:
        def run(folder: Path) -> object:
            return read_run(self.model, folder)

        return [
            *[Target("encoding", "encoded.safetensors", read_encoding, exact=True)] * 4,
            *[Target("encoding", "bias.safetensors", read_calibration, exact=True)] * 2,
            Target("encoding", "bias.pt", read_raw_calibration),
            *[Target("model", "config.json", read_checkpoint)] * 3,
            Target("model", "generation_config.json", read_checkpoint),
            Target("model", "model.safetensors", read_checkpoint),
            Target("model", "tokenizer.json", read_tokenizer),
            Target("model", "tokenizer_config.json", read_tokenizer),
            Target("chat", "config.json", read_checkpoint),
            Target("chat", "chat_template.jinja", read_tokenizer),
            Target("shards", "model.safetensors.index.json", read_checkpoint),
            Target("shards", "model-00002-of-00005.safetensors", read_checkpoint),
            Target("shards", "tokenizer.json", read_tokenizer),
            Target("texts", "text.txt", read_any_text),
            Target("texts", "quality.jsonl", read_questions),
            *[Target("run", "config.json", run)] * 2,
            *[Target("run", "predictions.jsonl", run)] * 2,
            Target("run", "metrics.json", run, exact=True),
        ]

    def attempt(self, draw: Random, folder: Path) -> None:
        target = draw.choice(self.targets)
        place = folder / target.folder
        shutil.copytree(self.pristine / target.folder, place)
        file = place / target.file
        what, content = damage(draw, file.read_bytes())
        file.write_bytes(content)
        os.chdir(folder)
        name = f"{target.folder}/{target.file}"
        limit_memory(MOST_MEMORY)
        memory, start = peak_rss(), time.process_time()
        with (folder / "stdout").open("w") as sys.stdout:
            try:
                found = target.read(place)
            except (ValueError, FileNotFoundError) as error:
                check_sentence(name, what, error)
            except FaultError as fault:
                raise FaultError(f"{name}: {fault.what}", f"{what} {fault.detail}") from fault
            except Exception as error:
                raise FaultError(f"{name}: {describe(error)}", f"{what}: {error}") from error
            else:
                if target.exact and found != self.expected[target]:
                    raise FaultError(
                        f"{name}: another result is taken ({what.partition(':')[0]})", what
                    )
        seconds, more = time.process_time() - start, peak_rss() - memory
        if seconds > SECONDS:
            raise FaultError(f"{name}: takes more than {SECONDS:g} s", f"{what}: {seconds:.1f} s")
        if more > MEMORY:
            raise FaultError(
                f"{name}: takes more than {MEMORY // MIB} MiB", f"{what}: {more // MIB}"
            )
        if (folder / "stdout").stat().st_size:
            raise FaultError(f"{name}: something on stdout", what)
        if [*folder.rglob("executed")]:
            raise FaultError(f"{name}: the checkpoint's own code ran", what)


def check_sentence(name: str, what: str, error: Exception) -> None:
    """Raise `FaultError` unless the library refuses in one sentence of its own."""
    frame, last = error.__traceback__, ""
    while frame is not None:
        last, frame = frame.tb_frame.f_code.co_filename, frame.tb_next
    message = str(error)
    if not is_own(last) or isinstance(error, UnicodeError):
        raise FaultError(f"{name}: {describe(error)}", f"{what}: {message}")
    if "\n" in message.strip() or not message.strip():
        raise FaultError(
            f"{name}: a message of {len(message.splitlines())} lines", f"{what}: {message}"
        )
    if len(message) > LONGEST_SENTENCE:
        raise FaultError(f"{name}: a message of more than {LONGEST_SENTENCE} characters", what)


def read_encoding(folder: Path) -> object:
    """All that an encoding holds."""
    encoded = ht.EncodedContext.load(folder / "encoded.safetensors")
    parts = {field.name: getattr(encoded, field.name) for field in fields(encoded)}
    return digest(parts)


def read_calibration(folder: Path) -> object:
    """A calibration with its stamp."""
    calibration = ht.Calibration.load(folder / "bias.safetensors")
    return digest({"bias": calibration.bias, "model": calibration.model})


def read_raw_calibration(folder: Path) -> object:
    """A calibration without a stamp, which holds numbers."""
    bias = ht.Calibration.load(folder / "bias.pt").bias
    if bias.ndim != 2 or not bias.isfinite().all():
        raise FaultError("a calibration that is none")
    return None


def read_checkpoint(folder: Path) -> object:
    """A checkpoint that encodes a text and answers."""
    model = ht.load(folder, device="cpu")
    if model.tokenizer is None:
        return None
    encoded = ht.encode(model, text(20), suffix="What is the pass key?", config=CONFIG)
    answer = ht.generate(model, encoded, max_new_tokens=2)
    if not encoded.logits.isfinite().all():
        raise FaultError("logits that are not finite")
    if not all(0 <= token < model.config.vocab_size for token in answer.token_ids):
        raise FaultError("tokens outside the vocabulary", str(answer.token_ids))
    return None


def read_tokenizer(folder: Path) -> object:
    """A tokenizer as the commands use one: what stands around a text, its tokens, and back."""
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        return None
    for chat in (True, False):
        compose(tokenizer, "Read", None, ["Why?"], chat, ask_later=False)
    if tokenizer.chat_template:
        chat_affixes(tokenizer, "Why?")
    model = ht.load(folder, device="cpu")
    encoded = ht.encode(model, text(20), suffix="What is the pass key?", config=CONFIG)
    encoded.text(tokenizer)
    return None


def read_any_text(folder: Path) -> object:
    """A text, which is its bytes."""
    file = folder / "text.txt"
    found = read_text(str(file))
    if found.encode() != file.read_bytes().removeprefix(b"\xef\xbb\xbf"):
        raise FaultError("another text than the file's")
    return None


def read_questions(folder: Path) -> object:
    """Questions with options, one of which is right."""
    data = read_quality(folder / "quality.jsonl")
    for question in data.questions:
        if not 0 <= question.right < len(question.options):
            raise FaultError("a question without a right option", str(question))
        if not all(isinstance(option, str) for option in (question.text, *question.options)):
            raise FaultError("a question that is no text", str(question))
        if not isinstance(data.articles[question.article], str):
            raise FaultError("an article that is no text")
    return None


def read_run(model: ht.Llama, folder: Path) -> object:
    """An evaluation that goes on in a folder, to its figures."""
    settings = {"task": "passkey", "methods": ["window"], "lengths": [100], "seed": 0}
    run = RunFolder(folder, settings, {"python": "3"})
    readers = make_readers(("window",), model, CONFIG)
    questions = Questions("passkey", (PASSKEY,), {100: 2}, 0, (0.5,))

    def layout(question: str, instruction: str = "", reply: str = "") -> tuple[None, str]:
        return None, question + reply

    metrics = ask(model, readers, questions, layout, run, lambda: None)
    run.finish(metrics)
    for row in (*metrics["by_length"], *metrics["by_depth"]):
        shares = [row["low"], row["accuracy"], row["high"]]
        if not all(type(share) in (int, float) and 0 <= share <= 1 for share in shares):
            raise FaultError("a share that is none", str(row))
        for name in ("seconds", "peak_bytes"):
            if not isinstance(row.get(name), int | float | None):
                raise FaultError(f"{name} that are no number", str(row))
    return [{**row, "seconds": None, "peak_bytes": None} for row in metrics["by_length"]]


def digest(content: Any) -> str:
    """Tells tensors and plain values apart."""
    if isinstance(content, torch.Tensor):
        own = content.detach().contiguous().view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(f"{content.dtype}{content.shape}".encode() + own).hexdigest()
    if isinstance(content, dict):
        return str({name: digest(part) for name, part in content.items()})
    return repr(content)
