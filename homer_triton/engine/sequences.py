"""Texts that grow side by side after encoded contexts: their cache, their prompts, their steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..model.llama import Llama, Past, Select

if TYPE_CHECKING:
    from ..context import EncodedContext


class Sequences:
    """B sequences in one cache. Where all go on from the same encoding, its rows are there once and
    in front, and all see them; otherwise each has a copy of its own. Every sequence has a region of
    equal room for its own rows.

    Sequences are numbered as they were given; those that have ended are forgotten, and the others
    keep their numbers.
    """

    def __init__(self, model: Llama, contexts: Sequence[EncodedContext], room: Sequence[int]):
        """contexts: of each sequence; room: the most tokens that each will have of its own."""
        self.model = model
        first = contexts[0]
        is_shared = len(contexts) > 1 and all(own is first for own in contexts)
        self._shared = len(first) if is_shared else 0
        filled = [0 if is_shared else len(own) for own in contexts]
        self._room = max(rows + most for rows, most in zip(filled, room, strict=True))
        # What a shorter sequence has not reached is hidden from it, but nothing times NaN is NaN.
        self._cache = model.new_cache(self._shared + len(contexts) * self._room).zero_()
        if is_shared:
            first.copy_rows_(model, self._cache)
        else:
            for place, own in enumerate(contexts):
                own.copy_rows_(model, self._region(place))
        # By place in the cache: the sequence's number, its own rows, and its next position.
        self.numbers = list(range(len(contexts)))
        self._filled = filled
        self._positions = [own.next_position for own in contexts]
        longest = [own.next_position + most for own, most in zip(contexts, room, strict=True)]
        self._rotary = model.rotary(max(longest))

    def read(self, number: int, token_ids: Tensor) -> Tensor:
        """Run a sequence's next T tokens, [T] on the model's device; returns logits [V] of the
        last.
        """
        place, tokens = self.numbers.index(number), len(token_ids)
        start, device = self._filled[place], token_ids.device
        rows = torch.arange(tokens, device=device)[None]
        model = self.model
        if self._shared and start:  # what it sees is not in one piece
            return torch.cat([self._step(place, one) for one in token_ids.split(1)])[-1]
        if self._shared:
            cache, before = self._cache, self._shared
            slots = rows + self._shared + place * self._room
        else:
            cache, before = self._region(place), start
            slots = rows + start
        hidden = model.run(
            range(model.config.num_hidden_layers),
            model.embed(token_ids[None]),
            rows + self._positions[place],
            slots,
            cache,
            before,
            self._rotary,
            Select(1, lambda index, q, k: rows[:, -1:]),
        )
        self._filled[place] += tokens
        self._positions[place] += tokens
        return model.logits(hidden[0, -1])

    def step(self, token_ids: Tensor) -> Tensor:
        """Run one more token of every sequence, [B] in their order; returns logits [B, V]."""
        return self._step(slice(None), token_ids)

    def _step(self, place: int | slice, token_ids: Tensor) -> Tensor:
        """One more token of the sequence at a place, or of all."""
        places = range(len(self.numbers)) if isinstance(place, slice) else [place]
        device = token_ids.device
        starts = [self._shared + at * self._room for at in places]
        lengths = torch.tensor([self._filled[at] for at in places], device=device)
        positions = torch.tensor([self._positions[at] for at in places], device=device)
        most = 1 + max(self._filled[at] for at in places)
        model = self.model
        hidden = model.run(
            range(model.config.num_hidden_layers),
            model.embed(token_ids[:, None]),
            positions[:, None],
            (torch.tensor(starts, device=device) + lengths)[:, None],
            self._cache,
            self._shared,
            self._rotary,
            past=Past(starts[0], self._room, lengths, most),
        )
        for at in places:
            self._filled[at] += 1
            self._positions[at] += 1
        return model.logits(hidden[:, 0])

    def end(self, number: int) -> None:
        """Forget a sequence; the last one's rows move to its place."""
        place, last = self.numbers.index(number), len(self.numbers) - 1
        if place != last:
            rows = self._filled[last]
            self._region(place)[:, :, :rows] = self._region(last)[:, :, :rows]
        for of_places in (self.numbers, self._filled, self._positions):
            of_places[place] = of_places[last]
            of_places.pop()

    def rows_of(self, number: int) -> tuple[Tensor, Tensor]:
        """A sequence's keys and values so far, [L, HKV, rows, D] each, in memory of their own."""
        place = self.numbers.index(number)
        own = self._region(place)[:, :, : self._filled[place]]
        whole = torch.cat([self._cache[:, :, : self._shared], own], dim=2)
        keys, values = whole.transpose(2, 3).contiguous().unbind(1)
        return keys.contiguous(), values.contiguous()

    def _region(self, place: int) -> Tensor:
        """A sequence's own slots."""
        start = self._shared + place * self._room
        return self._cache[:, :, start : start + self._room]
