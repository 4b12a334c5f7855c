"""Finds the places of a text that a question attends to, in the keys that a reading kept.

The question runs without the text, behind the place where a chunk would end. Its last tokens attend
to all stored tokens. A unit (a sentence, or a line) gets from each of them the attention of its
best token, as in late interaction (ColBERT, Khattab & Zaharia 2020). Tokens that few units have
count more, and units that have the very tokens get more votes, as in BM25 (Robertson & Zaragoza
2009).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import log1p
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..model.llama import Llama, Pass
from .reading import ReadHeads

if TYPE_CHECKING:
    from ..context import EncodedContext

# How many of a question's last tokens vote.
MOST_ASKING = 32
# What a unit gets for having a token of the question, where all attention of that token is 1.
WORD_VOTE = 0.18
# How much a unit's length lowers that: BM25's b.
LENGTH_SHARE = 0.4
# Units are read again that have at least this share of the best one's attention.
LEAST_SHARE = 0.5


@dataclass(frozen=True)
class Asking:
    """A question's queries: q [A, H, D] in the order of the heads, rotated, of its last A tokens;
    before [A, H] float32, the logarithm of what their softmax adds up to over the tokens of
    the question and of what stands before the text.
    """

    q: Tensor
    before: Tensor


@torch.no_grad()
def ask(model: Llama, heads: ReadHeads, prefix: Tensor, suffix: Tensor, chunk_end: int) -> Asking:
    """Run `prefix ‖ suffix` without the text, as far as the heads are.

    The suffix stands where it would stand behind a whole chunk.

    Args:
        model: The model.
        heads: The heads that read the text.
        prefix: [P] ids, such as a system prompt.
        suffix: [S] ids, the question.
        chunk_end: The position after a whole chunk.
    """
    tokens = torch.cat([prefix, suffix]).to(model.device)
    asking, config = min(MOST_ASKING, len(suffix)), model.config
    rows = torch.arange(len(tokens), device=model.device)
    gap = max(chunk_end - len(prefix), 0)
    positions = torch.where(rows < len(prefix), rows, rows + gap)
    rotary = model.rotary(len(tokens) + gap)
    run = Pass(model, positions[None], model.new_cache(0), rotary=rotary)
    hidden = model.embed(tokens[None])
    unseen = rows > rows[-asking:, None]
    queries: list[Tensor] = []
    totals: list[Tensor] = []
    for layer in range(heads.last_layer + 1):
        q, k, v = run.project(layer, hidden)
        _, own = heads.in_layer(layer)
        if own:
            asked = q[0, -asking:, own]
            key_heads = [head // heads.groups for head in own]
            logits = torch.einsum("ahd,thd->aht", asked.float(), k[0, :, key_heads].float())
            logits = (logits * config.head_dim**-0.5).masked_fill_(unseen[:, None], -torch.inf)
            queries.append(asked)
            totals.append(logits.logsumexp(-1))
        if layer < heads.last_layer:
            hidden = run.attend(layer, hidden, q, k, v)
            run.feed_forward_(layer, hidden)
        del q, k, v
    return Asking(torch.cat(queries, 1), torch.cat(totals, 1))


def find(
    model: Llama,
    heads: ReadHeads,
    stored: dict[str, Tensor],
    prefix: Tensor,
    suffix: Tensor,
    chunk_end: int,
) -> tuple[Tensor, Tensor]:
    """The votes that a question gives each unit, and the part of them that is attention: [U]
    float32 on the CPU.

    Args:
        model: The model that read the text.
        heads: The heads that it was read by.
        stored: `keys`, `scales`, `token_ids` and `unit_starts` of the text.
        prefix: [P] ids, what stands before the text.
        suffix: [S] ids, the question.
        chunk_end: The position after a whole chunk.
    """
    asking = ask(model, heads, prefix, suffix, chunk_end)
    places = {key_head: index for index, key_head in enumerate(heads.key_heads)}
    key_heads = [places[layer, head // heads.groups] for layer, head in heads.heads]
    attention = model.ops.score_units(
        asking.q,
        stored["keys"].to(model.device),
        stored["scales"].to(model.device),
        key_heads,
        torch.tensor(heads.weights, device=model.device),
        asking.before,
        stored["unit_starts"].to(model.device),
    ).cpu()
    own = suffix[len(suffix) - len(attention) :]
    return add_up(attention, own, stored["token_ids"], stored["unit_starts"])


def add_up(
    attention: Tensor, asking: Tensor, tokens: Tensor, unit_starts: Tensor
) -> tuple[Tensor, Tensor]:
    """The votes of a question's tokens [U], and the part of them that is attention [U].

    attention: [A, U], of each asking token to each unit; asking: [A], their ids; tokens: [N], the
    text's ids; unit_starts: [U].
    """
    units = len(unit_starts)
    lengths = torch.diff(unit_starts, append=torch.tensor([len(tokens)])).float()
    word = WORD_VOTE / (1 - LENGTH_SHARE + LENGTH_SHARE * lengths / lengths.mean())
    attended, words = torch.zeros(units), torch.zeros(units)
    for token in asking.unique():
        own = asking == token
        places = (tokens == token).nonzero()[:, 0]
        having = (torch.bucketize(places, unit_starts, right=True) - 1).unique()
        # The inverse document frequency (Spärck Jones 1972); 1 for a token the text does not have.
        rarity = log1p(units / (len(having) + 1)) if len(having) else 1.0
        attended += rarity * attention[own].sum(0)
        words[having] += rarity * int(own.sum()) * word[having]
    return (attended + words) / len(asking), attended / len(asking)


def choose(
    votes: Tensor,
    attended: Tensor,
    unit_ids: Callable[[int], list[int]],
    firsts: Sequence[int],
    most: int,
) -> list[list[int]]:
    """The units to read again, in groups of neighbours: the best group last, next to the question.

    Units with enough attention are chosen, and for each one the units around it, which tell whom
    and what it speaks of. A unit around it that is much like a chosen one is left out: where all
    records are alike, it would only be taken for the right one.

    Args:
        votes: [U].
        attended: [U], the part of the votes that is attention.
        unit_ids: A unit's token ids.
        firsts: The first unit of each text.
        most: The most tokens. The best unit is chosen even if it has more.
    """
    ranked = rank(votes)
    chosen: dict[int, set[int]] = {}
    used, least = 0, LEAST_SHARE * float(attended[ranked[0]])

    def take(unit: int, ids: list[int]) -> None:
        nonlocal used
        chosen[unit] = set(ids)
        used += len(ids)

    for unit in ranked:
        ids = unit_ids(unit)
        if chosen and (float(attended[unit]) < least or used + len(ids) > most):
            break
        take(unit, ids)
    edges = {*firsts, len(votes)}
    for unit in list(chosen):
        around = [
            own for own, edge in ((unit - 1, unit), (unit + 1, unit + 1)) if edge not in edges
        ]
        for own in around:
            ids = unit_ids(own)
            if own not in chosen and used + len(ids) <= most and not _is_like(ids, chosen.values()):
                take(own, ids)
    groups: list[list[int]] = []
    for unit in sorted(chosen):
        if groups and groups[-1][-1] == unit - 1 and unit not in edges:
            groups[-1].append(unit)
        else:
            groups.append([unit])
    return sorted(groups, key=lambda group: float(votes[group].max()))


def _is_like(ids: Sequence[int], others: Iterable[set[int]]) -> bool:
    """Whether a unit has at least half of its tokens, or of another unit's, with that unit."""
    own = set(ids)
    return any(2 * len(own & other) >= min(len(own), len(other)) for other in others)


@torch.no_grad()
def attend_again(
    model: Llama,
    heads: ReadHeads,
    encoded: EncodedContext,
    said: Tensor,
    first: int,
    units: Tensor,
) -> dict[int, float]:
    """How much an answer attends to each unit that was read again.

    Args:
        model: The model.
        heads: The heads whose attention counts.
        encoded: The encoding of the units, which the answer goes on from.
        said: [A] ids, the last token of the encoding and those of the answer.
        first: The first of the units' tokens in the encoding.
        units: [T], each token's unit, -1 between units.
    """
    tokens, before = said[None].to(model.device), len(encoded) - 1
    rows = torch.arange(tokens.shape[1], device=model.device)[None]
    cache = encoded.open_cache(model, 0)
    position = encoded.next_position - 1
    rotary = model.rotary(position + tokens.shape[1])
    run = Pass(model, rows + position, cache, prefix=before, rotary=rotary)
    hidden = model.embed(tokens)
    columns = torch.arange(before + tokens.shape[1], device=model.device) - before
    total = torch.zeros(tokens.shape[1], len(units), device=model.device)
    for layer in range(heads.last_layer + 1):
        q, k, v = run.project(layer, hidden)
        for (own, head), weight in zip(heads.heads, heads.weights, strict=True):
            if own == layer:
                key_head = head // heads.groups
                keys = torch.cat([cache[layer, 0, :before, key_head], k[0, :, key_head]]).float()
                logits = q[0, :, head].float() @ keys.T * model.config.head_dim**-0.5
                logits.masked_fill_(columns > rows.T, -torch.inf)
                total += weight * logits.softmax(-1)[:, first : first + len(units)]
        if layer < heads.last_layer:
            hidden = run.attend(layer, hidden, q, k, v)
            run.feed_forward_(layer, hidden)
        del q, k, v
    numbers, index = units.unique(return_inverse=True)
    votes = torch.zeros(tokens.shape[1], len(numbers))
    votes.scatter_reduce_(1, index.expand(tokens.shape[1], -1), total.cpu(), "amax")
    pairs = zip(numbers.tolist(), votes.mean(0).tolist(), strict=True)
    return {number: vote for number, vote in pairs if number >= 0}


def rank(votes: Tensor) -> list[int]:
    """Units by their votes, best first."""
    return votes.argsort(descending=True, stable=True).tolist()
