"""Perplexity far into documents, by the paper's protocol (HOMER, section 4.3) scaled to the model.

A document's first tokens, as many as the context limit, are scored by the plain model. The rest is
cut into segments of half the limit; each is scored after `prefix ‖ context ‖ suffix`: the
document's first tokens, all that lies between, and the tokens right before the segment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.llama import Llama
from ..tokens import split_input
from .methods import Reader, token_losses
from .runs import Record, RunFolder
from .statistics import bootstrap_interval


@dataclass(frozen=True)
class PerplexityTask:
    """The documents by name, [tokens] token ids each, and the positions at which segments start.

    limit: the model's context limit, in tokens; position 0 stands for all that lies within it.
    """

    documents: Mapping[str, Tensor]
    limit: int
    positions: Mapping[str, tuple[int, ...]]

    @property
    def segment(self) -> int:
        """Tokens in a segment beyond the limit: 2048 for a limit of 4096."""
        return self.limit // 2

    @property
    def affix(self) -> int:
        """Tokens in the prefix, and in the suffix: 100 for a limit of 4096."""
        return max(1, min(100, self.limit // 40))

    def __len__(self) -> int:
        return sum(map(len, self.positions.values()))


def lay_out_documents(
    model: Llama, texts: Mapping[str, str], max_length: int | None, segments: int | None
) -> PerplexityTask:
    """Tokenise documents and choose the segments to score.

    max_length: tokens of each document to read, all if left out; segments: how many to score beyond
    the context limit, at even spacing, all if left out. Raises `ValueError` for a document too
    short for one segment beyond the limit.
    """
    limit = model.config.max_position_embeddings
    segment = limit // 2
    documents: dict[str, Tensor] = {}
    positions: dict[str, tuple[int, ...]] = {}
    for name, text in texts.items():
        begin, ids, _ = split_input(model, text, None, [], 0)
        tokens = torch.cat([begin, ids])[:max_length]
        if len(tokens) < limit + segment:
            raise ValueError(
                f"{name} has {len(tokens)} tokens to score; the protocol needs at least "
                f"{limit + segment}, the context limit and one segment."
            )
        starts = list(range(limit, len(tokens) - segment + 1, segment))
        if segments is not None and segments < len(starts):
            chosen = torch.linspace(0, len(starts) - 1, segments).round().long()
            starts = [starts[index] for index in chosen.tolist()]
        documents[name] = tokens
        positions[name] = (0, *starts)
    return PerplexityTask(documents, limit, positions)


def run_perplexity(
    model: Llama,
    readers: Mapping[str, Reader],
    task: PerplexityTask,
    folder: RunFolder,
    seed: int,
    on_segment: Callable[[], None],
) -> Record:
    """Score every segment by every method, write the losses to the folder, return the figures.

    seed: of the intervals' resampling. `on_segment` hears of each scored one.
    """
    for document, tokens in task.documents.items():
        for start, (name, reader) in product(task.positions[document], readers.items()):
            cell = {
                "id": _record_id(name, document, start),
                "method": name,
                "document": document,
                "position": start,
            }
            folder.complete(cell, partial(_score_segment, model, reader, task, tokens, start))
            on_segment()
    return _metrics(folder, tuple(readers), task, seed)


def _score_segment(
    model: Llama, reader: Reader, task: PerplexityTask, tokens: Tensor, start: int
) -> Record:
    """The mean loss of the tokens of the segment at `start`; of all but the first at the start of
    the document.
    """
    losses = _losses(model, reader, task, tokens, start)
    return {"tokens": len(losses), "loss": sum(losses) / len(losses)}


@torch.no_grad()
def _losses(
    model: Llama, reader: Reader, task: PerplexityTask, tokens: Tensor, start: int
) -> list[float]:
    if start == 0:
        first = tokens[: task.limit].to(model.device)
        logits = model.forward(first[:-1], model.new_cache(task.limit), all_logits=True)
        return F.cross_entropy(logits, first[1:], reduction="none").tolist()
    segment, affix = tokens[start : start + task.segment], task.affix
    prefix, suffix = tokens[:affix], tokens[start - affix : start]
    reading = reader(prefix, tokens[affix : start - affix], suffix, len(segment))
    return token_losses(reading, segment)


def _metrics(folder: RunFolder, names: tuple[str, ...], task: PerplexityTask, seed: int) -> Record:
    """Perplexity by method over everything scored, and at and up to the end of each segment."""
    starts = sorted(set().union(*task.positions.values()))
    overall: list[Record] = []
    by_position: list[Record] = []
    for name in names:
        so_far: list[Record] = []
        for start in starts:
            here = [
                folder.records[_record_id(name, document, start)]
                for document, chosen in task.positions.items()
                if start in chosen
            ]
            so_far += here
            by_position.append(
                {
                    "method": name,
                    "position": start + task.segment if start else task.limit,
                    **_perplexity(here, seed),
                    "running": _perplexity(so_far, seed)["perplexity"],
                }
            )
        overall.append({"method": name, **_perplexity(so_far, seed)})
    return {"task": "perplexity", "overall": overall, "by_position": by_position}


def _perplexity(records: list[Record], seed: int) -> Record:
    """The perplexity of some segments with its bootstrap interval; None where one failed or is not
    a finite number, since it cannot be left out and has no value to put in its place.
    """
    losses = [record.get("loss", math.nan) for record in records]
    errors = sum("error" in record for record in records)
    low = high = perplexity = None
    if all(map(math.isfinite, losses)):
        tokens = [record["tokens"] for record in records]
        total = sum(loss * count for loss, count in zip(losses, tokens, strict=True))
        perplexity = math.exp(total / sum(tokens))
        low, high = bootstrap_interval(losses, tokens, seed)
    return {
        "perplexity": perplexity,
        "low": low,
        "high": high,
        "segments": len(records),
        "errors": errors,
    }


def _record_id(name: str, document: str, start: int) -> str:
    return f"{name}/{document}/{start}"
