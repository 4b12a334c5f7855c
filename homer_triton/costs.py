"""What a Llama's layers cost: operations and bytes, from its sizes alone. No torch here."""

from __future__ import annotations

from typing import Protocol


class ModelShape(Protocol):
    """The sizes of a Llama that the cost of a plan depends on."""

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


def layer_flops(shape: ModelShape, prefix: int, rows: int, queries: int | None = None) -> int:
    """One layer over `rows` chunk rows; only `queries` of them (the last row scoring first) when
    given.
    """
    heads, dim = shape.num_attention_heads, shape.head_dim
    kv = 2 * rows * shape.hidden_size * 2 * shape.num_key_value_heads * dim
    if queries is None:
        scoring, queries, visible = 0, rows, rows * prefix + rows * (rows + 1) // 2
    else:
        scoring = 2 * heads * dim * (shape.hidden_size + rows)
        visible = queries * (prefix + rows) // 2 if queries > 1 else prefix + rows
    mixing = 4 * heads * dim * visible
    q_and_output = 2 * queries * shape.hidden_size * 2 * heads * dim
    mlp = 2 * queries * 3 * shape.hidden_size * shape.intermediate_size
    return kv + scoring + mixing + q_and_output + mlp


def cache_bytes(shape: ModelShape, itemsize: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * itemsize


def row_bytes(shape: ModelShape, itemsize: int) -> int:
    """A row's largest set of activations alive at once: in attention the hidden states before and
    after, the projections, and queries, keys and values laid out beside the prefix; in the MLP the
    hidden states, their norm, and gate, up and product.
    """
    queries = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    attention = 2 * shape.hidden_size + 4 * queries + 4 * keys
    mlp = 3 * (shape.hidden_size + shape.intermediate_size)
    return max(attention, mlp) * itemsize
