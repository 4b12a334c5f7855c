"""Texts that grow side by side after encoded contexts: their cache, their prompts, their steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..model.llama import Llama, Past

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
        """contexts: of each sequence, made by this model; room: the most tokens that each will have
        of its own.
        """
        self.model = model
        first = contexts[0]
        is_shared = len(contexts) > 1 and all(own is first for own in contexts)
        self._shared = len(first) if is_shared else 0
        filled = [0 if is_shared else len(own) for own in contexts]
        self._room = max(rows + most for rows, most in zip(filled, room, strict=True))
        self._cache = model.new_cache(self._shared + len(contexts) * self._room)
        if len(contexts) > 1:
            # What a shorter one has not reached is hidden from it, but nothing times NaN is NaN.
            self._cache.zero_()
        if is_shared:
            first.copy_rows_(self._cache)
        else:
            for place, own in enumerate(contexts):
                own.copy_rows_(self._region(place))
        # By place in the cache: the sequence's number, its own rows, and its next position.
        self.numbers = list(range(len(contexts)))
        self._filled = filled
        self._positions = [own.next_position for own in contexts]

    def read(self, number: int, token_ids: Tensor) -> Tensor:
        """Run a sequence's next T tokens, [T] on the model's device; returns logits [V] of the
        last.
        """
        place = self.numbers.index(number)
        start, position = self._filled[place], self._positions[place]
        if self._shared and start:  # what it sees is not in one piece
            return torch.cat([self._step([place], one) for one in token_ids.split(1)])[-1]
        if self._shared:
            slot = self._shared + place * self._room
            logits = self.model.forward(token_ids, self._cache, self._shared, position, slot=slot)
        else:
            logits = self.model.forward(token_ids, self._region(place), start, position)
        self._filled[place] += len(token_ids)
        self._positions[place] += len(token_ids)
        return logits

    def step(self, token_ids: Tensor) -> Tensor:
        """Run one more token of every sequence, [B] in their order; returns logits [B, V]."""
        places = range(len(self.numbers))
        if self.model.config.rope_switches_at is None:
            return self._step(places, token_ids)
        # Frequencies follow each one's own length.
        ids = token_ids.split(1)
        return torch.cat([self._step([at], one) for at, one in zip(places, ids, strict=True)])

    def _step(self, places: Sequence[int], token_ids: Tensor) -> Tensor:
        """One more token of the sequences at some places that stand side by side."""
        model, device = self.model, token_ids.device
        starts = [self._shared + at * self._room for at in places]
        lengths = torch.tensor([self._filled[at] for at in places], device=device)
        positions = torch.tensor([self._positions[at] for at in places], device=device)
        hidden = model.run(
            range(model.config.num_hidden_layers),
            model.embed(token_ids[:, None]),
            positions[:, None],
            (torch.tensor(starts, device=device) + lengths)[:, None],
            self._cache,
            self._shared,
            model.rotary(1 + max(self._positions[at] for at in places)),
            past=Past(starts[0], self._room, lengths, 1 + max(self._filled[at] for at in places)),
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
        keys, values = whole.transpose(2, 3).unbind(1)
        return keys.contiguous(), values.contiguous()

    def _region(self, place: int) -> Tensor:
        """A sequence's own slots."""
        start = self._shared + place * self._room
        return self._cache[:, :, start : start + self._room]
