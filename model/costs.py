"""What a model's layers cost: operations and bytes, from its sizes alone. No torch here."""

from __future__ import annotations

from typing import Protocol


class ModelShape(Protocol):
    """The sizes of a model that the cost of a plan depends on."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def head_norms(self) -> bool: ...
    @property
    def unpacked(self) -> int: ...


def layer_flops(
    shape: ModelShape, prefix: int, rows: int, queries: int | None = None, asking: int = 1
) -> int:
    """One layer over `rows` chunk rows; only `queries` of them (the last `asking` rows scoring
    first) when given.
    """
    heads, dim = shape.num_attention_heads, shape.head_dim
    kv = 2 * rows * shape.hidden_size * 2 * shape.num_key_value_heads * dim
    if queries is None:
        scoring, queries, visible = 0, rows, rows * prefix + rows * (rows + 1) // 2
    else:
        scoring = 2 * asking * heads * dim * (shape.hidden_size + rows)
        visible = queries * (prefix + rows) // 2 if queries > 1 else prefix + rows
    mixing = 4 * heads * dim * visible
    q_and_output = 2 * queries * shape.hidden_size * 2 * heads * dim
    mlp = 2 * queries * 3 * shape.hidden_size * shape.intermediate_size
    return kv + scoring + mixing + q_and_output + mlp


def cache_bytes(shape: ModelShape, itemsize: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * itemsize


def mlp_rows(on_gpu: bool) -> int:
    """Rows that go through an MLP at once: enough for full speed, and no more, since its
    activations are a layer's widest.
    """
    return 4096 if on_gpu else 512


def activation_bytes(shape: ModelShape, rows: int, chunk: int, in_mlp: int, itemsize: int) -> int:
    """The largest set of activations of a layer that is alive at once, of chunks of `chunk` rows,
    `rows` in all: in attention the hidden states before and after, the projections and what they
    mix to, and one chunk's queries, keys and values laid out beside the prefix (and all queries and
    keys once more where heads are normalised); in the MLP the hidden states, and for `in_mlp` rows
    at a time their norm, gate, up and product, and the result.
    """
    hidden, inner = shape.hidden_size, shape.intermediate_size
    heads = shape.num_attention_heads + shape.num_key_value_heads
    normed = rows * heads * shape.head_dim if shape.head_norms else 0
    attention = rows * 3 * hidden + (rows + chunk) * 2 * heads * shape.head_dim + normed
    mlp = rows * hidden + min(rows, in_mlp) * (2 * hidden + 3 * inner)
    return max(attention, mlp) * itemsize
