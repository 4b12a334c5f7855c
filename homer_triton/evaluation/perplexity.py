"""Perplexity far into documents, by the paper's protocol (HOMER, section 4.3) scaled to the model.

A document's first tokens, as many as the context limit, are scored by the plain model. The rest is
cut into segments of half the limit; each is scored after `prefix ‖ context ‖ suffix`: the
document's first tokens, all that lies between, and the tokens right before the segment.

A segment's tokens are also told apart by where the text last had them: "near", in what the
truncated window holds or in the segment itself; "far", only before that; "new", nowhere. What a
method remembers from beyond the window shows in the far ones.
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
from ..text.tokens import split_input
from .methods import Reader, token_losses
from .runs import Record, RunFolder
from .statistics import bootstrap_interval

REFERENCES = ("near", "far", "new")
# What the other methods are compared with, token by token.
BASELINE = "window"


@dataclass(frozen=True)
class PerplexityTask:
    """The documents by name, [tokens] token ids each, and the positions at which segments start.

    limit: the model's context limit, in tokens; position 0 stands for all that lies within it;
    suffix: tokens right before a segment that no method leaves out.
    """

    documents: Mapping[str, Tensor]
    limit: int
    positions: Mapping[str, tuple[int, ...]]
    suffix: int

    @property
    def segment(self) -> int:
        """Tokens in a segment beyond the limit: 2048 for a limit of 4096."""
        return self.limit // 2

    @property
    def affix(self) -> int:
        """Tokens in the prefix, and in the paper's suffix: 100 for a limit of 4096."""
        return default_affix(self.limit)

    def references(self, tokens: Tensor, start: int) -> list[str]:
        """Where a document last had each token of the segment at `start`: near, far or new."""
        ids = tokens.tolist()
        reach = start - (self.limit - self.affix - self.segment)
        near, before = {*ids[: self.affix], *ids[reach:start]}, set(ids[:start])
        kinds = []
        for token in ids[start : start + self.segment]:
            kinds.append("near" if token in near else "far" if token in before else "new")
            near.add(token)
        return kinds

    def __len__(self) -> int:
        return sum(map(len, self.positions.values()))


def default_affix(limit: int) -> int:
    """The paper's 100 tokens for a limit of 4096, in proportion for shorter ones."""
    return max(1, min(100, limit // 40))


def lay_out_documents(
    model: Llama,
    texts: Mapping[str, str],
    max_length: int | None,
    segments: int | None,
    suffix_len: int | None = None,
) -> PerplexityTask:
    """Tokenise documents and choose the segments to score.

    max_length: tokens of each document to read, all if left out; segments: how many to score beyond
    the context limit, at even spacing, all if left out; suffix_len: tokens right before a segment
    that are its suffix, the paper's 100 if left out. Raises `ValueError` for a document too short
    for one segment beyond the limit, and a suffix that is empty or leaves no context.
    """
    limit = model.config.context_limit
    segment = limit // 2
    suffix = default_affix(limit) if suffix_len is None else suffix_len
    most = limit - segment - default_affix(limit) - 1
    if not 1 <= suffix <= most:
        raise ValueError(f"suffix_len={suffix} must be from 1 to {most} for this model.")
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
    return PerplexityTask(documents, limit, positions, suffix)


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
        for start in task.positions[document]:
            ids = {name: _record_id(name, document, start) for name in readers}
            mine = folder.mine(list(ids.values()))
            for name, reader in readers.items():
                if ids[name] in mine:
                    cell: Record = {"id": ids[name], "method": name}
                    cell |= {"document": document, "position": start}
                    score = partial(_score_segment, model, reader, task, tokens, start)
                    folder.complete(cell, score)
                on_segment()
    folder.gather()
    return _metrics(folder, tuple(readers), task, seed)


def _score_segment(
    model: Llama, reader: Reader, task: PerplexityTask, tokens: Tensor, start: int
) -> Record:
    """The mean loss of the tokens of the segment at `start`, and of those of each reference; of all
    tokens but the first at the start of the document.
    """
    losses = _losses(model, reader, task, tokens, start)
    if start == 0:
        return _mean(losses)
    kinds = task.references(tokens, start)
    parts = {
        name: _mean([loss for loss, kind in zip(losses, kinds, strict=True) if kind == name])
        for name in REFERENCES
    }
    return {**_mean(losses), "references": parts}


def _mean(losses: list[float]) -> Record:
    return {"tokens": len(losses), "loss": sum(losses) / max(1, len(losses))}


@torch.no_grad()
def _losses(
    model: Llama, reader: Reader, task: PerplexityTask, tokens: Tensor, start: int
) -> list[float]:
    if start == 0:
        first = tokens[: task.limit].to(model.device)
        logits = model.forward(first[:-1], model.new_cache(task.limit), all_logits=True)
        return F.cross_entropy(logits, first[1:], reduction="none").tolist()
    segment, begin = tokens[start : start + task.segment], start - task.suffix
    prefix, suffix = tokens[: task.affix], tokens[begin:start]
    reading = reader(prefix, tokens[task.affix : begin], suffix, len(segment))
    return token_losses(reading, segment)


def _metrics(folder: RunFolder, names: tuple[str, ...], task: PerplexityTask, seed: int) -> Record:
    """Perplexity by method over everything scored, at and up to the end of each segment, and over
    the tokens of each reference.
    """
    starts = sorted(set().union(*task.positions.values()))
    overall: list[Record] = []
    by_position: list[Record] = []
    later: dict[str, list[Record]] = {}
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
        later[name] = [record for record in so_far if record["position"]]
    return {
        "task": "perplexity",
        "overall": overall,
        "by_position": by_position,
        "by_reference": _by_reference(later, seed),
    }


def _by_reference(records: Mapping[str, list[Record]], seed: int) -> list[Record]:
    """Perplexity by reference and method, and how many times the window's it is, where that was
    scored: both with intervals, the second from the segments' differences.

    records: by method, the same segments in the same order.
    """
    rows = []
    for reference, name in product(REFERENCES, records):
        parts = [_part(record, reference) for record in records[name]]
        row = {"method": name, "reference": reference, **_perplexity(parts, seed)}
        if BASELINE in records:
            theirs = [_part(record, reference) for record in records[BASELINE]]
            ratio = _perplexity([_less(*pair) for pair in zip(parts, theirs, strict=True)], seed)
            row["times_window"] = ratio["perplexity"]
            row["times_window_low"], row["times_window_high"] = ratio["low"], ratio["high"]
        rows.append(row)
    return rows


def _part(record: Record, reference: str) -> Record:
    """What a segment's record says of the tokens of one reference."""
    return record if "error" in record else record["references"][reference]


def _less(ours: Record, theirs: Record) -> Record:
    """How much more two methods lose on the same tokens."""
    if "error" in ours or "error" in theirs:
        return {"error": "not scored by both"}
    return {"tokens": ours["tokens"], "loss": ours["loss"] - theirs["loss"]}


def _perplexity(records: list[Record], seed: int) -> Record:
    """The perplexity of those segments that have tokens, with its bootstrap interval; None where
    one failed or is not a finite number, since it cannot be left out and has no value to put in its
    place, and where nothing is left.
    """
    records = [record for record in records if record.get("tokens") != 0]
    losses = [record.get("loss", math.nan) for record in records]
    tokens = [record.get("tokens", 0) for record in records]
    low = high = perplexity = None
    if records and all(map(math.isfinite, losses)):
        total = sum(loss * count for loss, count in zip(losses, tokens, strict=True))
        perplexity = math.exp(total / sum(tokens))
        low, high = bootstrap_interval(losses, tokens, seed)
    return {
        "perplexity": perplexity,
        "low": low,
        "high": high,
        "segments": len(records),
        "tokens": sum(tokens),
        "errors": sum("error" in record for record in records),
    }


def _record_id(name: str, document: str, start: int) -> str:
    return f"{name}/{document}/{start}"
