"""Texts that grow side by side after encoded contexts: their cache, their prompts, their steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..model.llama import Llama, Pass, Past
from .graphs import HAS_GRAPHS, Replays

if TYPE_CHECKING:
    from ..context import EncodedContext


class Sequences:
    """Some sequences in one cache. Where all go on from the same encoding, its rows are there once
    and in front, and all see them; otherwise each has a copy of its own. Every sequence has a
    region of equal room for its own rows.

    Sequences are numbered as they begin; those that have ended are forgotten, and the others keep
    their numbers.
    """

    def __init__(self, model: Llama, contexts: Sequence[EncodedContext], room: Sequence[int]):
        """contexts: of each sequence, made by this model; room: the most tokens that each will have
        of its own.
        """
        self.model = model
        first = contexts[0]
        # The encoding whose rows all see, where there is one.
        is_shared = len(contexts) > 1 and all(own is first for own in contexts)
        self.shared_context = first if is_shared else None
        self._shared = len(first) if is_shared else 0
        # By place in the cache: the sequence's number, its own rows, and its next position.
        self.numbers: list[int] = []
        self._filled: list[int] = []
        self._positions: list[int] = []
        self._begun = 0
        # Of all sequences, where steps are to go on from: rows of their own, next positions, and
        # first slots, [3, B]; None after anything but a step.
        self._state: Tensor | None = None
        self._tables: tuple[Tensor, Tensor] | None = None
        self._replays: Replays | None = None
        most = max(self._needs(*own) for own in zip(contexts, room, strict=True))
        self._lay_out(len(contexts), most)
        if is_shared:
            first.copy_rows_(self._cache)
        for own in zip(contexts, room, strict=True):
            self._begin(*own)

    @property
    def room(self) -> int:
        """Rows in every region."""
        return self._room

    def add(self, context: EncodedContext, room: int) -> int:
        """Begin one more sequence; returns its number. Where all see the rows of an encoding, it
        must go on from that one. What is captured on a GPU outlives this as long as there is a
        region left, and room enough in it.

        Raises `ValueError` for another encoding than the shared one.
        """
        if self.shared_context is not None and self.shared_context is not context:
            raise ValueError("The sequences share another encoding's rows.")
        needed, count = self._needs(context, room), len(self.numbers)
        if needed > self._room or count == self._places:
            before, moved = self._cache, [self._region(place) for place in range(count)]
            more = count + max(1, count // 2)
            self._lay_out(max(self._places, more), max(self._room, needed))
            self._cache[:, :, : self._shared] = before[:, :, : self._shared]
            for place, rows in enumerate(self._filled):
                self._region(place)[:, :, :rows] = moved[place][:, :, :rows]
        return self._begin(context, room)

    def _needs(self, context: EncodedContext, room: int) -> int:
        """Rows of its own that a sequence comes to."""
        return room + (0 if self.shared_context is not None else len(context))

    def _lay_out(self, places: int, room: int) -> None:
        """Take memory for so many regions."""
        slots = self._shared + places * room
        self._cache = self.model.new_cache(slots, to_grow=True)
        self._places, self._room = places, room
        self._replays = None
        if self.model.device.type in HAS_GRAPHS:
            self._replays = Replays(self.model.device)
        if places > 1 or self._replays is not None:
            # What one has not reached is hidden from it, but nothing times NaN is NaN.
            self._cache.zero_()

    def _begin(self, context: EncodedContext, room: int) -> int:
        """Begin a sequence in the next place."""
        number, place = self._begun, len(self.numbers)
        filled = 0
        if self.shared_context is None:
            context.copy_rows_(self._region(place))
            filled = len(context)
        self._begun += 1
        self.numbers.append(number)
        self._filled.append(filled)
        self._positions.append(context.next_position)
        self._state = None
        self._reach(context.next_position + room)
        return number

    def _reach(self, length: int) -> None:
        """Have rotary tables that go so far. They are held, since a captured step reads them where
        they are; there are none where frequencies follow each sequence's own length.
        """
        if self.model.config.rope_switches_at is not None:
            return
        if self._tables is None or len(self._tables[0]) < length:
            self._tables = self.model.rotary(length)
            if self._replays is not None:
                self._replays = Replays(self.model.device)

    def read(self, number: int, token_ids: Tensor) -> Tensor:
        """Run a sequence's next T tokens, [T] on the model's device; returns logits [V] of the
        last.
        """
        place = self.numbers.index(number)
        start, position = self._filled[place], self._positions[place]
        if self._shared and start:  # what it sees is not in one piece
            return torch.cat([self._one_more(place, one) for one in token_ids.split(1)])[-1]
        self._state = None
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
        if self._tables is None:
            each = zip(places, token_ids.split(1), strict=True)
            return torch.cat([self._one_more(at, one) for at, one in each])
        if self._state is None:
            self._state = self._state_of(places)
        if self._replays is None:
            logits = self._run(token_ids, self._state, self._shared, 1 + max(self._filled))
        else:  # how far a sequence has come is read on the device: one graph serves all lengths
            (logits,) = self._replays(
                len(places),
                lambda ids, state: (self._run(ids, state, self._shared, self._room),),
                token_ids,
                self._state,
            )
        self._state[:2] += 1
        self._advance(places)
        return logits

    def _one_more(self, place: int, token_ids: Tensor) -> Tensor:
        """One more token [1] of the sequence at a place."""
        state, most = self._state_of([place]), 1 + self._filled[place]
        logits = self._run(token_ids, state, self._shared + place * self._room, most)
        self._state = None
        self._advance([place])
        return logits

    def _run(self, token_ids: Tensor, state: Tensor, first: int, most: int) -> Tensor:
        """One token of B sequences [B] that stand side by side, the first one's slots from `first`
        on; state: theirs, [3, B]; most: rows of the longest with it, or more. Returns logits [B,
        V].
        """
        lengths, positions, starts = state
        run = Pass(
            self.model,
            positions[:, None],
            self._cache,
            (starts + lengths)[:, None],
            self._shared,
            self._tables or self.model.rotary(1 + int(positions.max())),
            Past(first, self._room, lengths, most),
        )
        layers = range(self.model.config.num_hidden_layers)
        hidden = run.layers(layers, self.model.embed(token_ids[:, None]))
        return self.model.logits(hidden[:, 0])

    def _state_of(self, places: Sequence[int]) -> Tensor:
        """[3, B] of the sequences at some places."""
        starts = [self._shared + at * self._room for at in places]
        own = [[of[at] for at in places] for of in (self._filled, self._positions)]
        return torch.tensor([*own, starts], device=self.model.device)

    def _advance(self, places: Sequence[int]) -> None:
        for at in places:
            self._filled[at] += 1
            self._positions[at] += 1

    def end(self, number: int) -> None:
        """Forget a sequence; the last one's rows move to its place."""
        self._state = None
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
