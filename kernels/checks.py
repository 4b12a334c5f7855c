"""What every op asks of its arguments, for the Triton ops and their PyTorch definitions alike.

Each function raises `ValueError` with one sentence that names the argument, its value and what it
must be. Only shapes, dtypes, devices and strides are read, never data on a GPU: no check waits for
the device. Sizes are those of `kernels.reference`.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

_Op = TypeVar("_Op", bound=Callable[..., Any])
# The names of a product's arguments; no call has more.
_WEIGHTS, _BIASES = ([f"{name}[{i}]" for i in range(8)] for name in ("weights", "biases"))
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)
# What a score makes of a logit, and how it joins the heads.
LOGITS = ("logit", "log_softmax", "softmax")
JOINS = ("max", "sum")


def checked_by(check: Callable[..., None]) -> Callable[[_Op], _Op]:
    """Have an op's arguments checked first; `inspect.unwrap` gives the op without that."""

    def checked(op: _Op) -> _Op:
        @wraps(op)
        def asking(*args: Any, **settings: Any) -> Any:
            check(*args, **settings)
            return op(*args, **settings)

        return asking  # type: ignore[return-value]

    return checked


def require(holds: bool, argument: str, value: object, must: str) -> None:
    """Raise `ValueError` unless the argument is as it must be."""
    if not holds:
        raise ValueError(f"{argument} is {value}: it must be {must}.")


def check_head_dim(dim: int) -> None:
    """The head dimensions that the attention kernel has tiles for."""
    require(dim in HEAD_DIMS, "the head dim of q", dim, f"one of {', '.join(map(str, HEAD_DIMS))}")


def check_norm(x: Tensor, residual: Tensor | None, weight: Tensor) -> None:
    """x [..., E], residual like x or None, weight [E]."""
    _check_dims(x, "x", 1)
    _check_alike(x=x, residual=residual, weight=weight)
    _check_shape("weight", weight, (x.shape[-1],), "[E]")
    if residual is not None:
        _check_shape("residual", residual, tuple(x.shape), "x's")


def check_linear(
    x: Tensor,
    weights: tuple[Tensor, ...],
    residual: Tensor | None = None,
    biases: tuple[Tensor, ...] = (),
) -> None:
    """x [..., I], weights each [O, I], residual [..., sum of O] or None, biases each [O] or
    none.
    """
    _check_dims(x, "x", 1)
    require(len(biases) in (0, len(weights)), "the number of biases", len(biases), "the weights'")
    named = {_WEIGHTS[i]: weight for i, weight in enumerate(weights)}
    added = {_BIASES[i]: bias for i, bias in enumerate(biases)}
    _check_alike(x=x, residual=residual, **named, **added)
    for (name, bias), weight in zip(added.items(), weights, strict=False):
        _check_shape(name, bias, weight.shape[:1], "[O]")
    for name, weight in named.items():
        _check_dims(weight, name, 2, exact=True)
        _check_shape(name, weight, (weight.shape[0], x.shape[-1]), "[O, I]")
    if residual is not None:
        width = sum(weight.shape[0] for weight in weights)
        _check_shape("residual", residual, (*x.shape[:-1], width), "[..., sum of O]")


def check_silu_mul(gate_up: Tensor) -> None:
    """gate_up [..., 2F]."""
    _check_dims(gate_up, "gate_up", 1)
    _check_alike(gate_up=gate_up)
    width = gate_up.shape[-1]
    require(width > 0 and width % 2 == 0, "the last dimension of gate_up", width, "even")


def check_rotary(name: str, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> None:
    """x [B, T, H, D], positions [B, T], cos and sin [positions, D/2] float32."""
    _check_sized(x, name, 4)
    dim = x.shape[3]
    if dim % 2:
        require(False, f"the head dim of {name}", dim, "even")
    _check_floating(name, x)
    _check_layout(**{name: x}, positions=positions, cos=cos, sin=sin)
    _check_indices("positions", positions, x.shape[:2], f"the rows of {name}")
    for table_name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32:
            require(False, f"the dtype of {table_name}", table.dtype, "torch.float32")
        _check_shape(table_name, table, (cos.shape[0], dim // 2), "[positions, D/2]")
        if not table.is_contiguous():
            require(False, f"the strides of {table_name}", table.stride(), "contiguous")


def check_rotary_and_store(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
) -> None:
    """q [B, T, HQ, D] or None; k, v [B, T, HKV, D]; keys, values [slots, HKV, D]; slots [B, T]."""
    check_rotary("k", k, positions, cos, sin)
    _check_alike(k=k, q=q, v=v, keys=keys, values=values)
    _check_layout(k=k, slots=slots)
    _check_shape("v", v, tuple(k.shape), "k's")
    if q is not None:
        _check_sized(q, "q", 4)
        expected = (*k.shape[:2], q.shape[2], k.shape[3])
        _check_shape("q", q, expected, "k's but for the heads")
    _check_indices("slots", slots, tuple(k.shape[:2]), "the rows of k")
    for name, store in (("keys", keys), ("values", values)):
        _check_dims(store, name, 3, exact=True)
        _check_shape(name, store, (store.shape[0], *k.shape[2:]), "[slots, HKV, D]")


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    query_rows: Tensor | None = None,
) -> None:
    """q [B, R, HQ, D]; k, v [B, T, HKV, D]; prefixes [P, HKV, D] or None; query_rows [B, R] or not.

    Without query_rows, R is T.
    """
    _check_sized(q, "q", 4)
    _check_sized(k, "k", 4)
    _check_alike(q=q, k=k, v=v, prefix_k=prefix_k, prefix_v=prefix_v)
    _check_shape("v", v, tuple(k.shape), "k's")
    _check_heads("q", q, k)
    require(q.shape[0] == k.shape[0], "the batch of q", q.shape[0], f"k's, {k.shape[0]}")
    require(
        (prefix_k is None) == (prefix_v is None),
        "prefix_v" if prefix_v is None else "prefix_k",
        None,
        "given with the other half of the prefix",
    )
    if prefix_k is not None and prefix_v is not None:
        _check_dims(prefix_k, "prefix_k", 3, exact=True)
        _check_shape("prefix_k", prefix_k, (prefix_k.shape[0], *k.shape[2:]), "[P, HKV, D]")
        _check_shape("prefix_v", prefix_v, tuple(prefix_k.shape), "prefix_k's")
    if query_rows is None:
        require(
            q.shape[1] == k.shape[1], "the number of rows of q", q.shape[1], f"k's, {k.shape[1]}"
        )
    else:
        _check_layout(q=q, query_rows=query_rows)
        _check_indices("query_rows", query_rows, tuple(q.shape[:2]), "the rows of q")


def check_scores(
    q: Tensor,
    k: Tensor,
    prefix_k: Tensor | None,
    logit: str,
    heads: str,
    weights: Tensor | None = None,
) -> None:
    """q [B, A, HQ, D], k [B, T, HKV, D], prefix_k [P, HKV, D] or None, two of the choices, weights
    [HQ] float32 or None.
    """
    _check_sized(q, "q", 4)
    _check_sized(k, "k", 4)
    _check_alike(q=q, k=k, prefix_k=prefix_k)
    require(q.shape[0] == k.shape[0], "the batch of q", q.shape[0], "k's")
    _check_heads("q", q, k)
    if prefix_k is not None:
        _check_dims(prefix_k, "prefix_k", 3, exact=True)
        _check_shape("prefix_k", prefix_k, (prefix_k.shape[0], *k.shape[2:]), "[P, HKV, D]")
    require(logit in LOGITS, "logit", repr(logit), f"one of {', '.join(LOGITS)}")
    require(heads in JOINS, "heads", repr(heads), f"one of {', '.join(JOINS)}")
    _check_layout(k=k, weights=weights)
    if weights is not None:
        _check_shape("weights", weights, (q.shape[2],), "a weight for each of q's heads")
        wide = weights.dtype == torch.float32
        require(wide, "the dtype of weights", weights.dtype, "torch.float32")


def check_selection(q: Tensor, k: Tensor, keep: int, first_row: int, last_row: int) -> None:
    """q [B, A, HQ, D] asks, `keep` of the rows [first_row, last_row) of k [B, T, HKV, D] stay."""
    check_scores(q, k, None, "logit", "max")
    check_budget(q, k, keep, first_row, last_row)


def check_budget(q: Tensor, k: Tensor, keep: int, first_row: int, last_row: int) -> None:
    """`check_selection` of a q and a k whose shapes were checked."""
    rows = k.shape[1]
    require(q.shape[1] <= rows, "the number of asking rows", q.shape[1], f"at most k's, {rows}")
    require(0 <= last_row <= rows, "last_row", last_row, f"in [0, {rows}]")
    require(0 <= first_row <= last_row, "first_row", first_row, f"in [0, last_row = {last_row}]")
    prunable = last_row - first_row
    require(0 <= keep <= prunable, "keep", keep, f"in [0, {prunable}], the prunable rows")


def check_votes(k: Tensor, votes: Tensor | None, reach: tuple[int, int]) -> None:
    """votes [B, T] float32 or None; rows before and behind."""
    _check_layout(k=k, votes=votes)
    if votes is not None:
        _check_shape("votes", votes, tuple(k.shape[:2]), "the rows of k")
        wide = votes.dtype == torch.promote_types(k.dtype, torch.float32)
        require(wide, "the dtype of votes", votes.dtype, "what score_rows returns")
    require(min(reach) >= 0, "reach", reach, "rows before and rows behind, 0 or more of each")


def check_units(
    q: Tensor,
    keys: Tensor,
    scales: Tensor | None,
    key_heads: Sequence[int],
    weights: Tensor,
    before: Tensor,
    starts: Tensor,
) -> None:
    """q [A, H, D], keys [N, G, D] like q or int8 with scales [N, G], H key_heads, weights [H] and
    before [A, H] float32, starts [U] int64.

    The values of starts are data: whoever made them checks them.
    """
    _check_sized(q, "q", 3)
    _check_sized(keys, "keys", 3)
    asking, heads, dim = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    _check_floating("q", q)
    _check_layout(q=q, keys=keys, scales=scales, weights=weights, before=before, starts=starts)
    _check_shape("keys", keys, (*keys.shape[:2], dim), "[N, G, D] with q's D")
    if scales is None:
        require(keys.dtype == q.dtype, "the dtype of keys", keys.dtype, f"q's, {q.dtype}")
    else:
        require(keys.dtype == torch.int8, "the dtype of keys", keys.dtype, "int8 beside scales")
        _check_floating("scales", scales)
        _check_shape("scales", scales, tuple(keys.shape[:2]), "[N, G]")
    require(len(key_heads) == heads, "the number of key_heads", len(key_heads), f"q's, {heads}")
    known = range(keys.shape[1])
    fits = all(head in known for head in key_heads)
    require(fits, "key_heads", tuple(key_heads), f"in [0, {keys.shape[1]}), the heads of keys")
    _check_indices("starts", starts, (len(starts),), "[U]")
    require(len(starts) > 0, "the length of starts", len(starts), "1 or more units")
    for name, x, shape in (("weights", weights, (heads,)), ("before", before, (asking, heads))):
        _check_shape(name, x, shape, "those of q's heads")
        require(x.dtype == wide, f"the dtype of {name}", x.dtype, str(wide))


def check_bias(
    k: Tensor, positions: Tensor, bias: Tensor | None, first_row: int, last_row: int
) -> None:
    """positions [B, T], bias [distances] float32 or None.

    How far apart the positions are is data: on the CPU it is compared with the bias's length; on a
    GPU that would mean waiting for it, so there a distance past the end reads the bias's last
    entry, and the caller who made the positions checks the length.
    """
    _check_layout(k=k, positions=positions, bias=bias)
    _check_indices("positions", positions, tuple(k.shape[:2]), "the rows of k")
    if bias is None:
        return
    _check_dims(bias, "bias", 1, exact=True)
    require(bias.dtype == torch.float32, "the dtype of bias", bias.dtype, "torch.float32")
    require(len(bias) > 0, "the length of bias", len(bias), "longer than the largest distance")
    if positions.device.type == "cpu" and last_row > first_row:
        distances = positions[:, -1:] - positions[:, first_row:last_row]
        far, near = int(distances.max()), int(distances.min())
        require(
            far < len(bias), "the length of bias", len(bias), f"above the largest distance, {far}"
        )
        require(near >= 0, "the smallest distance to the last position", near, "0 or more")


def check_merge(
    left: Tensor,
    right: Tensor,
    left_labels: Tensor,
    right_labels: Tensor,
    left_kept: Tensor,
    right_kept: Tensor,
    suffix: int,
) -> None:
    """left [B, RL, E], right [B, RR, E], labels [B, K, T], kept [B, RL] and [B, RR]."""
    _check_sized(left, "left", 3)
    _check_sized(right, "right", 3)
    _check_alike(left=left, right=right)
    _check_shape("right", right, (left.shape[0], right.shape[1], left.shape[2]), "[B, RR, E]")
    _check_sized(left_labels, "left_labels", 3)
    kinds = left_labels.shape[1]
    sides = (("left", left, left_labels, left_kept), ("right", right, right_labels, right_kept))
    for name, hidden, labels, kept in sides:
        _check_layout(left=left, **{f"{name}_labels": labels, f"{name}_kept": kept})
        _check_dims(labels, f"{name}_labels", 3, exact=True)
        wanted = (hidden.shape[0], kinds, labels.shape[2])
        _check_indices(f"{name}_labels", labels, wanted, "[B, K, T]")
        _check_indices(f"{name}_kept", kept, tuple(hidden.shape[:2]), f"the rows of {name}")
    shorter = min(left.shape[1], right.shape[1])
    require(0 <= suffix <= shorter, "suffix", suffix, f"in [0, {shorter}], the rows of a side")


def check_average(cache: Tensor, left_slots: Tensor, right_slots: Tensor) -> None:
    """cache [L, 2, slots, HKV, D]; left_slots, right_slots [B, S]."""
    _check_cache(cache)
    _check_dims(left_slots, "left_slots", 2, exact=True)
    for name, slots in (("left_slots", left_slots), ("right_slots", right_slots)):
        _check_layout(cache=cache, **{name: slots})
        _check_indices(name, slots, tuple(left_slots.shape), "[B, S]")


def check_gather(cache: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """cache [L, 2, slots, HKV, D], slots [T], keys and values [L, HKV, T, D]."""
    _check_cache(cache)
    _check_layout(cache=cache, slots=slots)
    _check_dims(slots, "slots", 1, exact=True)
    _check_indices("slots", slots, tuple(slots.shape), "[T]")
    _check_alike(cache=cache, keys=keys, values=values)
    layers, _, _, heads, dim = cache.shape
    for name, x in (("keys", keys), ("values", values)):
        _check_shape(name, x, (layers, heads, len(slots), dim), "[L, HKV, T, D]")
        require(x.is_contiguous(), f"the strides of {name}", x.stride(), "contiguous")


def _check_cache(cache: Tensor) -> None:
    """cache [L, 2, slots, HKV, D] with the heads of a slot side by side."""
    _check_dims(cache, "cache", 5, exact=True)
    _check_alike(cache=cache)
    require(cache.shape[1] == 2, "the second dimension of cache", cache.shape[1], "2")
    heads, dim = cache.shape[3:]
    require(
        heads == 1 or cache.stride(3) == dim, "the head stride of cache", cache.stride(3), f"{dim}"
    )


# What follows runs before every op, in decoding some hundred times a token: only what fails is put
# into words.


def _check_dims(x: Tensor, name: str, dims: int, exact: bool = False) -> None:
    if x.dim() < dims or (exact and x.dim() > dims):
        must = f"{dims}-dimensional" if exact else f"at least {dims}-dimensional"
        require(False, f"the shape of {name}", tuple(x.shape), must)


def _check_sized(x: Tensor, name: str, dims: int) -> None:
    _check_dims(x, name, dims, exact=True)
    if not x.numel():
        require(False, f"the shape of {name}", tuple(x.shape), "without empty dimensions")


def _check_shape(name: str, x: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if x.shape != shape:
        must = f"{tuple(shape)}, {meaning}"
        require(False, f"the shape of {name}", tuple(x.shape), must)


def _check_indices(name: str, x: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if x.dtype != torch.int64:
        require(False, f"the dtype of {name}", x.dtype, "torch.int64")
    _check_shape(name, x, shape, meaning)


def _check_heads(name: str, q: Tensor, k: Tensor) -> None:
    heads, groups = q.shape[-2], k.shape[2]
    require(heads > 0 and heads % groups == 0, f"{name}'s heads", heads, f"a multiple of {groups}")
    require(q.shape[-1] == k.shape[3], f"the head dim of {name}", q.shape[-1], f"k's, {k.shape[3]}")


def _check_floating(name: str, x: Tensor) -> None:
    if not x.dtype.is_floating_point:
        require(False, f"the dtype of {name}", x.dtype, "a floating-point type")


def _check_alike(**tensors: Tensor | None) -> None:
    """One dtype, one device and unit last strides; the first tensor is the yardstick."""
    _check_layout(**tensors)
    (first_name, first), *others = tensors.items()
    assert first is not None
    dtype = first.dtype
    _check_floating(first_name, first)
    for name, x in others:
        if x is not None and x.dtype != dtype:
            require(False, f"the dtype of {name}", x.dtype, f"{first_name}'s, {dtype}")


def _check_layout(**tensors: Tensor | None) -> None:
    """One device and unit last strides; the first tensor is the yardstick."""
    first_name, first = next(iter(tensors.items()))
    assert first is not None
    device = first.device
    for name, x in tensors.items():
        if x is None:
            continue
        if x.device != device:
            require(False, f"the device of {name}", x.device, f"{first_name}'s, {device}")
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            require(False, f"the last stride of {name}", x.stride(-1), "1")
