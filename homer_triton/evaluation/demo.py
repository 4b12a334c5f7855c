"""What the demo shows: the plain model beside HOMER on passkeys, up to 16 times the context limit.

Every measurement has a process of its own, so that one's memory is not another's.
"""

from __future__ import annotations

import multiprocessing
import resource
import signal
import sys
import threading
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
from ..encoding import encode
from ..generation import generate
from ..loading import load
from ..model.llama import Llama
from ..text.controls import plain_ids
from ..text.tokens import split_input
from .passkey import find_answer, make_sample

# Texts as multiples of the model's context limit.
TIMES = (1, 4, 8, 16)
# The demo model finds keys in every layer; its chunks are too small to keep even one core busy.
_OWN: dict[str, Any] = {"layers_warmup": 1, "leaf_batch": 8}
SYSTEMS: dict[str, HomerConfig | None] = {
    "plain model": None,
    "HOMER": HomerConfig(**_OWN),
    "HOMER, the paper's": HomerConfig.paper(**_OWN),
}
# A space may be a token of its own; five digits and the end of the sentence must fit.
NEW_TOKENS = 8


@dataclass(frozen=True)
class Answer:
    """One question's outcome: the key that was hidden, and what was said."""

    key: str
    question: str
    text: str

    @property
    def right(self) -> bool:
        return find_answer(self.text) == self.key


@dataclass(frozen=True)
class Measurement:
    """One system at one length.

    times: the text's length as a multiple of the context limit; tokens: the same in tokens, the
    answer included; seconds: mean per question; peak_bytes: the most memory above that of the
    loaded model.
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
    """Ask every system for `samples` passkeys at every length, each key at another depth.

    checkpoint: a folder or hub id; seed: draws keys and texts, the same ones for every system.
    Yields one measurement after another, by length and in `SYSTEMS`' order. Raises as `load` does.
    """
    # Children are copies of a server that has imported everything and run nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([quiet.__name__, __name__])
    tasks = [
        (checkpoint, system, times, samples, seed) for times, system in product(TIMES, SYSTEMS)
    ]
    with context.Pool(2, _prepare_child, maxtasksperchild=1) as pool:
        yield from pool.imap(_measure, tasks)


def _prepare_child() -> None:
    # An interrupt from the keyboard reaches the whole process group; the parent ends its children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # tqdm's own lock is shared between processes, and one that is ended would leave it behind.
    tqdm.set_lock(threading.RLock())
    # The demo model's matrices are too small to share out, and two children run at once.
    torch.set_num_threads(1)


def _measure(task: tuple[str | Path, str, int, int, int]) -> Measurement:
    """One measurement, in a process that has done nothing before."""
    checkpoint, system, times, samples, seed = task
    model = load(checkpoint, "cpu", "float32", ops="torch")
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(f"{checkpoint} has no tokenizer, which the demo's texts need.")
    tokens = times * model.config.context_limit
    config = SYSTEMS[system]

    def count(text: str) -> int:
        return len(plain_ids(tokenizer, text))

    # A short first question makes the libraries set themselves up; what they take is not counted.
    _ask(model, "What is the pass key?", "The pass key is", config)
    resident = _peak_resident()
    answers, seconds = [], 0.0
    for index in range(samples):
        # Together with the answer the text fills its length.
        sample = make_sample(
            tokens - NEW_TOKENS, (index + 0.5) / samples, seed * samples + index, count
        )
        start = perf_counter()
        token_ids = _ask(model, sample.context, sample.prompt, config)
        seconds += perf_counter() - start
        text = str(tokenizer.decode(token_ids, skip_special_tokens=True))
        answers.append(Answer(sample.answer, sample.prompt, text))
    peak = _peak_resident() - resident
    return Measurement(system, times, tokens, seconds / samples, peak, tuple(answers))


def _ask(model: Llama, context: str, question: str, config: HomerConfig | None) -> list[int]:
    """Token ids of the answer of HOMER with some settings, or of the plain model for None."""
    if config is None:
        return _ask_plain(model, context, question)
    encoded = encode(model, context, suffix=question, config=config)
    return generate(model, encoded, max_new_tokens=NEW_TOKENS).token_ids


@torch.no_grad()
def _ask_plain(model: Llama, context: str, question: str) -> list[int]:
    """Token ids of the plain model's greedy answer: the whole input at once, then one by one."""
    fresh = torch.cat(split_input(model, context, None, question, 0))
    cache = model.new_cache(len(fresh) + NEW_TOKENS)
    filled = 0
    answer: list[int] = []
    while len(answer) < NEW_TOKENS:
        logits = model.forward(fresh, cache, filled)
        filled += len(fresh)
        fresh = logits.argmax()[None]
        answer.append(int(fresh))
        if answer[-1] in model.config.eos_token_ids:
            break
    return answer


def _peak_resident() -> int:
    """Bytes of this process's largest resident set so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
