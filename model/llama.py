"""A minimal Llama whose one `layer` serves plain prefill, every chunk of the merge tree and
decoding; and the families of models that differ from it by what `families` tells.

Keys and values live in a cache `[L, 2, slots, HKV, D]` that the caller owns, or in one `[2, slots,
HKV, D]` for each layer: rows are written at the slots they are given, and attend to the cache's
first `prefix` slots and to each other. Which ops do the work is an argument: the module `kernels`
(Triton) or `kernels.reference` (PyTorch). Sizes are those of `kernels.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from inspect import unwrap
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import ModelConfig
from .costs import mlp_rows
from .fingerprint import fingerprint
from .rotary import rotary_tables
from .weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Select:
    """Decides which rows go on from a run's last layer, by the queries of the last `asking` rows.

    choose: from a layer's index, those queries [B, asking, HQ, D] and all rows' keys [B, T, HKV,
    D], the rows [B, R] that go on, ascending. observe: called with the same in the layers before.
    """

    asking: int
    choose: Callable[[int, Tensor, Tensor], Tensor]
    observe: Callable[[int, Tensor, Tensor], None] | None = None


@dataclass(frozen=True)
class Past:
    """The rows before the one that each of B sequences runs. Those of sequence b are the slots
    `first + b * room` and on, `lengths[b]` of them; the new row has the slot behind.

    lengths: [B] int64; most: rows of the longest sequence, the new one included.
    """

    first: int
    room: int
    lengths: Tensor
    most: int

    def rows(self, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer's cache [2, slots, HKV, D], the new rows in, each [B, most,
        HKV, D].
        """
        count = self.lengths.shape[0]
        own = cache.narrow(1, self.first, count * self.room).unflatten(1, (count, self.room))
        keys, values = own.narrow(2, 0, self.most).unbind()
        return keys, values


# Positions that have their tables from the start, as far as the context limit goes.
_ROTARY_ROWS = 2**17
# What a layer calls.
_LAYER_OPS = (
    "add_linear_",
    "apply_rotary_",
    "causal_attention",
    "gated_linear",
    "linear",
    "rms_norm",
    "rotary_and_store_",
)
# Every layer's [2, slots, HKV, D].
Cache = Tensor | Sequence[Tensor]


class Llama:
    """A Llama's weights, or those of a family like it, with the ops to run them; `tokenizer` is
    None where the checkpoint has none.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        ops: ModuleType,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.config = replace(config, unpacks=weights.unpacks)
        self.weights = weights
        self.ops = ops
        self.tokenizer = tokenizer
        # What `encode` leaves here for the next text of the same lengths, by what it must share.
        self.kept_runs: dict[Hashable, Any] = {}
        self._rotary: tuple[Tensor, Tensor] | None = None
        self._still: tuple[Tensor, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return self.weights.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.embedding.dtype

    @property
    def fingerprint(self) -> str:
        """Tells models apart, whatever dtype they were loaded in (`model.fingerprint`). It is that
        of the weights as they are now.
        """
        return fingerprint(self.config, self.weights)

    def new_cache(self, slots: int, layers: int | None = None, to_grow: bool = False) -> Tensor:
        """An uninitialised cache [layers, 2, slots, HKV, D] for keys (0) and values (1); of all
        layers when their number is left out. to_grow: for tokens one by one, which a CPU reads
        faster where a head's rows lie together.
        """
        c = self.config
        by_heads = to_grow and self.device.type == "cpu"
        count = c.num_hidden_layers if layers is None else layers
        heads = c.num_key_value_heads
        rows = (heads, slots) if by_heads else (slots, heads)
        cache = torch.empty((count, 2, *rows, c.head_dim), dtype=self.dtype, device=self.device)
        return cache.transpose(2, 3) if by_heads else cache

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids: [B, T] -> hidden states [B, T, E]."""
        return F.embedding(token_ids, self.weights.embedding)

    def rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """cos, sin [at least length, D/2] float32 for positions below `length`."""
        limit = min(self.config.max_position_embeddings, _ROTARY_ROWS)
        tables = self._rotary
        filled = 0 if tables is None else len(tables[0])
        original = self.config.rope_switches_at
        if original is not None:  # past it, frequencies follow the length
            rows = original if length <= original else max(limit, length)
            stale = filled != rows
        else:
            rows = max(limit, 2 * length)
            stale = filled < length
        if tables is None or stale:
            tables = self._rotary = rotary_tables(self.config, rows, self.device)
            if self.config.unrotated:
                self._still = torch.ones_like(tables[0]), torch.zeros_like(tables[1])
        return tables

    def _rotary_of(self, index: int, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The tables of a layer: those of all, or such as rotate nothing."""
        if index not in self.config.unrotated:
            return rotary
        if self._still is None or len(self._still[0]) < len(rotary[0]):  # others than `rotary`'s
            return torch.ones_like(rotary[0]), torch.zeros_like(rotary[1])
        return self._still

    def run(
        self,
        layers: range,
        hidden: Tensor,
        positions: Tensor,
        slots: Tensor | None,
        cache: Cache,
        prefix: int,
        rotary: tuple[Tensor, Tensor],
        select: Select | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """Run consecutive layers over B chunks of T rows; `select` decides in the last one which
        rows go on.

        hidden: [B, T, E]; positions, slots: [B, T], or no slots where keys and values need not
        outlive their layer; cache: of every layer [2, slots, HKV, D], of which the first `prefix`
        slots are visible to all rows. past: where each chunk is one row, the rows before it, which
        it sees too. Returns hidden states [B, T, E], or [B, R, E] for the R selected rows. Raises
        `ValueError` for more rows than the model's window.
        """
        own = hidden.shape[1] if past is None else past.most
        self.config.check_window(prefix + own, "the length")
        unchecked = self._without_checks()
        for index in layers:
            # Layers are alike: what the checks of the first let pass is right for the others.
            model = self if index == layers[0] else unchecked
            hidden = model.layer(
                index,
                hidden,
                positions,
                slots,
                cache[index],
                prefix,
                rotary,
                select,
                selects=index == layers[-1],
                past=past,
            )
        return hidden

    def layer(
        self,
        index: int,
        hidden: Tensor,
        positions: Tensor,
        slots: Tensor | None,
        cache: Tensor,
        prefix: int,
        rotary: tuple[Tensor, Tensor],
        select: Select | None = None,
        selects: bool = True,
        past: Past | None = None,
    ) -> Tensor:
        """One decoder layer; arguments as in `run`, with this layer's cache [2, slots, HKV, D].

        Where it `selects`, the keys and values of all rows are stored, but only the selected rows
        have their queries projected, attend, and go through the MLP: the others' outputs would be
        pruned unread. Elsewhere `select` observes.
        """
        with self._own_dtype():
            # Two calls, so that the activations of the first are gone when the second makes its
            # own.
            hidden = self._attend(
                index, hidden, positions, slots, cache, prefix, rotary, select, selects, past
            )
            self._feed_forward_(index, hidden)
            return hidden

    def _attend(
        self,
        index: int,
        hidden: Tensor,
        positions: Tensor,
        slots: Tensor | None,
        cache: Tensor,
        prefix: int,
        rotary: tuple[Tensor, Tensor],
        select: Select | None,
        selects: bool,
        past: Past | None,
    ) -> Tensor:
        """A layer's attention and its residual; arguments as in `layer`."""
        ops, w = self.ops, self.weights.layers[index]
        x = ops.rms_norm(hidden, w.input_norm, self.config.rms_norm_eps)
        rotary = self._rotary_of(index, rotary)
        rows = None
        if select is None or not selects:
            q, k, v = self._heads(index, x, with_queries=True)
            self._rotate_and_store_(q, k, v, positions, rotary, cache, slots)
            if q is not None and select is not None and select.observe is not None:
                select.observe(index, q[:, -select.asking :], k)
        else:
            _, k, v = self._heads(index, x, with_queries=False)
            self._rotate_and_store_(None, k, v, positions, rotary, cache, slots)
            last = slice(-select.asking, None)
            rows = select.choose(
                index, self._queries(index, x[:, last], positions[:, last], rotary), k
            )
            x, hidden = take_rows(x, rows), take_rows(hidden, rows)
            q = self._queries(index, x, positions.gather(1, rows), rotary)
        del x
        if past is not None:
            (k, v), rows = past.rows(cache), past.lengths[:, None]
        before = cache[:, :prefix].unbind()
        mixed = ops.causal_attention(q, k, v, *before, query_rows=rows)
        return ops.linear(mixed.flatten(2), (w.output,), hidden)

    def _rotate_and_store_(
        self,
        q: Tensor | None,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: Tensor,
        slots: Tensor | None,
    ) -> None:
        """Rotate q and k in place, and write k and v to their slots where there are some."""
        if slots is not None:
            self.ops.rotary_and_store_(q, k, v, positions, *rotary, cache[0], cache[1], slots)
            return
        for x in (q, k):
            if x is not None:
                self.ops.apply_rotary_(x, positions, *rotary)

    def _feed_forward_(self, index: int, hidden: Tensor) -> None:
        """Add a layer's MLP to hidden [B, R, E], some rows at a time."""
        ops, w = self.ops, self.weights.layers[index]
        for rows in hidden.view(-1, hidden.shape[-1]).split(mlp_rows(self.device.type != "cpu")):
            x = ops.rms_norm(rows, w.post_norm, self.config.rms_norm_eps)
            ops.add_linear_(rows, ops.gated_linear(x, w.gate_up), w.down)

    def _without_checks(self) -> Llama:
        """The same model, whose layers do not check what they call ops with."""
        same = copy(self)
        own = {name: unwrap(getattr(self.ops, name)) for name in _LAYER_OPS}
        same.ops = SimpleNamespace(**own)  # type: ignore[assignment]
        return same

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and output head: [..., E] -> [..., vocabulary] float32."""
        with self._own_dtype():
            x = self.ops.rms_norm(hidden, self.weights.norm, self.config.rms_norm_eps)
            return self.ops.linear(x, (self.weights.lm_head,)).float()

    def _own_dtype(self) -> AbstractContextManager[object]:
        """Where a caller's autocast does not reach: all of a model's numbers have its dtype."""
        kind = self.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            return torch.autocast(kind, enabled=False)
        return nullcontext()

    def forward(
        self,
        token_ids: Tensor,
        cache: Cache,
        filled: int = 0,
        position: int | None = None,
        all_logits: bool = False,
        slot: int | None = None,
    ) -> Tensor:
        """Run T tokens after the first `filled` slots of a cache, filling the next T; returns
        logits [V] of the last.

        token_ids: [T]; position: RoPE index of the first of them, `filled` when left out;
        all_logits: return those of every token, [T, V]; slot: the first to fill, where that is not
        the one behind those before.
        """
        tokens = len(token_ids)
        rows = torch.arange(tokens, device=self.device)[None]
        start = filled if position is None else position
        first = filled if slot is None else slot
        prefix, past = filled, None
        select = None if all_logits else Select(1, lambda index, q, k: rows[:, -1:])
        if tokens == 1 and 0 < filled == first:  # behind the others: nothing is laid out anew
            prefix, past = 0, Past(0, cache[0].shape[1], rows[0] + filled, filled + 1)
            select = None
        hidden = self.run(
            range(self.config.num_hidden_layers),
            self.embed(token_ids[None]),
            rows + start,
            rows + first,
            cache,
            prefix,
            self.rotary(start + tokens),
            select,
            past,
        )
        return self.logits(hidden[0] if all_logits else hidden[0, -1])

    @torch.no_grad()
    def watch(
        self, token_ids: Tensor, asking: int, see: Callable[[int, Tensor, Tensor], None]
    ) -> None:
        """Run a prompt through all layers for what can be seen on the way; nothing of it is kept.

        token_ids: [T]; see: called with every layer's index, the last `asking` rows' queries [1,
        asking, HQ, D] and all rows' keys [1, T, HKV, D], rotated.
        """
        rows = torch.arange(len(token_ids), device=self.device)[None]

        def choose(index: int, q: Tensor, k: Tensor) -> Tensor:
            see(index, q, k)
            return rows[:, -1:]

        self.run(
            range(self.config.num_hidden_layers),
            self.embed(token_ids[None].to(self.device)),
            rows,
            None,
            self.new_cache(0),
            0,
            self.rotary(len(token_ids)),
            Select(asking, choose, see),
        )

    def _heads(
        self, index: int, x: Tensor, with_queries: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """A layer's queries [B, T, HQ, D] (or None), keys and values [B, T, HKV, D] of x [B, T, E],
        not yet rotated: views of one product.
        """
        w, groups = self.weights.layers[index], [self.config.num_key_value_heads] * 2
        if not with_queries:
            k, v = self._project(x, w.kv, w.kv_bias).split(groups, dim=2)
            return None, self._norm_heads(k, w.k_norm), v
        heads = self._project(x, w.qkv, w.qkv_bias)
        q, k, v = heads.split([self.config.num_attention_heads, *groups], dim=2)
        return self._norm_heads(q, w.q_norm), self._norm_heads(k, w.k_norm), v

    def _queries(
        self, index: int, x: Tensor, positions: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Rotated queries of some rows: x [B, R, E], positions [B, R] -> [B, R, HQ, D]."""
        w = self.weights.layers[index]
        q = self._norm_heads(self._project(x, w.q, w.q_bias), w.q_norm)
        self.ops.apply_rotary_(q, positions, *rotary)
        return q

    def _project(
        self, x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor, ...]
    ) -> Tensor:
        """x [B, T, E] -> heads [B, T, H, D]."""
        return self.ops.linear(x, weights, biases=biases).unflatten(-1, (-1, self.config.head_dim))

    def _norm_heads(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """Each head [B, T, H, D] normalised, in a family that does so."""
        if weight is None:
            return x
        # Rows of a fused product are further apart than their heads.
        return self.ops.rms_norm(x.flatten(0, 1), weight, self.config.rms_norm_eps).view(x.shape)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x [B, T, E], rows [B, R] -> [B, R, E]."""
    starts = torch.arange(0, x.shape[0] * x.shape[1], x.shape[1], device=x.device)
    flat = (rows + starts[:, None]).flatten()
    return x.flatten(0, 1).index_select(0, flat).view(*rows.shape, x.shape[2])
