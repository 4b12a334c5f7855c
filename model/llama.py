"""A minimal Llama. The steps of a `Pass` serve prefill, the merge tree's chunks and decoding.

Families of models that differ from Llama are described in `families`.

Keys and values live in a cache `[L, 2, slots, HKV, D]` that the caller owns, or in one `[2, slots,
HKV, D]` for each layer. Tokens are written at the slots that they are given, and attend to the
cache's first `prefix` slots and to each other. The ops are an argument: the module `kernels`
(Triton) or `kernels.reference` (PyTorch). Sizes are named as in `kernels.reference`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
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

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The ids that end an answer: those of the config, and the one that the tokenizer names."""
        own = None if self.tokenizer is None else self.tokenizer.eos_token_id
        ends = dict.fromkeys((*self.config.eos_token_ids, own))
        return tuple(token for token in ends if token is not None)

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

    def rotary_of(self, index: int, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The tables of a layer: those of the model, or ones that rotate nothing."""
        if index not in self.config.unrotated:
            return rotary
        if self._still is None or len(self._still[0]) < len(rotary[0]):  # longer than ours
            return torch.ones_like(rotary[0]), torch.zeros_like(rotary[1])
        return self._still

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and output head: hidden states [..., E] -> logits [..., V] float32."""
        with self.own_dtype():
            x = self.ops.rms_norm(hidden, self.weights.norm, self.config.rms_norm_eps)
            return self.ops.linear(x, (self.weights.lm_head,)).float()

    def own_dtype(self) -> AbstractContextManager[object]:
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
        if tokens == 1 and 0 < filled == first:  # decoding: the cache is read where it lies
            prefix, past = 0, Past(0, cache[0].shape[1], rows[0] + filled, filled + 1)
        run = Pass(
            self, rows + start, cache, rows + first, prefix, self.rotary(start + tokens), past
        )
        hidden = run.layers(
            range(self.config.num_hidden_layers),
            self.embed(token_ids[None]),
            None if all_logits or tokens == 1 else rows[:, -1:],
        )
        return self.logits(hidden[0] if all_logits else hidden[0, -1])

    @torch.no_grad()
    def queries_and_keys(
        self, token_ids: Tensor, asking: int
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Run a prompt through all layers to look at its queries and keys. Nothing is kept.

        Args:
            token_ids: [T].
            asking: How many of the last tokens' queries to give.

        Yields:
            Of each layer its index, those queries [1, asking, HQ, D] and all keys [1, T, HKV, D],
            both rotated.
        """
        rows = torch.arange(len(token_ids), device=self.device)[None]
        run = Pass(self, rows, self.new_cache(0), rotary=self.rotary(len(token_ids)))
        hidden = self.embed(token_ids[None].to(self.device))
        for layer in range(self.config.num_hidden_layers):
            q, k, v = run.project(layer, hidden)
            yield layer, q[:, -asking:], k
            hidden = run.attend(layer, hidden, q, k, v)
            del q, k, v
            run.feed_forward_(layer, hidden)


class Pass:
    """One pass of B sequences or chunks of T tokens through layers, in steps.

    Whoever walks the layers can look in between, and choose which tokens go on:

        for layer in layers:
            q, k, v = run.project(layer, hidden)
            hidden = run.attend(layer, hidden, q, k, v)
            del q, k, v  # their memory, before the MLP takes its own
            run.feed_forward_(layer, hidden)

    `layer` does these three. Hidden states are [B, T, E]. All steps check their arguments until a
    layer is done: the other layers' are alike.
    """

    def __init__(
        self,
        model: Llama,
        positions: Tensor,
        cache: Cache,
        slots: Tensor | None = None,
        prefix: int = 0,
        rotary: tuple[Tensor, Tensor] | None = None,
        past: Past | None = None,
    ) -> None:
        """Say where the tokens stand.

        Args:
            model: The model.
            positions: [B, T] int64, RoPE positions.
            cache: For every layer of the model, [2, slots, HKV, D].
            slots: [B, T] int64, where each token's keys and values are written. None: they are not
                kept after their layer.
            prefix: How many of the cache's first slots all tokens see.
            rotary: cos and sin, as `Llama.rotary` returns them. Default: for positions up to
                `prefix` + T.
            past: Where each chunk is one token, the tokens before it, which it sees too.

        Raises:
            ValueError: There are more tokens than the model's sliding window.
        """
        own = positions.shape[1] if past is None else past.most
        model.config.check_window(prefix + own, "the length")
        self._model = model
        self._positions = positions
        self._cache = cache
        self._slots = slots
        self._prefix = prefix
        self._rotary = model.rotary(prefix + own) if rotary is None else rotary
        self._past = past
        self._ops: Any = model.ops

    def layers(self, layers: range, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """Run consecutive layers: hidden states [B, T, E] -> [B, T, E], or [B, R, E] of `rows`.

        rows: [B, R], the tokens that leave the last layer. The others only give it their keys and
        values.
        """
        for index in layers:
            hidden = self.layer(index, hidden, rows if index == layers[-1] else None)
        return hidden

    def layer(self, index: int, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """Run one layer. Arguments and result are as in `layers`."""
        # Two calls, so that the first one's activations are freed before the second allocates.
        hidden = self._project_and_attend(index, hidden, rows)
        self.feed_forward_(index, hidden)
        return hidden

    def _project_and_attend(self, index: int, hidden: Tensor, rows: Tensor | None) -> Tensor:
        if rows is None:
            return self.attend(index, hidden, *self.project(index, hidden))
        k, v = self.project_keys(index, hidden)
        return self.attend_from(index, hidden, rows, k, v)

    def project(self, index: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A layer's queries [B, T, HQ, D], keys and values [B, T, HKV, D].

        Queries and keys are rotated. Keys and values are written to their slots, if there are any.
        """
        c, w = self._model.config, self._model.weights.layers[index]
        groups = [c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads]
        with self._model.own_dtype():
            heads = self._heads(index, hidden, w.qkv, w.qkv_bias)
            q, k, v = heads.split(groups, dim=2)  # views of one product
            q, k = self._norm_heads(q, w.q_norm), self._norm_heads(k, w.k_norm)
            self._rotate_and_store_(index, q, k, v)
        return q, k, v

    def project_keys(self, index: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's keys and values, as `project` returns and stores them, without queries."""
        w = self._model.weights.layers[index]
        with self._model.own_dtype():
            k, v = self._heads(index, hidden, w.kv, w.kv_bias).chunk(2, dim=2)
            k = self._norm_heads(k, w.k_norm)
            self._rotate_and_store_(index, None, k, v)
        return k, v

    def queries(self, index: int, hidden: Tensor, positions: Tensor) -> Tensor:
        """Rotated queries [B, R, HQ, D] of some tokens: hidden [B, R, E], positions [B, R]."""
        w = self._model.weights.layers[index]
        with self._model.own_dtype():
            q = self._norm_heads(self._heads(index, hidden, w.q, w.q_bias), w.q_norm)
            rotary = self._model.rotary_of(index, self._rotary)
            self._ops.apply_rotary_(q, positions, *rotary)
        return q

    def last_queries(self, index: int, hidden: Tensor, count: int) -> Tensor:
        """Rotated queries [B, count, HQ, D] of each chunk's last tokens: hidden [B, T, E]."""
        return self.queries(index, hidden[:, -count:], self._positions[:, -count:])

    def attend(
        self,
        index: int,
        hidden: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rows: Tensor | None = None,
    ) -> Tensor:
        """A layer's attention, its output product and its residual.

        hidden: [B, R, E], before the layer, of the tokens that q [B, R, HQ, D] belongs to. rows:
        [B, R], which of the T tokens these are; all of them if left out. Returns [B, R, E].
        """
        cache = self._cache[index]
        if self._past is not None:
            (k, v), rows = self._past.rows(cache), self._past.lengths[:, None]
        with self._model.own_dtype():
            before = cache[:, : self._prefix].unbind()
            mixed = self._ops.causal_attention(q, k, v, *before, query_rows=rows)
            output = self._model.weights.layers[index].output
            return self._ops.linear(mixed.flatten(2), (output,), hidden)

    def attend_from(self, index: int, hidden: Tensor, rows: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`attend` of some tokens alone: hidden [B, T, E] of all, rows [B, R] -> [B, R, E]."""
        hidden = take_rows(hidden, rows)
        q = self.queries(index, hidden, self._positions.gather(1, rows))
        return self.attend(index, hidden, q, k, v, rows)

    def feed_forward_(self, index: int, hidden: Tensor) -> None:
        """Add a layer's MLP to hidden [B, R, E], some tokens at a time."""
        model, ops = self._model, self._ops
        w, on_gpu = model.weights.layers[index], model.device.type != "cpu"
        with model.own_dtype():
            for rows in hidden.view(-1, hidden.shape[-1]).split(mlp_rows(on_gpu)):
                x = ops.rms_norm(rows, w.post_norm, model.config.rms_norm_eps)
                ops.add_linear_(rows, ops.gated_linear(x, w.gate_up), w.down)
        if self._ops is model.ops:
            own = {name: unwrap(getattr(model.ops, name)) for name in _LAYER_OPS}
            self._ops = SimpleNamespace(**own)

    def _heads(
        self,
        index: int,
        hidden: Tensor,
        weights: tuple[Tensor, ...],
        biases: tuple[Tensor, ...],
    ) -> Tensor:
        """The normalised hidden states [B, T, E] times weights, as heads [B, T, H, D]."""
        config = self._model.config
        norm = self._model.weights.layers[index].input_norm
        x = self._ops.rms_norm(hidden, norm, config.rms_norm_eps)
        return self._ops.linear(x, weights, biases=biases).unflatten(-1, (-1, config.head_dim))

    def _norm_heads(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """Normalise each head [B, T, H, D] if the family does so."""
        if weight is None:
            return x
        # Flattened without a copy: tokens of a fused product are further apart than their heads.
        eps = self._model.config.rms_norm_eps
        return self._ops.rms_norm(x.flatten(0, 1), weight, eps).view(x.shape)

    def _rotate_and_store_(self, index: int, q: Tensor | None, k: Tensor, v: Tensor) -> None:
        """Rotate q and k in place, and write k and v to their slots if there are any."""
        rotary = self._model.rotary_of(index, self._rotary)
        if self._slots is not None:
            cache = self._cache[index]
            self._ops.rotary_and_store_(
                q, k, v, self._positions, *rotary, cache[0], cache[1], self._slots
            )
            return
        for x in (q, k):
            if x is not None:
                self._ops.apply_rotary_(x, self._positions, *rotary)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Gather tokens: x [B, T, E], rows [B, R] -> [B, R, E]."""
    starts = torch.arange(0, x.shape[0] * x.shape[1], x.shape[1], device=x.device)
    flat = (rows + starts[:, None]).flatten()
    return x.flatten(0, 1).index_select(0, flat).view(*rows.shape, x.shape[2])
