"""What an encoding leaves behind: a short, ordinary KV cache that new tokens continue from."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .engine.transformers_cache import continuation
from .engine.tree import Plan
from .model.errors import shorten
from .model.llama import Llama
from .storage.context_file import read_context, write_context
from .text.survivors import GAP, Unit, surviving_text

if TYPE_CHECKING:
    from .document import Source


@dataclass(frozen=True)
class EncodeStats:
    """What an encoding took.

    Attributes:
        tokens: Tokens of the input, `prefix ‖ context ‖ suffix`.
        kept_tokens: Tokens of the finished cache.
        seconds: The total time.
        seconds_by_height: The time spent on the chunks of each height of the merge tree, leaves
            first. What comes after the tree, such as reading the survivors once more, counts in
            `seconds` only.
        flops: Floating-point operations of one document, computed from its plan; a multiply and an
            add are two.
        peak_slots: The most tokens held at once.
        documents: How many documents ran side by side. The seconds and `peak_slots` are those of
            all of them together.
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
        """Tokens read per second, over all documents that ran side by side."""
        return self.documents * self.tokens / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain numbers."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}

    @classmethod
    def from_dict(cls, figures: Any) -> EncodeStats:
        """The stats with these fields.

        Raises:
            ValueError: The fields are not those of `EncodeStats`, or out of range.
        """
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
    """A long input as a short KV cache: what `encode` returns.

    It answers the question that it was encoded for (its suffix); other prompts only find what that
    question kept. Nothing that reads an encoding changes it, so one encoding serves many prompts.

        encoded.save("book.safetensors")
        encoded = ht.EncodedContext.load("book.safetensors", device="cuda")
        answer = ht.generate(model, encoded, "The narrator is")

    The input is `prefix ‖ context ‖ suffix`: its start, the long text, and its end (usually the
    question). Sizes: L layers, HKV key-value heads of D elements, T' kept tokens, V token ids in
    the vocabulary.

    Attributes:
        keys: [L, HKV, T', D] in the model's dtype, after RoPE.
        values: [L, HKV, T', D] in the model's dtype.
        positions: [T'] int64, the RoPE position of each kept token.
        source_indices: [T'] int64, the index of each kept token in `token_ids`.
        token_ids: [tokens] int64, the whole input, and what was appended to it.
        pruned_at: [tokens] int8, the height of the merge tree at which each of `token_ids` was
            pruned (0 for leaves), or -1 if it was kept.
        next_position: The RoPE position of the next token. With `recompute="all"`, the default, it
            is T'; otherwise it is the first one after those of a chunk.
        logits: [V] float32, for the token that follows the last one.
        plan: The merge tree.
        stats: What the encoding took.
        model: The fingerprint of the model that made it; `generate` takes no other.
        appended: How many tokens were added after the input, by `generate(..., grow=True)`: prompts
            and answers. They are the last of `token_ids` and of the kept tokens.
        sources: The places of a document that were read, best first (`Document.encode`). They are
            not saved.
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
    sources: tuple[Source, ...] = ()

    def __len__(self) -> int:
        """Tokens in the cache, T'."""
        return len(self.positions)

    def __repr__(self) -> str:
        layers, heads, _, dim = self.keys.shape
        return (
            f"EncodedContext({self.plan.input_len} tokens in {len(self)} rows; {layers} layers, "
            f"{heads} heads of {dim}, {self.keys.dtype}, {self.keys.device})"
        )

    def to(self, device: str | torch.device) -> EncodedContext:
        """The same encoding on another device. Tensors that are there already are shared."""
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: x.to(device) for name, x in parts.items() if isinstance(x, Tensor)}
        return EncodedContext(**{**parts, **tensors})

    def save(self, path: str | Path) -> None:
        """Write the encoding to one safetensors file.

        The file holds the whole input as token ids, not only what was kept, and it is not
        encrypted.

        Raises:
            ValueError: The file cannot be written.
        """
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
        """Read a file written by `save`.

        Args:
            path: The file.
            device: Where the tensors go.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is not an encoding, or is damaged: its checksum covers every bit.
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
        """The ids of the kept tokens in their order, [T'] int64, with those of prefix and suffix.

        They are a prompt that any engine with the same tokenizer can read.
        """
        return self.token_ids[self.source_indices]

    def to_transformers(
        self, new_ids: Tensor | Sequence[int] | Sequence[Sequence[int]], copies: int = 1
    ) -> dict[str, Any]:
        """Arguments to continue from this cache with the same model in `transformers`.

        Pass them to the model itself or to its `generate`.

            first = encoded.logits.argmax()[None]
            ids = hf_model.generate(**encoded.to_transformers(first), max_new_tokens=20)

        Args:
            new_ids: Ids of the tokens to continue with, at least one: [n], or [B, n] for a batch.
            copies: Copies of the cache for each sequence of the batch. For a `generate` that
                continues in several ways, give its `num_beams` or `num_return_sequences`, whichever
                is larger; it repeats the other arguments itself.

        Returns:
            A dictionary with `input_ids` [B, n], `past_key_values` (a copy of the cache),
            `attention_mask` [B, T' + n] and `position_ids` [B, n].

        Raises:
            ValueError: `new_ids` is empty or not a tensor or list of token ids, or `copies` is
                below 1.
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
        """The kept tokens of the context as text, for any other model to read.

        They come in their order, with a mark wherever something is left out. Prefix, suffix and
        what was appended later are left out.

        Args:
            tokenizer: Decodes the tokens, and counts those of the result.
            target_len: The most tokens of `tokenizer` in the text, marks included. Default: the
                plan's `target_len`. What does not fit is dropped, beginning with the units of which
                the smallest share was kept.
            unit: "word" (default) completes every kept token to its word, "sentence" to its
                sentence, "token" to whole characters only.
            gap: The mark.
            with_suffix: Count the suffix as context. Use it if `encode` was given no suffix and
                took the text's own end.
            source: The text that was encoded. Needed where the tokenizer does not keep all white
                space and you want it back.

        Raises:
            ValueError: A setting is out of range, `source` does not have these tokens, or not a
                single unit fits `target_len`.
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
        """The same encoding with more tokens at its end.

        Args:
            token_ids: [n], the new tokens.
            keys: [L, HKV, T' + n, D], of all tokens, old and new.
            values: [L, HKV, T' + n, D], of all tokens, old and new.
            logits: [V] float32, for the token that follows the new ones.
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
        """A copy of the cache as `Llama.forward` takes it, with free slots for new tokens.

        Args:
            model: The model that made the encoding.
            room: Free slots, in tokens.

        Returns:
            [L, 2, T' + room, HKV, D]: keys (0) and values (1). The free slots are uninitialised.

        Raises:
            ValueError: Another model made this encoding.
        """
        self.check_maker(model.fingerprint)
        cache = model.new_cache(len(self) + room, to_grow=True)
        self.copy_rows_(cache)
        return cache

    def check_maker(self, fingerprint: str) -> None:
        """Raise `ValueError` unless the model with this fingerprint made the encoding."""
        if self.model != fingerprint:
            raise ValueError(
                f"The context was encoded by another model ({self.model}, this is {fingerprint})."
            )

    def copy_rows_(self, cache: Tensor) -> None:
        """Copy the kept tokens' keys and values to the first slots of a cache.

        cache: [L, 2, slots, HKV, D] with at least T' slots, of the model that made the encoding.

        Raises:
            ValueError: The cache has other layers, heads or head sizes.
        """
        layers, _, _, heads, dim = cache.shape
        if self.keys.shape != (layers, heads, len(self), dim):
            raise ValueError(
                f"The context's keys have the shape {list(self.keys.shape)} instead of this "
                f"model's {[layers, heads, len(self), dim]}; encode the text again."
            )
        cache[:, 0, : len(self)] = self.keys.transpose(1, 2)
        cache[:, 1, : len(self)] = self.values.transpose(1, 2)
