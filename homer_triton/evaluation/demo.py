"""The demo's measurements: the plain model and HOMER on pass keys, far beyond the context limit.

Every measurement runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import multiprocessing
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from tqdm import tqdm

from .. import quiet
from ..config import HomerConfig
from ..document import read
from ..encoding import encode
from ..generation import generate
from ..loading import load
from ..model.llama import Llama
from ..text.controls import plain_ids
from ..text.tokens import split_input
from .passkey import find_answer, make_sample

# The texts' lengths, as multiples of the model's context limit.
TIMES = (1, 4, 8, 16)
# The demo model finds keys in every layer, so it needs one warm-up layer only. Its chunks are too
# small to keep a core busy, so eight run at once.
_OWN: dict[str, Any] = {"layers_warmup": 1, "leaf_batch": 8}
READ_ONCE = "HOMER, read once"
SYSTEMS: dict[str, HomerConfig | None] = {
    "plain model": None,
    "HOMER": HomerConfig(**_OWN),
    "HOMER, the paper's": HomerConfig.paper(**_OWN),
    READ_ONCE: HomerConfig(),
}
# Enough for five digits and the end of the sentence; a space may be a token of its own.
NEW_TOKENS = 8


@dataclass(frozen=True)
class Answer:
    """A question, the key that was hidden, and the text that a system answered."""

    key: str
    question: str
    text: str

    @property
    def right(self) -> bool:
        return find_answer(self.text) == self.key


@dataclass(frozen=True)
class Measurement:
    """The results of one system at one length.

    times: the text's length as a multiple of the context limit; tokens: the same in tokens, the
    answer included; seconds: the mean time per question; peak_bytes: the peak memory above that of
    the loaded model.
    """

    system: str
    times: int
    tokens: int
    seconds: float
    peak_bytes: int
    answers: tuple[Answer, ...]

    @property
    def accuracy(self) -> float:
        return sum(answer.right for answer in self.answers) / len(self.answers)


def measure(checkpoint: str | Path, samples: int, seed: int) -> Iterator[Measurement]:
    """Ask every system for `samples` pass keys at every length, each key at another depth.

    checkpoint: a folder or hub id; seed: of the keys and texts, which are the same for every
    system. Yields the measurements by length, and then in the order of `SYSTEMS`. Raises the errors
    of `load`.
    """
    # Children are forked from a server that has imported everything and run nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([quiet.__name__, __name__])
    tasks = [
        (checkpoint, system, times, samples, seed) for times, system in product(TIMES, SYSTEMS)
    ]
    with context.Pool(2, _prepare_child, maxtasksperchild=1) as pool:
        yield from pool.imap(_measure, tasks)


def _prepare_child() -> None:
    # Ctrl-C reaches the whole process group. The parent ends its children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # tqdm's default lock is shared between processes; one that is killed would never release it.
    tqdm.set_lock(threading.RLock())
    # Two children run at once, and the demo model's matrices are too small for several threads.
    torch.set_num_threads(1)


def _measure(task: tuple[str | Path, str, int, int, int]) -> Measurement:
    """One measurement, in a process that has run nothing before."""
    checkpoint, system, times, samples, seed = task
    model = load(checkpoint, "cpu", "float32", ops="torch")
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(f"{checkpoint} has no tokenizer, which the demo needs.")
    tokens = times * model.config.context_limit

    def count(text: str) -> int:
        return len(plain_ids(tokenizer, text))

    # The libraries initialize themselves on a short first question, which is not measured.
    _ask(model, "What is the pass key?", "The pass key is", system)
    resident = _peak_resident()
    answers, seconds = [], 0.0
    for index in range(samples):
        # Text, question and answer together have `tokens` tokens.
        sample = make_sample(
            tokens - NEW_TOKENS, (index + 0.5) / samples, seed * samples + index, count
        )
        start = perf_counter()
        token_ids = _ask(model, sample.context, sample.prompt, system)
        seconds += perf_counter() - start
        text = str(tokenizer.decode(token_ids, skip_special_tokens=True))
        answers.append(Answer(sample.answer, sample.prompt, text))
    peak = _peak_resident() - resident
    return Measurement(system, times, tokens, seconds / samples, peak, tuple(answers))


def _ask(model: Llama, context: str, question: str, system: str) -> list[int]:
    """The token ids of a system's answer."""
    config = SYSTEMS[system]
    if config is None:
        return _ask_plain(model, context, question)
    if system == READ_ONCE:
        with warnings.catch_warnings(action="ignore"):  # the demo model has no retrieval heads
            encoded = read(model, context).encode(question, config=config)
    else:
        encoded = encode(model, context, suffix=question, config=config)
    return generate(model, encoded, max_new_tokens=NEW_TOKENS).token_ids


@torch.no_grad()
def _ask_plain(model: Llama, context: str, question: str) -> list[int]:
    """The token ids of the plain model's greedy answer: one prefill, then one token at a time."""
    fresh = torch.cat(split_input(model, context, None, question, 0))
    cache = model.new_cache(len(fresh) + NEW_TOKENS)
    filled = 0
    answer: list[int] = []
    while len(answer) < NEW_TOKENS:
        logits = model.forward(fresh, cache, filled)
        filled += len(fresh)
        fresh = logits.argmax()[None]
        answer.append(int(fresh))
        if answer[-1] in model.end_tokens:
            break
    return answer


def _peak_resident() -> int:
    """The largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
