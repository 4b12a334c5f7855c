"""Every op of the method in plain PyTorch.

These are the definitions that the Triton kernels are tested against, and what runs on CPUs. The
launchers of the same names in `kernels` list the arguments, results and errors of both.

Sizes in the docstrings: B chunks of equal shape run as a batch. T is the number of rows (tokens) of
a chunk, R of selected rows, A of asking rows, P of prefix rows. HQ query heads and HKV key heads
have D elements. E is the hidden size, L the number of layers. Rows, positions, source indices and
slots are int64. Functions whose name ends in an underscore write into an argument.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import (
    check_attention,
    check_average,
    check_bias,
    check_gather,
    check_merge,
    check_norm,
    check_rotary,
    check_rotary_and_store,
    check_scores,
    check_selection,
    check_silu_mul,
    check_units,
    check_votes,
    checked_by,
)
from .products import add_linear_ as add_linear_
from .products import gated_linear as gated_linear
from .products import linear as linear

# How many queries attend at once when they are only some of the rows. This bounds the mask to
# QUERY_BLOCK x keys.
QUERY_BLOCK = 256
# How many numbers are rotated at once.
ROTATED_AT_ONCE = 2**20
# Up to NORMED_AT_ONCE numbers, PyTorch's norm is faster than one with fewer copies in float32. Up
# to FEW_NORMED, one with fewer operations is faster still on a CPU.
NORMED_AT_ONCE, FEW_NORMED = 2**18, 2**13
# How many logits of stored tokens are computed at once: they stay in a CPU's cache.
STORED_LOGITS = 2**17


def widen(x: Tensor) -> Tensor:
    """x in float32, or as it is if its dtype is wider. Sums are computed in this precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@checked_by(lambda x, weight, eps: check_norm(x, None, weight))
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm: `x / sqrt(mean(x²) + eps) * weight` over the last dimension.

    The mean and the division are computed in at least float32 (Zhang & Sennrich 2019).
    """
    if x.numel() <= FEW_NORMED and x.device.type == "cpu":
        # Beside its negative, x has mean 0, and its mean square is the variance. So one layer norm
        # does what otherwise takes PyTorch ten operations.
        both, weights = torch.cat([x, -x], dim=-1), torch.cat([weight, weight])
        return F.layer_norm(both, weights.shape, weights, None, eps)[..., : x.shape[-1]]
    if x.numel() <= NORMED_AT_ONCE:
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    scale = torch.rsqrt(length.square() / x.shape[-1] + eps)
    return (x * scale).to(x.dtype).mul_(weight)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum with a residual, and its norm: `(x + residual, rms_norm(x + residual))`."""
    check_norm(x, residual, weight)
    total = x + residual
    return total, rms_norm(total, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """The gated activation of Llama's MLP: `silu(gate) * up` (Shazeer 2020, SwiGLU)."""
    check_silu_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@checked_by(partial(check_rotary, "x"))
def apply_rotary_(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate queries or keys in place by their positions (RoPE, Su et al. 2021).

    Element i of a head is paired with element i + D/2, as in Llama.
    """
    _rotate_(x, cos[positions][:, :, None], sin[positions][:, :, None])


def _rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate x in place.

    x: [B, T, H, D]; cos, sin: [B, T, 1, D/2], in the dtype to compute in, or a wider one.
    """
    if x.numel() > ROTATED_AT_ONCE and len(x) * x.shape[1] > 1:
        # Some rows at a time, so that they stay in the processor's caches.
        rows = max(1, ROTATED_AT_ONCE // x[0, 0].numel())
        for whole in zip(x.split(1), cos.split(1), sin.split(1), strict=True):
            for part in zip(*(of.split(rows, dim=1) for of in whole), strict=True):
                _rotate_(*part)
        return
    if x.dtype.itemsize < cos.dtype.itemsize:
        # Widened once, or every operation would do so again.
        wide = x.to(cos.dtype)
        _rotate_(wide, cos, sin)
        x.copy_(wide)
        return
    first, second = x.chunk(2, dim=-1)
    turned = first * cos
    turned.addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(turned)


@checked_by(check_rotary_and_store)
def rotary_and_store_(
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
    """Rotate q and k in place (RoPE), then write k and v to their slots of one layer's cache."""
    cos, sin = cos[positions][:, :, None], sin[positions][:, :, None]
    for x in _side_by_side(q, k):
        _rotate_(x, cos, sin)
    keys[slots] = k
    values[slots] = v


def _side_by_side(q: Tensor | None, k: Tensor) -> tuple[Tensor, ...]:
    """q and k as one tensor [B, T, HQ + HKV, D], if they are neighbouring views of one product.

    Otherwise both, or only k if there is no q.
    """
    if q is None:
        return (k,)
    heads = q.shape[2]
    if (
        k.stride() != q.stride()
        or k.storage_offset() - q.storage_offset() != heads * q.stride(2)
        or k.untyped_storage().data_ptr() != q.untyped_storage().data_ptr()
    ):
        return q, k
    shape = (*q.shape[:2], heads + k.shape[2], q.shape[3])
    return (q.as_strided(shape, q.stride(), q.storage_offset()),)


@checked_by(check_attention)
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    query_rows: Tensor | None = None,
) -> Tensor:
    """Exact softmax attention over a shared prefix and a chunk, causal by row (token).

    Row i sees the whole prefix and the chunk's rows 0 to i. The scale is 1/sqrt(D). A query head
    reads the key head of its group.
    """
    batch, queries, chunk = k.shape[0], q.shape[1], k.shape[1]
    prefix = 0 if prefix_k is None else len(prefix_k)
    if queries == 1 and query_rows is not None:
        return _attend_visible(q, k, v, prefix_k, prefix_v, query_rows)
    if prefix and batch > 1:  # one chunk at a time copies its keys to join them with the prefix
        at = [None] * batch if query_rows is None else query_rows.split(1)
        chunks = zip(q.split(1), k.split(1), v.split(1), at, strict=True)
        return torch.cat(
            [causal_attention(x, y, z, prefix_k, prefix_v, rows) for x, y, z, rows in chunks]
        )
    if prefix_k is not None and prefix_v is not None and prefix:
        k = torch.cat([prefix_k[None], k], dim=1)
        v = torch.cat([prefix_v[None], v], dim=1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if query_rows is None and prefix <= queries:
        # PyTorch aligns a causal mask with the first key; empty queries in front align it with the
        # last instead.
        padded = F.pad(q, (0, 0, prefix, 0)) if prefix else q
        out = F.scaled_dot_product_attention(padded, k, v, is_causal=True, enable_gqa=True)
        return out[:, :, prefix:].transpose(1, 2)

    if query_rows is None:
        query_rows = torch.arange(chunk, device=k.device).expand(batch, -1)
    out = torch.empty_like(q)
    columns = torch.arange(prefix + chunk, device=k.device)
    for start in range(0, queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, queries)
        # Rows ascend, so later queries need later rows. This bounds what the block can see.
        seen = prefix + chunk - (queries - stop)
        visible = columns[:seen] <= (query_rows[:, start:stop] + prefix)[:, None, :, None]
        out[:, :, start:stop] = F.scaled_dot_product_attention(
            q[:, :, start:stop],
            k[:, :, :seen],
            v[:, :, :seen],
            attn_mask=visible,
            enable_gqa=True,
        )
    return out.transpose(1, 2)


def _attend_visible(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    query_rows: Tensor,
) -> Tensor:
    """`_attend_one`, whatever rows hold that its queries do not see: no weight times NaN is 0."""
    if k.device.type != "cpu":
        v = v.masked_fill(~_visible(query_rows, k.shape[1]).transpose(1, 3), 0.0)
        return _attend_one(q, k, v, prefix_k, prefix_v, query_rows)
    out = _attend_one(q, k, v, prefix_k, prefix_v, query_rows)
    for number in (~out.isfinite().flatten(1).all(1)).nonzero()[:, 0].tolist():
        one, seen = slice(number, number + 1), int(query_rows[number]) + 1
        only = q[one], k[one, :seen], v[one, :seen], prefix_k, prefix_v, query_rows[one]
        out[one] = _attend_one(*only)
    return out


def _attend_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    query_rows: Tensor,
) -> Tensor:
    """`causal_attention` for one query per chunk, as in decoding.

    No key is copied, neither to join it with the prefix nor for the heads that share it. A prefix
    that many chunks share is multiplied once for all.
    """
    batch, _, heads, dim = q.shape
    kv_heads, chunk = k.shape[2], k.shape[1]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, dim)
    on_cpu = k.device.type == "cpu"
    if prefix_k is None or prefix_v is None or not len(prefix_k):
        # On a CPU it costs nothing to look whether anything is hidden.
        sees_all = on_cpu and int(query_rows.min()) >= chunk - 1
        mask = None if sees_all else _visible(query_rows, chunk)
        if on_cpu and grouped.shape[2] == 1 and k.dtype == torch.bfloat16:
            # PyTorch multiplies two such rows faster than a single one.
            grouped = F.pad(grouped, (0, 0, 0, 1))
        turned = k.transpose(1, 2), v.transpose(1, 2)
        out = F.scaled_dot_product_attention(grouped, *turned, attn_mask=mask)
        return out[:, :, : heads // kv_heads].reshape(batch, 1, heads, dim)
    visible, prefix = _visible(query_rows, chunk), len(prefix_k)
    grouped = widen(grouped) * dim**-0.5
    side_by_side = grouped.transpose(0, 1).flatten(1, 2)
    shared = side_by_side @ widen(prefix_k).permute(1, 2, 0)
    own = (grouped @ widen(k).permute(0, 2, 3, 1)).masked_fill(~visible, -torch.inf)
    shared = shared.unflatten(1, (batch, -1)).transpose(0, 1)
    weights = torch.cat([shared, own], dim=-1).softmax(-1)
    on_prefix = weights[..., :prefix].transpose(0, 1).flatten(1, 2)
    mixed = on_prefix @ widen(prefix_v).transpose(0, 1)
    mixed = mixed.unflatten(1, (batch, -1)).transpose(0, 1)
    out = mixed + weights[..., prefix:] @ widen(v).transpose(1, 2)
    return out.to(q.dtype).reshape(batch, 1, heads, dim)


def _visible(query_rows: Tensor, chunk: int) -> Tensor:
    """Whether each chunk's one query sees each of the chunk's rows: [B, 1] -> [B, 1, 1, T]."""
    return (torch.arange(chunk, device=query_rows.device) <= query_rows)[:, None, None]


def score_rows(
    q: Tensor,
    k: Tensor,
    prefix_k: Tensor | None = None,
    logit: str = "logit",
    heads: str = "max",
    weights: Tensor | None = None,
) -> Tensor:
    """Score each row (token) of a chunk by the attention that the asking rows pay to it.

        score[i] = join over heads h of (w_h · mean over asking rows of f(q · k_i / sqrt(D)))

    One asking row with "logit" and "max" is the paper's score (HOMER, section 3.2). Several with
    "softmax" and "sum" are the votes of SnapKV (Li et al. 2024). The scores have k's dtype where it
    is wider than float32, and are NaN where a head has NaN.
    """
    check_scores(q, k, prefix_k, logit, heads, weights)
    _, asking, query_heads, dim = q.shape
    group = query_heads // k.shape[2]
    prefix = 0 if prefix_k is None else len(prefix_k)
    joined = None
    for head in range(k.shape[2]):  # one at a time bounds the logits' memory
        queries = widen(q[:, :, head * group : (head + 1) * group]).flatten(1, 2)
        # Scaled afterwards: whole numbers, and ties between them, stay exact until then.
        logits = queries @ widen(k[:, :, head]).transpose(1, 2) * dim**-0.5
        if logit != "logit":
            seen = logits
            if prefix_k is not None and prefix:
                before = queries @ widen(prefix_k[:, head]).T * dim**-0.5
                seen = torch.cat([before, logits], dim=2)
            logits = logits - seen.logsumexp(2, keepdim=True)
            if logit == "softmax":
                logits = logits.exp_()
        means = logits.unflatten(1, (asking, group)).mean(1)
        if weights is not None:
            means = means * weights[head * group : (head + 1) * group, None]
        own = means.amax(1) if heads == "max" else means.sum(1)
        if joined is None:
            joined = own
        else:
            joined = torch.maximum(joined, own) if heads == "max" else joined + own
    assert joined is not None
    return joined


def score_and_select(
    q_last: Tensor,
    k: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    keep: int,
    first_row: int,
    last_row: int,
) -> tuple[Tensor, Tensor]:
    """Keep the rows (tokens) of a chunk that its last row attends to most: the paper's selection.

    Of the rows [first_row, last_row), the `keep` most significant stay. All rows outside that range
    stay too. The significance of row i (HOMER, sections 3.2 and 3.3) is

        score_rows(q_last[:, None], k)[i] - bias[positions[-1] - positions[i]]

    NaN counts as the lowest. Of equal ones, the later row stays.
    """
    check_selection(q_last[:, None], k, keep, first_row, last_row)
    check_bias(k, positions, bias, first_row, last_row)
    scores = score_rows(q_last[:, None], k)[:, first_row:last_row]
    if bias is not None:
        scores = scores - bias[positions[:, -1:] - positions[:, first_row:last_row]]
    return select_rows(_lowest_if_nan(scores), k.shape[1], keep, first_row, last_row)


def vote_and_select(
    q: Tensor,
    k: Tensor,
    prefix_k: Tensor | None,
    votes: Tensor | None,
    keep: int,
    first_row: int,
    last_row: int,
    logit: str = "softmax",
    heads: str = "sum",
    reach: tuple[int, int] = (0, 0),
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the rows (tokens) of a chunk whose neighbourhoods the asking rows attend to most.

    Of the rows [first_row, last_row), the `keep` most significant stay. All rows outside that range
    stay too. The significance of row i is the largest value of

        score_rows(q, k, prefix_k, logit, heads, weights)[j] + votes[j]

    over the rows j of the range that have i as their neighbour (`spread`). NaN counts as the
    lowest. Of equal ones, the later row stays.
    """
    check_selection(q, k, keep, first_row, last_row)
    check_votes(k, votes, reach)
    scores = score_rows(q, k, prefix_k, logit, heads, weights)
    if votes is not None:
        scores = scores + votes
    best = spread(scores[:, first_row:last_row], reach)
    return *select_rows(best, k.shape[1], keep, first_row, last_row), scores


def spread(scores: Tensor, reach: tuple[int, int]) -> Tensor:
    """Max-pooling: the best score among the rows that have a row as their neighbour.

    scores: [B, T]; reach: how many rows before and after a row are its neighbours, beside itself.
    NaN counts as the lowest. Returns [B, T].
    """
    scores = _lowest_if_nan(scores)
    before, behind = reach
    if not scores.shape[1]:
        return scores
    padded = F.pad(scores[:, None], (behind, before), value=float("-inf"))
    return F.max_pool1d(padded, before + behind + 1, 1)[:, 0]


def _lowest_if_nan(scores: Tensor) -> Tensor:
    return scores.masked_fill(scores.isnan(), float("-inf"))


def select_rows(
    scores: Tensor, rows: int, keep: int, first_row: int, last_row: int
) -> tuple[Tensor, Tensor]:
    """The kept and the dropped rows, for given scores.

    Of the rows [first_row, last_row), the `keep` with the best scores stay; of equal ones, the
    later. All rows outside that range stay.

    Args:
        scores: [B, last_row - first_row].
        rows: Rows of the chunk.
        keep: How many rows of the range stay.
        first_row: The first row of the range.
        last_row: The row after the range.

    Returns:
        The kept rows [B, rows - dropped] and the dropped ones [B, dropped], both ascending.
    """
    drop = last_row - first_row - keep
    order = scores.argsort(dim=1, stable=True)
    dropped = first_row + order[:, :drop].sort(dim=1).values
    selected = first_row + order[:, drop:].sort(dim=1).values
    all_rows = torch.arange(rows, device=scores.device).expand(len(scores), -1)
    return torch.cat([all_rows[:, :first_row], selected, all_rows[:, last_row:]], dim=1), dropped


def prune_and_concatenate(
    left: Tensor,
    right: Tensor,
    left_labels: Tensor,
    right_labels: Tensor,
    left_kept: Tensor,
    right_kept: Tensor,
    suffix: int,
) -> tuple[Tensor, Tensor]:
    """Join two pruned siblings of the merge tree into their parent's chunk (HOMER, section 3.1).

    The parent's rows (tokens) are left's context, right's context, and the mean of both suffixes,
    which keeps right's labels.
    """
    check_merge(left, right, left_labels, right_labels, left_kept, right_kept, suffix)
    kinds = left_labels.shape[1]
    left_labels = left_labels.gather(2, left_kept[:, None].expand(-1, kinds, -1))
    right_labels = right_labels.gather(2, right_kept[:, None].expand(-1, kinds, -1))
    end, right_end = left.shape[1] - suffix, right.shape[1] - suffix
    mean = (left[:, end:] + right[:, right_end:]) / 2
    hidden = torch.cat([left[:, :end], right[:, :right_end], mean], dim=1)
    return hidden, torch.cat([left_labels[:, :, :end], right_labels], dim=2)


def average_affix_(cache: Tensor, left_slots: Tensor, right_slots: Tensor) -> None:
    """Average the keys and values of two siblings' suffixes, in place (HOMER, section 3.1)."""
    check_average(cache, left_slots, right_slots)
    cache[:, :, right_slots] = (cache[:, :, left_slots] + cache[:, :, right_slots]) / 2


def gather_cache_(cache: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Copy the keys and values of some slots into a contiguous cache, in place."""
    check_gather(cache, slots, keys, values)
    for layer, (own_keys, own_values) in enumerate(zip(keys, values, strict=True)):
        own_keys.copy_(cache[layer, 0, slots].transpose(0, 1))
        own_values.copy_(cache[layer, 1, slots].transpose(0, 1))


def score_units(
    q: Tensor,
    keys: Tensor,
    scales: Tensor | None,
    key_heads: Sequence[int],
    weights: Tensor,
    before: Tensor,
    starts: Tensor,
) -> Tensor:
    """Score the units (sentences) of a stored text by the attention that the asking rows pay to it.

        score[a, u] = max over tokens i of unit u of
                      sum over heads h of (w_h · softmax_i(q_a,h · k_i / sqrt(D)))

    Each head's softmax is over all stored tokens and what the asking row sees besides.
    """
    check_units(q, keys, scales, key_heads, weights, before, starts)
    asking, heads, dim = q.shape
    tokens, step = len(keys), max(STORED_LOGITS // (asking * heads), 16)
    unit_of = torch.zeros(tokens, dtype=torch.int64, device=q.device)
    unit_of[starts[1:]] = 1
    unit_of = unit_of.cumsum(0)
    queries = widen(q).transpose(0, 1) * dim**-0.5  # [H, A, D]
    totals = before.T  # [H, A]

    def logits(start: int) -> Tensor:
        own = keys[start : start + step].to(queries.dtype)
        if scales is not None:
            own *= scales[start : start + step, :, None]
        return queries @ own.permute(1, 2, 0)[list(key_heads)]  # [H, A, block]

    for start in range(0, tokens, step):
        totals = torch.logaddexp(totals, logits(start).logsumexp(2))
    scores = torch.zeros(asking, len(starts), dtype=queries.dtype, device=q.device)
    for start in range(0, tokens, step):
        shares = logits(start).sub_(totals[:, :, None]).exp_()
        joined = torch.tensordot(weights.to(shares.dtype), shares, 1)  # [A, block]
        units = unit_of[start : start + step].expand(asking, -1)
        scores.scatter_reduce_(1, units, joined, "amax")
    return scores
