"""Any task of EleutherAI's lm-evaluation-harness, long requests read by one of our methods.

What fits the model's context limit goes through the plain model, as in the harness itself. A longer
request is cut into prefix (what the tokenizer puts before a text), context and suffix for the
method; the suffix is the request's last whole lines, at most `SUFFIX_LEN` tokens, since that is
where tasks put their question. Importing this module needs the package lm_eval.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval import simple_evaluate, utils
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..config import HomerConfig
from ..model.errors import shorten
from ..model.llama import Llama
from ..text.tokens import beginning, tokenize
from .methods import make_readers

# The most tokens of a request that may be its suffix, and the share of a chunk that they may take.
SUFFIX_LEN = 128
SUFFIX_SHARE = 4
# Where a task does not say how many tokens to generate: the harness's own default.
NEW_TOKENS = 256
# Tokens whose logits are alive at once.
LOGIT_ROWS = 512


class HomerLM(TemplateLM):
    """The harness's view of a model and the method that reads what is too long for it."""

    def __init__(
        self, model: Llama, method: str, config: HomerConfig, chat_template: bool = False
    ) -> None:
        """method: a name in `methods.METHODS`; chat_template: requests are conversations in the
        tokenizer's template, whose control tokens count; they are nothing but text otherwise.
        Raises `ValueError` for another name, and for a model without a tokenizer or without a token
        that begins or ends a text.
        """
        super().__init__()
        if model.tokenizer is None:
            raise ValueError("The harness gives text, and the checkpoint has no tokenizer.")
        self.model = model
        self._in_template = chat_template
        self.tokenizer: PreTrainedTokenizerBase = model.tokenizer
        self._reader = make_readers((method,), model, config)[method]
        self._suffix_len = min(SUFFIX_LEN, max(1, config.chunk_len(model.config) // SUFFIX_SHARE))
        self._beginning = beginning(model)
        self._ends = model.end_tokens
        if not self._ends and not self._beginning:
            raise ValueError("The model has no token that begins or ends a text.")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int([*self._ends, *self._beginning][0])

    @property
    def prefix_token_id(self) -> int:
        """The token that a text without a beginning is read after."""
        return int([*self._beginning, self.eot_token_id][0])

    @property
    def max_length(self) -> int:
        """Tokens that the plain model reads at most: its context limit."""
        return self.model.config.context_limit

    @property
    def tokenizer_name(self) -> str:
        """Tells chat templates apart in the harness's caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the text that the model was trained on. Raises `ValueError` where the
        template does not take it.
        """
        try:
            turns = self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except Exception as error:  # a template is a program of the checkpoint's
            raise ValueError(
                f"The chat template fails on a conversation ({shorten(error)})."
            ) from error
        return str(turns)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids. What the tokenizer puts before a text comes first, unless it is there already
        or `add_special_tokens` is false.
        """
        ids: list[int] = tokenize(
            self.model, string, "the request", special_tokens=self._in_template
        ).tolist()
        if add_special_tokens is False or (self._begins(ids) and not add_special_tokens):
            return ids
        return [*self._beginning, *ids]

    def _begins(self, ids: list[int]) -> bool:
        """Whether token ids begin with what the tokenizer puts before a text."""
        return ids[: len(self._beginning)] == self._beginning

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether it is the greedy one.

        requests: texts, and the token ids of context and continuation. Consecutive requests with
        the same context read it once.
        """
        results = []
        bar = tqdm(total=len(requests), desc="requests", disable=disable_tqdm or None)
        for (context, _fits), alike in groupby(requests, self._same_reading):
            continuations = [continuation for _, _, continuation in alike]
            text = self._read(context, max(map(len, continuations)))
            for continuation in continuations:
                results.append(text.score(continuation))
                bar.update()
        bar.close()
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of the context limit, every token scored
        once: the harness's own definition, which leaves nothing for a method to read. The first
        token is read and not scored; the harness's "hf" model, where its tokenizer adds one, scores
        a second one too.
        """
        totals = []
        for (text,) in tqdm([r.args for r in requests], disable=disable_tqdm or None):
            windows = utils.get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False),
                self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [(("", ""), *utils.make_disjoint_window(window)) for window in windows]
            totals.append(sum(one for one, _ in self._loglikelihood_tokens(pairs, True)))
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The greedy continuation of each context, up to a stop string or the model's end token.

        Raises `ValueError` for a task that wants samples.
        """
        answers = []
        for context, settings in tqdm([r.args for r in requests], disable=disable_tqdm or None):
            until, most = _stops(settings)
            ids = self.tok_encode(context) or [self.prefix_token_id]
            answers.append(self._generate(self._read(ids, most), until, most))
        return answers

    @torch.no_grad()
    def _generate(self, text: _Text, until: list[str], most: int) -> str:
        """At most `most` tokens behind a text, without the stop string that ends them."""
        answer, new, logits = "", list[int](), text.logits
        while len(new) < most:
            new.append(int(logits.argmax()))
            if new[-1] in self._ends:
                break
            answer = str(self.tokenizer.decode(new, skip_special_tokens=True))
            if any(stop in answer for stop in until):
                break
            if len(new) < most:
                last = torch.tensor(new[-1:], device=self.model.device)
                logits = text.forward(last, len(new) - 1)[0]
        for stop in until:
            answer = answer.split(stop)[0]
        return answer

    def _same_reading(
        self, request: tuple[tuple[str, str], list[int], list[int]]
    ) -> tuple[list[int], bool]:
        """What requests have in common that go on from one reading: the context, and who reads."""
        _, context, continuation = request
        return context, self._fits(len(context), len(continuation))

    def _fits(self, context: int, room: int) -> bool:
        """Whether the plain model reads a context and goes on: the last token is never read."""
        return context + room - 1 <= self.max_length

    @torch.no_grad()
    def _read(self, context: list[int], room: int) -> _Text:
        """Read a context's token ids, with room for as many tokens behind it."""
        ids = torch.tensor(context)
        prefix = len(self._beginning) if self._begins(context) else 0
        suffix = suffix_length(self.tokenizer, context, self._suffix_len)
        if self._fits(len(ids), room) or len(ids) <= prefix + suffix:
            cache = self.model.new_cache(len(ids) + room, to_grow=True)
            logits = self.model.forward(ids.to(self.model.device), cache)
            return _Text(self.model, cache, len(ids), len(ids), logits)
        parts = ids[:prefix], ids[prefix : len(ids) - suffix], ids[len(ids) - suffix :]
        reading = self._reader(*parts, room)
        encoded = reading.encoded
        cache = encoded.open_cache(reading.model, room)
        return _Text(reading.model, cache, len(encoded), encoded.next_position, encoded.logits)


@dataclass(frozen=True)
class _Text:
    """A context that was read, to go on from again and again.

    cache: [L, 2, filled + room, HKV, D], of which the first `filled` rows are the context's;
    position: that of the next token; logits: [V], for it.
    """

    model: Llama
    cache: Tensor
    filled: int
    position: int
    logits: Tensor

    @torch.no_grad()
    def score(self, continuation: list[int]) -> tuple[float, bool]:
        """The log-likelihood of the tokens that follow, and whether each is the likeliest."""
        total, greedy = 0.0, True
        for logits, targets in self._predictions(torch.tensor(continuation, dtype=torch.int64)):
            total -= F.cross_entropy(logits, targets, reduction="sum").item()
            greedy = greedy and bool((logits.argmax(-1) == targets).all())
        return total, greedy

    def _predictions(self, following: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits [n, V] and the tokens [n] that they are to predict, in order."""
        following = following.to(self.model.device)
        yield self.logits[None][: len(following)], following[:1]
        for start in range(0, len(following) - 1, LOGIT_ROWS):
            read = following[start : min(start + LOGIT_ROWS, len(following) - 1)]
            yield self.forward(read, start), following[start + 1 : start + 1 + len(read)]

    def forward(self, token_ids: Tensor, after: int) -> Tensor:
        """Logits [n, V] behind tokens [n] that stand `after` rows behind the context."""
        filled, position = self.filled + after, self.position + after
        return self.model.forward(token_ids, self.cache, filled, position, all_logits=True)


def suffix_length(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], most: int) -> int:
    """How many of a request's last tokens are its suffix: as many whole lines as `most` tokens
    hold, or `most` where the last line alone is longer.
    """
    start = max(0, len(token_ids) - most)
    for index in range(max(start, 1), len(token_ids)):
        if "\n" in str(tokenizer.decode([token_ids[index - 1]])):
            return len(token_ids) - index
    return len(token_ids) - start


def evaluate_tasks(
    lm: HomerLM,
    names: tuple[str, ...],
    tasks: LoadedTasks,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
) -> dict[str, Any]:
    """The harness's results on tasks, groups or tags of these names.

    tasks: what `open_tasks` found; limit: documents of each task, all if left out; num_fewshot:
    examples before each request, the task's own number if left out; chat_template: put requests
    into the tokenizer's. Raises `ValueError` where a task wants samples.
    """
    results: dict[str, Any] = simple_evaluate(
        lm,
        tasks=list(names),
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=chat_template,
        task_manager=tasks,
    )
    return results


def open_tasks(names: tuple[str, ...], include_path: Path | None = None) -> LoadedTasks:
    """The harness's tasks, and those of a folder of one's own.

    Their data is there when this returns. Raises `ValueError` for no names, unknown ones and tasks
    that cannot be loaded, and `FileNotFoundError` for a missing folder.
    """
    if not names:
        raise ValueError("--tasks is empty; give at least one name.")
    if include_path is not None:
        if not include_path.is_dir():
            raise FileNotFoundError(f"There is no folder {include_path}.")
        own = LoadedTasks(include_path=include_path, include_defaults=False)
        if all(name in own.all_subtasks for name in names):
            own.load(list(names))
            return own  # the harness's own thousands take a while to list
    everything = LoadedTasks(include_path=include_path)
    for name in names:
        if name not in everything.all_tasks:
            raise ValueError(
                f"The task {name!r} is not known to lm_eval; `lm_eval ls tasks` lists them, and "
                "--include-path adds a folder."
            )
    everything.load(list(names))
    return everything


class LoadedTasks(TaskManager):
    """The harness's tasks, of which those asked for first are loaded, once."""

    _loaded: Any = None

    def load(self, task_list: Any) -> Any:
        """The tasks themselves, with their data; whatever a file or the network does wrong becomes
        a `ValueError`.
        """
        try:
            self._loaded = self._loaded or super().load(task_list)
        except Exception as error:  # task files, data sets and the hub raise many kinds
            reason = " ".join(str(error).split()).rstrip(".")
            raise ValueError(
                f"The tasks cannot be loaded ({type(error).__name__}): {reason}."
            ) from error
        return self._loaded


def _stops(settings: dict[str, Any]) -> tuple[list[str], int]:
    """A request's stop strings and most new tokens. Raises `ValueError` where it wants samples."""
    sampled, temperature = settings.get("do_sample"), settings.get("temperature")
    if temperature is None:
        temperature = 1.0 if sampled else 0.0
    if sampled is not False and float(temperature) > 0:
        raise ValueError("The task wants sampled answers; only greedy ones are made here.")
    until = settings.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    names = ("max_gen_toks", "max_new_tokens", "max_tokens")
    most = next((settings[name] for name in names if name in settings), NEW_TOKENS)
    return [stop for stop in stops if stop], int(most)
