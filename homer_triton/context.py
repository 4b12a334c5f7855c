"""What an encoding leaves behind: a short, ordinary KV cache that new tokens go on from."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .engine.transformers_cache import continuation
from .engine.tree import Plan
from .model.errors import shorten
from .model.llama import Llama
from .storage.context_file import read_context, write_context
from .text.survivors import GAP, Unit, surviving_text


@dataclass(frozen=True)
class EncodeStats:
    """What an encoding took. seconds_by_height: the nodes' time, leaves first; flops: operations;
    peak_slots: the most tokens alive at once; documents: how many ran side by side, whose time all
    seconds and whose slots all peak_slots are.
    """

    tokens: int
    kept_tokens: int
    seconds: float
    seconds_by_height: tuple[float, ...]
    flops: int
    peak_slots: int
    documents: int = 1

    @property
    def tokens_per_second(self) -> float:
        return self.documents * self.tokens / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain numbers."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}

    @classmethod
    def from_dict(cls, figures: Any) -> EncodeStats:
        """The stats of these fields. Raises `ValueError` for anything else."""
        names = {field.name for field in fields(cls)}
        if not isinstance(figures, dict) or figures.keys() != names:
            raise ValueError(f"stats must be {', '.join(sorted(names))}")
        times = figures["seconds_by_height"]
        counts = [figures[name] for name in names - {"seconds", "seconds_by_height"}]
        if not isinstance(times, list) or not all(type(count) is int for count in counts):
            raise ValueError("stats are not all numbers")
        for number in (*counts, *times, figures["seconds"]):
            if type(number) not in (int, float) or not 0 <= number < math.inf:
                raise ValueError(f"stats hold {number!r}")
        return cls(**{**figures, "seconds_by_height": tuple(times)})


@dataclass(frozen=True, eq=False)
class EncodedContext:
    """A merged context as `encode` returns it. Nothing that reads it changes it: one encoding
    serves many prompts.

    keys, values: [L, HKV, T', D], keys after RoPE; positions, source_indices: [T'], every kept
    token's RoPE position and its index in `prefix ‖ context ‖ suffix`; token_ids: [tokens], that
    whole input; pruned_at: [tokens] int8, the height at which each of its tokens was pruned, -1 for
    kept ones; next_position: the position at which new tokens go on, not T'; logits: [V] float32,
    for the token after the last one; plan: the merge tree; stats: what it took; model: the
    fingerprint of the model that made it; appended: how many tokens came after that input, the
    prompts and answers of `generate(..., grow=True)`: the last of `token_ids` and of the rows.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    source_indices: Tensor
    token_ids: Tensor
    pruned_at: Tensor
    next_position: int
    logits: Tensor
    plan: Plan
    stats: EncodeStats
    model: str
    appended: int = 0

    def __len__(self) -> int:
        """Rows of the cache."""
        return len(self.positions)

    def __repr__(self) -> str:
        layers, heads, _, dim = self.keys.shape
        return (
            f"EncodedContext({self.plan.input_len} tokens in {len(self)} rows; {layers} layers, "
            f"{heads} heads of {dim}, {self.keys.dtype}, {self.keys.device})"
        )

    def to(self, device: str | torch.device) -> EncodedContext:
        """The same on another device; tensors that are there already are shared."""
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: x.to(device) for name, x in parts.items() if isinstance(x, Tensor)}
        return EncodedContext(**{**parts, **tensors})

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; raises `ValueError` where that is not possible."""
        described = {
            "plan": self.plan.to_dict(),
            "stats": asdict(self.stats),
            "next_position": self.next_position,
            "model": self.model,
            "appended": self.appended,
        }
        write_context(path, self, described)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> EncodedContext:
        """Read a file written by `save`. Raises `FileNotFoundError`, or `ValueError` for any other
        file, and for one of which a single bit has changed.
        """
        path = Path(path)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"There is no encoded context {path}.")
        try:
            tensors, plan, described = read_context(path)
            stats = EncodeStats.from_dict(described.pop("stats"))
            parts: dict[str, Any] = {**tensors, "plan": plan, "stats": stats, **described}
            return cls(**parts).to(device)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not an encoded context, or is damaged: {shorten(error)}; "
                "encode the text again."
            ) from error

    @property
    def kept_ids(self) -> Tensor:
        """The kept tokens' ids in their order, [T'] int64, prefix and suffix among them: a prompt
        that any engine can read for itself.
        """
        return self.token_ids[self.source_indices]

    def to_transformers(
        self, new_ids: Tensor | Sequence[int] | Sequence[Sequence[int]], copies: int = 1
    ) -> dict[str, Any]:
        """The keyword arguments with which the model goes on from here in transformers' own
        class, called or by `generate`.

        new_ids: at least one token id, [n], or equally many for each of a batch, [B, n]. copies: of
        the cache for each of the batch, for a `generate` that goes on in several ways: as many as
        its `num_beams` or `num_return_sequences`, whichever is more (it copies all the rest
        itself). Returns input_ids, past_key_values (a copy), attention_mask and position_ids.
        Raises `ValueError` for no new ids, or for other ones.
        """
        return continuation(self.keys, self.values, self.next_position, new_ids, copies)

    def text(
        self,
        tokenizer: PreTrainedTokenizerBase,
        target_len: int | None = None,
        unit: Unit = "word",
        gap: str = GAP,
        with_suffix: bool = False,
        source: str | None = None,
    ) -> str:
        """The kept tokens of the context as text in their order, for any other model to read: whole
        words (unit="word"), whole sentences ("sentence") or just the tokens ("token"), with a mark
        where some are left out.

        target_len: the most tokens of `tokenizer` in the text, the plan's when left out.
        with_suffix: count the suffix as context, which it is where `encode` was given none and took
        the text's own end. source: the text that was encoded, for its white space where the
        tokenizer does not keep it. More is said, and what is raised, at
        `survivors.surviving_text`. Prefix and suffix are otherwise left out.
        """
        before, length = self.plan.prefix_len, self.plan.context_len
        stop = self.plan.input_len if with_suffix else before + length
        return surviving_text(
            tokenizer,
            self.token_ids[before:stop].tolist(),
            (self.pruned_at[before:stop] < 0).tolist(),
            self.plan.target_len if target_len is None else target_len,
            unit,
            gap,
            self.token_ids[stop:].tolist(),
            source,
        )

    def grown(self, token_ids: Tensor, keys: Tensor, values: Tensor, logits: Tensor) -> Self:
        """The same with more tokens at its end.

        token_ids: [n], the new ones; keys, values: [L, HKV, T' + n, D], of all rows; logits: [V],
        after the last of them.
        """
        count, device = len(token_ids), self.token_ids.device
        new = torch.arange(count, device=device)
        return replace(
            self,
            keys=keys,
            values=values,
            positions=torch.cat([self.positions, new + self.next_position]),
            source_indices=torch.cat([self.source_indices, new + len(self.token_ids)]),
            token_ids=torch.cat([self.token_ids, token_ids.to(device)]),
            pruned_at=torch.cat([self.pruned_at, self.pruned_at.new_full((count,), -1)]),
            next_position=self.next_position + count,
            logits=logits,
            appended=self.appended + count,
        )

    def open_cache(self, model: Llama, room: int) -> Tensor:
        """A copy of the cache as `Llama.forward` takes it, [L, 2, T' + room, HKV, D], with room for
        new tokens.

        Raises `ValueError` if another model made this encoding.
        """
        self.check_maker(model.fingerprint)
        cache = model.new_cache(len(self) + room, to_grow=True)
        self.copy_rows_(cache)
        return cache

    def check_maker(self, fingerprint: str) -> None:
        """Raise `ValueError` unless the model of this fingerprint made this encoding."""
        if self.model != fingerprint:
            raise ValueError(
                f"The context was encoded by another model ({self.model}, this is {fingerprint})."
            )

    def copy_rows_(self, cache: Tensor) -> None:
        """Copy the rows to the first slots of a cache [L, 2, slots, HKV, D] of the model that made
        them.

        Raises `ValueError` for a cache of another shape.
        """
        layers, _, _, heads, dim = cache.shape
        if self.keys.shape != (layers, heads, len(self), dim):
            raise ValueError(
                f"The context's keys have the shape {list(self.keys.shape)} instead of this "
                f"model's {[layers, heads, len(self), dim]}; encode the text again."
            )
        cache[:, 0, : len(self)] = self.keys.transpose(1, 2)
        cache[:, 1, : len(self)] = self.values.transpose(1, 2)
