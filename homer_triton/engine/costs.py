"""The cost of a plan, known before it runs: floating-point operations and memory, and those of a
plain prefill. These functions are methods of `Plan`. This module does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..model.costs import ModelShape, activation_bytes, cache_bytes, layer_flops, mlp_rows

if TYPE_CHECKING:
    from .tree import Node, Plan


# A quantised matrix is unpacked for a product, and oneDNN lays it out anew, as measured.
UNPACKED_COPIES = 2


def flops(plan: Plan, shape: ModelShape) -> int:
    """Floating-point operations of the encoding. A multiply and an add count as two.

    shape: the model's sizes, such as `model.config`.
    """
    total = layer_flops(shape, 0, plan.prefix_len) * plan.layers_tree
    total += sum(node_flops(plan, shape, node) for level in plan.levels for node in level.nodes)
    narrowing = plan.narrowing()
    if narrowing is not None:
        return total + narrowing.flops(shape)
    head = 2 * shape.hidden_size * shape.vocab_size
    return total + head + _recompute_flops(plan, shape)


def node_flops(plan: Plan, shape: ModelShape, node: Node) -> int:
    """Floating-point operations of one node."""
    level, rows = plan.levels[node.height], node.context + plan.suffix_len
    layers = level.last_layer - level.first_layer
    queries = 1 if level.height == plan.height else node.kept + plan.suffix_len
    whole = layer_flops(shape, plan.prefix_len, rows) * (layers - 1)
    return whole + layer_flops(shape, plan.prefix_len, rows, queries, plan.asking)


def _recompute_flops(plan: Plan, shape: ModelShape) -> int:
    """Floating-point operations of what is read once more, in place of the tree's logits."""
    if plan.recompute == "none":
        return 0
    before = 0 if plan.recompute == "all" else plan.rows - plan.suffix_len
    return layer_flops(shape, before, plan.rows - before) * plan.num_layers


def prefill_flops(plan: Plan, shape: ModelShape) -> int:
    """Floating-point operations of a plain prefill of the whole input, with the last logits only.

    shape: the model's sizes, such as `model.config`.
    """
    head = 2 * shape.hidden_size * shape.vocab_size
    return layer_flops(shape, 0, plan.input_len) * plan.num_layers + head


def memory(
    plan: Plan, shape: ModelShape, itemsize: int, documents: int = 1, on_gpu: bool = True
) -> int:
    """The most bytes that the encoding needs at once, on top of the model's weights.

    Its steps are to walk the tree, to gather the finished caches, and to read again what
    `recompute` says.

    Args:
        shape: The model's sizes, such as `model.config`.
        itemsize: Bytes of a number in the model's dtype.
        documents: How many documents run side by side.
        on_gpu: Whether it runs on a GPU.
    """
    return memory_of(plan, shape, itemsize, documents, on_gpu, list(plan.steps()), finishes=True)


def memory_of(
    plan: Plan,
    shape: ModelShape,
    itemsize: int,
    documents: int,
    on_gpu: bool,
    steps: list[tuple[Node, ...]],
    finishes: bool,
) -> int:
    """The same of a process that runs some of the steps, in a pool for all; finishes: whether it
    gathers and reads once more.
    """
    if not steps:
        return 0
    layer_token = cache_bytes(shape, itemsize) // shape.num_hidden_layers
    caches = documents * plan.rows * layer_token * plan.num_layers
    chunks = [(len(nodes), nodes[0].context + plan.suffix_len) for nodes in steps]
    rows, chunk = max(n * own for n, own in chunks), max(own for _, own in chunks)
    hidden = documents * plan.own_slots[0] * shape.hidden_size * itemsize
    walking = hidden + activations(shape, documents * rows, chunk, itemsize, on_gpu)
    parked = [nodes[0].kept + plan.suffix_len for nodes in steps if plan.waits(nodes)]
    waiting = max(parked, default=0)
    layers = [level.last_layer - level.first_layer for level in plan.levels]
    if plan.recompute == "all":
        pools = plan.prefix_len * layer_token * plan.layers_tree
        moved = waiting * shape.hidden_size * itemsize
    else:
        slots = sum(n * own for n, own in zip(layers, plan.slots(documents), strict=True))
        pools = slots * layer_token
        moved = waiting * layer_token * plan.num_layers
    # A chunk on its way out and one on its way in.
    moving = 2 * documents * moved if plan.offload else 0
    if not finishes:
        return pools + moving + walking
    if plan.recompute == "none":
        return pools + moving + max(walking, caches)
    again = plan.rows if plan.recompute == "all" else plan.suffix_len
    # A layer's keys and values, and their copies in the order that attention wants.
    rereading = (
        caches
        + 2 * plan.rows * layer_token
        + activations(shape, again, plan.rows, itemsize, on_gpu)
    )
    if plan.recompute == "all":
        return max(pools + moving + walking, rereading)
    return max(pools + moving + max(walking, caches), rereading)


def activations(shape: ModelShape, rows: int, chunk: int, itemsize: int, on_gpu: bool) -> int:
    """`activation_bytes` as a process needs them, with matrices that are unpacked.

    A CPU computes half precision in float32 in between, and a heap (glibc's, as measured) has holes
    of half the size of what comes and goes in it.
    """
    wide = itemsize if on_gpu else max(itemsize, 4)
    size = activation_bytes(shape, rows, chunk, mlp_rows(on_gpu), wide)
    unpacked = UNPACKED_COPIES * shape.unpacked * itemsize
    return (size if on_gpu else size + size // 2) + unpacked


def prefill_memory(plan: Plan, shape: ModelShape, itemsize: int) -> int:
    """The most bytes that a plain prefill with exact attention needs at once, on top of the
    weights.

    shape, itemsize: as in `memory`.
    """
    cache = plan.input_len * cache_bytes(shape, itemsize)
    whole = plan.input_len
    return cache + activation_bytes(shape, whole, whole, whole, itemsize)


@dataclass(frozen=True)
class ReadingCosts:
    """What reading a text once takes at most, known without the model's weights. They decide which
    heads are read, so how deep the reading goes and how many keys it keeps.

    Attributes:
        chunks: How many chunks run, one after another.
        rows: The most tokens in one, with those before it and the opening.
        flops: Floating-point operations, if the last layer has one of the heads.
        memory: Bytes above the weights while a chunk runs, beside what is kept.
        kept: Bytes of what is kept: ids and keys, without the text.
    """

    chunks: int
    rows: int
    flops: int
    memory: int
    kept: int


def reading_costs(
    shape: ModelShape,
    tokens: int,
    chunk_len: int,
    around: int,
    heads: int,
    itemsize: int,
    on_gpu: bool,
) -> ReadingCosts:
    """The costs of reading a text of so many tokens.

    Args:
        shape: The model's sizes, such as `model.config`.
        tokens: The text's length.
        chunk_len: Tokens of a chunk.
        around: Tokens that run with each chunk: those before it, and the opening.
        heads: The most heads whose keys are kept.
        itemsize: Bytes of a number in the model's dtype.
        on_gpu: Whether it runs on a GPU.
    """
    rows = min(chunk_len, tokens) + around
    whole, rest = divmod(tokens, chunk_len)
    layers = shape.num_hidden_layers - 1
    flops = whole * layer_flops(shape, 0, chunk_len + around)
    if rest:
        flops += layer_flops(shape, 0, rest + around)
    heads = min(heads, shape.num_hidden_layers * shape.num_key_value_heads)
    # A token's id, and for each head a number for each dimension and a scale.
    kept = tokens * (4 + heads * (shape.head_dim + 2))
    memory = activations(shape, rows, rows, itemsize, on_gpu)
    return ReadingCosts(-(-tokens // chunk_len), rows, flops * layers, memory, kept)
