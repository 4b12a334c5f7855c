"""A minimal Llama whose one `layer` serves prefill, the merge tree's chunks and decoding.

Families of models that differ from Llama are described in `families`.

Keys and values live in a cache `[L, 2, slots, HKV, D]` that the caller owns, or in one `[2, slots,
HKV, D]` for each layer. Tokens are written at the slots that they are given, and attend to the
cache's first `prefix` slots and to each other. The ops are an argument: the module `kernels`
(Triton) or `kernels.reference` (PyTorch). Sizes are named as in `kernels.reference`.
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
    """Chooses the tokens that continue after the last layer of a run.

    Attributes:
        asking: How many of the last tokens' queries decide.
        choose: Called in the last layer with its index, those queries [B, asking, HQ, D] and all
            keys [B, T, HKV, D]. Returns the indices [B, R] of the tokens that continue, ascending.
        observe: Called with the same in the layers before.
    """

    asking: int
    choose: Callable[[int, Tensor, Tensor], Tensor]
    observe: Callable[[int, Tensor, Tensor], None] | None = None


@dataclass(frozen=True)
class Past:
    """The tokens before the one that each of B sequences runs, as in decoding.

    Sequence b has the slots from `first + b * room` on, `lengths[b]` of them filled. Its new token
    gets the next slot.

    Attributes:
        first: The first slot of sequence 0.
        room: Slots for each sequence.
        lengths: [B] int64, on the model's device.
        most: Tokens of the longest sequence, the new one included.
    """

    first: int
    room: int
    lengths: Tensor
    most: int

    def rows(self, cache: Tensor) -> tuple[Tensor, Tensor]:
        """All sequences' keys and values, each [B, most, HKV, D], views of one layer's cache.

        cache: [2, slots, HKV, D], with the new tokens written.
        """
        count = self.lengths.shape[0]
        own = cache.narrow(1, self.first, count * self.room).unflatten(1, (count, self.room))
        keys, values = own.narrow(2, 0, self.most).unbind()
        return keys, values


# Tables are made for this many positions at first, or for the context limit where that is less.
_ROTARY_ROWS = 2**17
# The ops that a layer calls.
_LAYER_OPS = (
    "add_linear_",
    "apply_rotary_",
    "causal_attention",
    "gated_linear",
    "linear",
    "rms_norm",
    "rotary_and_store_",
)
# For every layer [2, slots, HKV, D].
Cache = Tensor | Sequence[Tensor]


class Llama:
    """A loaded model of the Llama family. `load` and `from_transformers` make one.

    Sizes: B sequences or chunks of T tokens, L layers, E hidden size, V vocabulary, HQ query heads
    and HKV key-value heads of D elements.

    Attributes:
        config: Its sizes and settings, a `ModelConfig`.
        weights: Its weights.
        ops: The module that computes: `kernels` (Triton) or `kernels.reference` (PyTorch).
        tokenizer: The checkpoint's tokenizer, or None.
        kept_runs: What `encode` keeps here for the next text of the same lengths, with
            `cuda_graphs`; `drop_graphs` empties it.
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
        # Kept by `encode` for the next text of the same lengths.
        self.kept_runs: dict[Hashable, Any] = {}
        self._rotary: tuple[Tensor, Tensor] | None = None
        self._still: tuple[Tensor, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.weights.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embeddings and norms, and of all weights that are not quantised."""
        return self.weights.embedding.dtype

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that tell models apart.

        They are the same whatever float type the model was loaded in, and differ for other weights,
        other RoPE parameters and quantised weights. They are computed from the weights anew each
        time, in some milliseconds.
        """
        return fingerprint(self.config, self.weights)

    def new_cache(self, slots: int, layers: int | None = None, to_grow: bool = False) -> Tensor:
        """An uninitialised KV cache [layers, 2, slots, HKV, D]: keys (0) and values (1).

        Args:
            slots: Its capacity in tokens.
            layers: How many layers. Default: all.
            to_grow: Whether tokens will be added one by one. On a CPU, the tokens of a head then
                lie side by side in memory, which is faster to read.
        """
        c = self.config
        by_heads = to_grow and self.device.type == "cpu"
        count = c.num_hidden_layers if layers is None else layers
        heads = c.num_key_value_heads
        rows = (heads, slots) if by_heads else (slots, heads)
        cache = torch.empty((count, 2, *rows, c.head_dim), dtype=self.dtype, device=self.device)
        return cache.transpose(2, 3) if by_heads else cache

    def embed(self, token_ids: Tensor) -> Tensor:
        """Embed token ids [B, T] as hidden states [B, T, E]."""
        return F.embedding(token_ids, self.weights.embedding)

    def rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """RoPE's cos and sin for all positions below `length`.

        Each is [at least `length`, D/2] float32.
        """
        limit = min(self.config.max_position_embeddings, _ROTARY_ROWS)
        tables = self._rotary
        filled = 0 if tables is None else len(tables[0])
        original = self.config.rope_switches_at
        if original is not None:  # beyond it, frequencies depend on the length
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
        """The tables of a layer: those of the model, or ones that rotate nothing."""
        if index not in self.config.unrotated:
            return rotary
        if self._still is None or len(self._still[0]) < len(rotary[0]):  # longer than ours
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
        """Run consecutive layers over B chunks of T tokens.

        Args:
            layers: The layers.
            hidden: [B, T, E], the hidden states before them.
            positions: [B, T] int64, RoPE positions.
            slots: [B, T] int64, where each token's keys and values are written. None: they are not
                kept after their layer.
            cache: For every layer of the model, [2, slots, HKV, D].
            prefix: How many of the cache's first slots all tokens see.
            rotary: cos and sin, as `rotary` returns them.
            select: Chooses in the last layer which tokens continue. Default: all.
            past: Where each chunk is one token, the tokens before it, which it sees too.

        Returns:
            Hidden states [B, T, E], or [B, R, E] of the R selected tokens.

        Raises:
            ValueError: There are more tokens than the model's sliding window.
        """
        own = hidden.shape[1] if past is None else past.most
        self.config.check_window(prefix + own, "the length")
        unchecked = self._without_checks()
        for index in layers:
            # Layers are alike: arguments that pass the first one's checks fit the others.
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
        """Run one decoder layer.

        Arguments are as in `run`, with this layer's cache [2, slots, HKV, D].

        If it `selects`, all tokens' keys and values are stored, but only the selected tokens have
        queries, attend and go through the MLP: the others' outputs would be pruned unread. If not,
        `select` only observes.
        """
        with self._own_dtype():
            # Two calls, so that the first one's activations are freed before the second allocates.
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
        """A layer's attention and its residual. Arguments are as in `layer`."""
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
        """Rotate q and k in place, and write k and v to their slots if there are any."""
        if slots is not None:
            self.ops.rotary_and_store_(q, k, v, positions, *rotary, cache[0], cache[1], slots)
            return
        for x in (q, k):
            if x is not None:
                self.ops.apply_rotary_(x, positions, *rotary)

    def _feed_forward_(self, index: int, hidden: Tensor) -> None:
        """Add a layer's MLP to hidden [B, R, E], some tokens at a time."""
        ops, w = self.ops, self.weights.layers[index]
        for rows in hidden.view(-1, hidden.shape[-1]).split(mlp_rows(self.device.type != "cpu")):
            x = ops.rms_norm(rows, w.post_norm, self.config.rms_norm_eps)
            ops.add_linear_(rows, ops.gated_linear(x, w.gate_up), w.down)

    def _without_checks(self) -> Llama:
        """The same model, calling ops that do not check their arguments."""
        same = copy(self)
        own = {name: unwrap(getattr(self.ops, name)) for name in _LAYER_OPS}
        same.ops = SimpleNamespace(**own)  # type: ignore[assignment]
        return same

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and output head: hidden states [..., E] -> logits [..., V] float32."""
        with self._own_dtype():
            x = self.ops.rms_norm(hidden, self.weights.norm, self.config.rms_norm_eps)
            return self.ops.linear(x, (self.weights.lm_head,)).float()

    def _own_dtype(self) -> AbstractContextManager[object]:
        """A context without the caller's autocast: all numbers keep the model's dtype."""
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
        """Run T new tokens of a sequence and write them to its cache.

        Args:
            token_ids: [T], on the model's device.
            cache: For every layer [2, slots, HKV, D], as `new_cache` makes it.
            filled: How many of the cache's first slots hold the tokens before.
            position: RoPE position of the first new token. Default: `filled`.
            all_logits: Return the logits of every token.
            slot: The first slot to write. Default: `filled`.

        Returns:
            Logits [V] float32 of the last token, or [T, V] of all.

        Raises:
            ValueError: There are more tokens than the model's sliding window.
        """
        tokens = len(token_ids)
        rows = torch.arange(tokens, device=self.device)[None]
        start = filled if position is None else position
        first = filled if slot is None else slot
        prefix, past = filled, None
        select = None if all_logits else Select(1, lambda index, q, k: rows[:, -1:])
        if tokens == 1 and 0 < filled == first:  # decoding: the cache is read where it lies
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
        """Run a prompt through all layers to look at its queries and keys. Nothing is kept.

        Args:
            token_ids: [T].
            asking: How many of the last tokens' queries to see.
            see: Called in every layer with its index, those queries [1, asking, HQ, D] and all keys
                [1, T, HKV, D], both rotated.
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
        """A layer's queries [B, T, HQ, D] (or None), keys and values [B, T, HKV, D] of x [B, T, E].

        They are not yet rotated, and views of one product.
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
        """Rotated queries of some tokens: x [B, R, E], positions [B, R] -> [B, R, HQ, D]."""
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
        """Normalise each head [B, T, H, D] if the family does so."""
        if weight is None:
            return x
        # Flattened without a copy: tokens of a fused product are further apart than their heads.
        return self.ops.rms_norm(x.flatten(0, 1), weight, self.config.rms_norm_eps).view(x.shape)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Gather tokens: x [B, T, E], rows [B, R] -> [B, R, E]."""
    starts = torch.arange(0, x.shape[0] * x.shape[1], x.shape[1], device=x.device)
    flat = (rows + starts[:, None]).flatten()
    return x.flatten(0, 1).index_select(0, flat).view(*rows.shape, x.shape[2])
