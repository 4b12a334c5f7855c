"""Servers to ask: in this process, on a thread of their own, or as `homer serve`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Self

import httpx
import openai

import homer_triton as ht
from homer_triton.demo import CHECKPOINT
from homer_triton.serving.app import make_app
from homer_triton.serving.engine import Engine
from homer_triton.serving.memory import Memory
from homer_triton.serving.server import Server, bind
from homer_triton.serving.service import Service
from homer_triton.serving.sources import Sources
from homer_triton.serving.store import Store

FILLER = "The grass is green. The sky is blue. " * 40
QUESTION = "What is the pass key? The pass key is"
CONFIG = ht.HomerConfig(max_chunk_len=128, layers_warmup=1)
MiB = 2**20


def story(key: int) -> str:
    """A text of some 900 tokens that hides a pass key."""
    return f"{FILLER}The pass key is {key}. Remember it. {key} is the pass key. {FILLER}"


def load_demo() -> ht.Llama:
    return ht.load(CHECKPOINT, "cpu", "float32", ops="torch")


@dataclass
class Library:
    """What the library says, to hold the server against."""

    model: ht.Llama

    def about(self, text: str, question: str, new: int, *later: str) -> str:
        """The answer to a question about a text that was read for it; later: further turns."""
        encoded = ht.encode(self.model, text, suffix=f"\n{question}", config=CONFIG)
        return ht.generate(self.model, encoded, "".join(later) or None, new).text

    def many(self, prompts: list[str], new: int) -> list[str]:
        """`plain` for many prompts, side by side."""
        read = self.model.tokenizer
        ids = [[1, *read(prompt, add_special_tokens=False)["input_ids"]] for prompt in prompts]
        whole = ht.HomerConfig(128, 128)
        encoded = [ht.encode(self.model, own[:-1], [], own[-1:], whole) for own in ids]
        answers = []
        for first in range(0, len(encoded), 50):
            part = ht.generate_batch(self.model, encoded[first : first + 50], max_new_tokens=new)
            answers += [answer.text for answer in part]
        return answers

    def plain(self, prompt: str, new: int, **settings: Any) -> str:
        """How the plain model goes on with a prompt that fits it."""
        ids = self.model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        whole = ht.HomerConfig(max_chunk_len=len(ids) + 1, target_len=len(ids) + 1)
        encoded = ht.encode(self.model, ids[:-1], None, ids[-1:], whole)
        return ht.generate(self.model, encoded, None, new, **settings).text


def make_service(
    folder: Path,
    model: ht.Llama | None = None,
    running: int = 16,
    waiting: int = 256,
    disk: int = 1024 * MiB,
    hand: int = 256 * MiB,
    config: ht.HomerConfig = CONFIG,
    **defaults: Any,
) -> Service:
    """A service of the demo's model, whose documents are kept in a folder."""
    model = load_demo() if model is None else model
    store, memory = Store(folder, model.fingerprint, disk), Memory(hand)
    templated = model.tokenizer is not None and bool(model.tokenizer.chat_template)
    sources = Sources(model, config, templated, None, store, memory)
    engine = Engine(model, config, running, waiting, memory)
    decoding = ht.Decoding(**{"max_new_tokens": 256, **defaults})
    return Service("demo", model.fingerprint, engine, sources, store, decoding)


@contextmanager
def served(
    service: Service,
    key: str | None = None,
    most_bytes: int = 8 * MiB,
    is_local: bool = True,
    origins: tuple[str, ...] = (),
) -> Iterator[str]:
    """A service behind a port of this machine, as the address."""
    listening = bind("127.0.0.1", 0)
    server = Server(make_app(service, key, most_bytes, is_local, origins), service)
    thread = Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


class Process:
    """`homer serve` on the demo's checkpoint."""

    def __init__(self, folder: Path, *options: object) -> None:
        words = ("serve", "--model", CHECKPOINT, "--name", "demo", "--device", "cpu", "--json")
        settings = ("--dtype", "float32", "--max-chunk-len", 128, "--layers-warmup", 1)
        where = ("--port", 0, "--documents", folder)
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "homer_triton"),
                *(str(word) for word in (*words, *settings, *where, *options)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        self.url = json.loads(line)["url"]
        deadline = time.monotonic() + 60
        while True:
            try:
                httpx.get(f"{self.url}/health").raise_for_status()
                return
            except httpx.HTTPError:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    @property
    def resident(self) -> int:
        """Bytes of memory that the process has."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.split("VmRSS:")[1].split()[0])


def client(url: str, key: str = "none", **settings: Any) -> openai.OpenAI:
    """OpenAI's own, which tries nothing twice."""
    settings = {"max_retries": 0, "timeout": 120, **settings}
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, **settings)


def asking(question: str) -> list[Any]:
    """A conversation of one question."""
    return [{"role": "user", "content": question}]


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    """Wait until a function says that it is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
