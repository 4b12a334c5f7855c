"""Finds the places of a text that a question attends to, in the keys that a reading kept.

The question runs without the text, behind the place where a chunk would end. Its last tokens attend
to all stored tokens. A unit (a sentence, or a line) gets from each of them the attention of its
best token, as in late interaction (ColBERT, Khattab & Zaharia 2020). Tokens that few units have
count more, and units that have the very tokens get more votes, as in BM25 (Robertson & Zaragoza
2009). What was found then asks for more, as long as its own words lead on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log1p
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..model.llama import Llama, Pass
from .reading import ReadHeads, rotary_for

if TYPE_CHECKING:
    from ..context import EncodedContext

# How many tokens vote: the last ones of a question, or the rarest ones of what was found.
MOST_ASKING = 32
# What a unit gets for having a token of the question, where all attention of that token is 1.
WORD_VOTE = 0.18
# How much a unit's length lowers that: BM25's b.
LENGTH_SHARE = 0.4
# Units are read again that have at least this share of the best one's attention.
LEAST_SHARE = 0.5
# A token of what was found leads on to units that get at least this much of its attention, times
# how rare it is (the logarithm below). It may do so this many times.
LEADS_ON, MOST_HOPS = 0.6, 8
# A prompt's first tokens, to which attention goes that finds nothing.
SINKS = 4


@dataclass(frozen=True)
class Found:
    """What a question found.

    Attributes:
        votes: [U] float32 on the CPU, the votes of each unit.
        groups: The units to read again, in groups of neighbours: the best group last, so that it
            stands next to the question.
    """

    votes: Tensor
    groups: list[list[int]]


class Finder:
    """Finds units of a text that was read.

    stored: its `keys` (int8 with `scales`, or 16-bit), `token_ids` and `unit_starts`; chunk_end:
    the position after a whole chunk; text_firsts: the first unit of each text.
    """

    def __init__(
        self,
        model: Llama,
        heads: ReadHeads,
        stored: Mapping[str, Tensor],
        chunk_end: int,
        text_firsts: Sequence[int],
    ) -> None:
        self._model = model
        self._heads = heads
        self._stored = stored
        self._chunk_end = chunk_end
        self._starts = stored["unit_starts"]
        self._lengths = lengths_of(self._starts, len(stored["token_ids"]))
        # No unit before one of these, or behind the last, is its neighbour.
        self._edges = {*text_firsts, len(self._starts)}

    def ids_of(self, unit: int) -> list[int]:
        """A unit's token ids."""
        start = int(self._starts[unit])
        ids: list[int] = self._stored["token_ids"][
            start : start + int(self._lengths[unit])
        ].tolist()
        return ids

    def votes(
        self, prefix: Tensor, suffix: Tensor, last: int = MOST_ASKING
    ) -> tuple[Tensor, Tensor]:
        """The votes that a question gives each unit, and the part of them that is attention.

        prefix: [P] ids, what stands before the text; suffix: [S] ids, what stands behind it; last:
        how many of these at its end are the question, of which at most `MOST_ASKING` vote. Returns
        [U] and [U], float32 on the CPU.
        """
        asking = torch.arange(len(suffix), device="cpu")[-min(last, MOST_ASKING) :]
        attention = self._attention(prefix, suffix, asking)
        lengths = self._lengths.float()
        word = WORD_VOTE / (1 - LENGTH_SHARE + LENGTH_SHARE * lengths / lengths.mean())
        attended, words = torch.zeros_like(word), torch.zeros_like(word)
        for token in suffix[asking].unique().tolist():
            own = suffix[asking] == token
            rarity, having = self._rarity(token)
            attended += rarity * attention[own].sum(0)
            words[having] += rarity * int(own.sum()) * word[having]
        return (attended + words) / len(asking), attended / len(asking)

    def find(self, prefix: Tensor, suffix: Tensor, most: int, last: int = MOST_ASKING) -> Found:
        """The units to read again for a question, of at most so many tokens in all.

        The best unit is chosen even if it has more. Arguments are as in `votes`.
        """
        votes, attended = self.votes(prefix, suffix, last)
        ranked = rank(votes)
        chosen, room = [ranked[0]], most - int(self._lengths[ranked[0]])
        least = LEAST_SHARE * float(attended[ranked[0]])
        for unit in ranked[1:]:
            if float(attended[unit]) < least or int(self._lengths[unit]) > room:
                break
            chosen.append(unit)
            room -= int(self._lengths[unit])
        fresh = chosen
        for _ in range(MOST_HOPS):
            fresh = self._led_to(prefix, suffix, chosen, fresh, room) if room > 0 else []
            if not fresh:
                break
            chosen = [*chosen, *fresh]
            room -= sum(int(self._lengths[unit]) for unit in fresh)
        return Found(votes, self._grouped(chosen, room))

    def _led_to(
        self,
        prefix: Tensor,
        suffix: Tensor,
        chosen: Sequence[int],
        fresh: Sequence[int],
        room: int,
    ) -> list[int]:
        """The units that the words of the fresh units lead to, but for those that were chosen and
        those that have no room. Words of the question do not count: they were asked already.
        """
        asked = set(suffix.tolist())
        places: list[int] = []
        ids: list[int] = []
        for unit in chosen:
            own = self.ids_of(unit)
            if unit in fresh:
                places += [
                    len(ids) + place for place, token in enumerate(own) if token not in asked
                ]
            ids += own
        rarities = {token: self._rarity(token)[0] for token in {ids[place] for place in places}}
        places = sorted(sorted(places, key=lambda place: -rarities[ids[place]])[:MOST_ASKING])
        if not places:
            return []
        context, where = (torch.tensor(own, device="cpu") for own in (ids, places))
        attention = self._attention(prefix, torch.cat([context, suffix]), where)
        rarity = attention.new_tensor([rarities[ids[place]] for place in places])
        best = (attention * rarity[:, None]).amax(0)
        best[list(chosen)] = 0
        found: list[int] = []
        for unit in rank(best):
            if float(best[unit]) < LEADS_ON:
                break
            if int(self._lengths[unit]) <= room:
                found.append(unit)
                room -= int(self._lengths[unit])
        return found

    def _grouped(self, chosen: Sequence[int], room: int) -> list[list[int]]:
        """Chosen units, best first, with the units around them, which tell whom and what they
        speak of: in groups of neighbours, the best group last.

        A unit that is much like a chosen one is left out: where all records are alike, it would
        only be taken for the right one.
        """
        known = {unit: set(self.ids_of(unit)) for unit in chosen}
        for unit in chosen:
            for near, edge in ((unit - 1, unit), (unit + 1, unit + 1)):
                if edge in self._edges or near in known or int(self._lengths[near]) > room:
                    continue
                own = set(self.ids_of(near))
                if not _is_like(own, known.values()):
                    known[near] = own
                    room -= int(self._lengths[near])
        place = {unit: number for number, unit in enumerate(known)}
        groups: list[list[int]] = []
        for unit in sorted(known):
            if groups and groups[-1][-1] == unit - 1 and unit not in self._edges:
                groups[-1].append(unit)
            else:
                groups.append([unit])
        return sorted(groups, key=lambda group: -min(place[unit] for unit in group))

    def _rarity(self, token: int) -> tuple[float, Tensor]:
        """How much a token counts, and the units that have it: the inverse document frequency
        (Spärck Jones 1972), and 1 for a token that the text does not have.
        """
        places = (self._stored["token_ids"] == token).nonzero()[:, 0]
        having = (torch.bucketize(places, self._starts, right=True) - 1).unique()
        return (log1p(len(self._starts) / (len(having) + 1)) if len(having) else 1.0), having

    @torch.no_grad()
    def _attention(self, prefix: Tensor, suffix: Tensor, asking: Tensor) -> Tensor:
        """The attention [A, U], on the CPU, that some tokens of the suffix pay to the units.

        `prefix ‖ suffix` runs without the text; the suffix stands where it would stand behind a
        whole chunk. asking: [A], which of its tokens.
        """
        model, heads = self._model, self._heads
        tokens = torch.cat([prefix, suffix]).to(model.device)
        rows = torch.arange(len(tokens), device=model.device)
        asking = asking.to(model.device) + len(prefix)
        gap = max(self._chunk_end - len(prefix), 0)
        positions = torch.where(rows < len(prefix), rows, rows + gap)
        rotary = rotary_for(model, len(tokens) + gap)
        run = Pass(model, positions[None], model.new_cache(0), rotary=rotary)
        hidden = model.embed(tokens[None])
        wide = torch.promote_types(model.dtype, torch.float32)
        queries: list[Tensor] = []
        before: list[Tensor] = []
        for layer in range(heads.last_layer + 1):
            q, k, v = run.project(layer, hidden)
            _, own = heads.in_layer(layer)
            if own:
                queries.append(q[0, asking][:, own])
                keys = k[0, :, [head // heads.groups for head in own]].to(wide)
                with model.own_dtype():
                    logits = torch.einsum("ahd,thd->aht", queries[-1].to(wide), keys)
                logits *= model.config.head_dim**-0.5
                unseen = rows > asking[:, None]
                before.append(logits.masked_fill_(unseen[:, None], -torch.inf).logsumexp(-1))
            if layer < heads.last_layer:
                hidden = run.attend(layer, hidden, q, k, v)
                run.feed_forward_(layer, hidden)
            del q, k, v
        places = {key_head: index for index, key_head in enumerate(heads.key_heads)}
        keys, scales, starts = self._on_device
        with model.own_dtype():
            attention: Tensor = model.ops.score_units(
                torch.cat(queries, 1),
                keys,
                scales,
                [places[layer, head // heads.groups] for layer, head in heads.heads],
                torch.tensor(heads.weights, dtype=wide, device=model.device),
                torch.cat(before, 1),
                starts,
            )
        return attention.float().cpu()

    @cached_property
    def _on_device(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """The text's keys, scales and starts of units, where the model is."""
        device, scales = self._model.device, self._stored.get("scales")
        scales = None if scales is None else scales.to(device)
        return self._stored["keys"].to(device), scales, self._starts.to(device)


def lengths_of(starts: Tensor, tokens: int) -> Tensor:
    """Each unit's number of tokens, [U]; starts: [U], their first tokens, of `tokens` in all."""
    return torch.diff(starts, append=starts.new_tensor([tokens]))


def _is_like(own: set[int], others: Iterable[set[int]]) -> bool:
    """Whether a unit shares half of its tokens, or of another's, with one of the others."""
    return any(2 * len(own & other) >= min(len(own), len(other)) for other in others)


def rank(votes: Tensor) -> list[int]:
    """Units by their votes, best first."""
    ranked: list[int] = votes.argsort(descending=True, stable=True).tolist()
    return ranked


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
    shape = tokens.shape[1], len(units)
    total = torch.zeros(shape, dtype=torch.float32, device=model.device)
    for layer in range(heads.last_layer + 1):
        q, k, v = run.project(layer, hidden)
        for (own, head), weight in zip(heads.heads, heads.weights, strict=True):
            if own == layer:
                key_head = head // heads.groups
                keys = torch.cat([cache[layer, 0, :before, key_head], k[0, :, key_head]]).float()
                with model.own_dtype():
                    logits = q[0, :, head].float() @ keys.T * model.config.head_dim**-0.5
                logits.masked_fill_(columns > rows.T, -torch.inf)
                total += weight * logits.softmax(-1)[:, first : first + len(units)]
        if layer < heads.last_layer:
            hidden = run.attend(layer, hidden, q, k, v)
            run.feed_forward_(layer, hidden)
        del q, k, v
    # Where no prefix has the sinks (Xiao et al. 2024), the text does.
    total[:, : max(SINKS - first, 0)] = 0
    numbers, index = units.unique(return_inverse=True)
    votes = torch.zeros((tokens.shape[1], len(numbers)), dtype=torch.float32, device="cpu")
    votes.scatter_reduce_(1, index.expand(tokens.shape[1], -1), total.cpu(), "amax")
    pairs = zip(numbers.tolist(), votes.mean(0).tolist(), strict=True)
    return {number: vote for number, vote in pairs if number >= 0}
