"""Question-guided compression, chunk after chunk (after FINCH, Corallo & Papotti, TACL 2024).

The text is read from its beginning to its end. Every chunk runs through all layers as `cache so far
‖ chunk ‖ suffix`; then each layer, for itself, keeps those rows of cache and chunk that the suffix
attends to most. A row's score is the suffix's softmax attention to it, summed over query heads and
suffix rows. FINCH also weighs the suffix's rows by how many keys each sees; these numbers differ by
less than the suffix's length, and all context is before all of them, so it is left out here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import HomerConfig
from ..context import EncodedContext, EncodeStats
from ..engine.stopwatch import Stopwatch
from ..engine.tree import build_plan
from ..kernels.reference import widen
from ..model.costs import layer_flops
from ..model.llama import Llama, Pass


@dataclass(frozen=True)
class Step:
    """One chunk: the context tokens [start, stop), and how many of all tokens so far are kept."""

    start: int
    stop: int
    kept: int


def lay_out_steps(context_len: int, budget: int, room: int) -> Iterator[Step]:
    """Chunks of nearly equal length, at most `room` tokens each, the first ones the longer.

    The budget is spent in proportion to what was read, so that every chunk loses an equal share;
    after the last one it is whole. A context within the budget loses nothing.
    """
    chunks = -(-context_len // room)
    part = -(-context_len // chunks)
    for start in range(0, context_len, part):
        stop = min(start + part, context_len)
        yield Step(start, stop, min(stop, max(1, budget * stop // context_len)))


@torch.no_grad()
def encode_sequentially(
    model: Llama, prefix: Tensor, context: Tensor, suffix: Tensor, config: HomerConfig
) -> EncodedContext:
    """Read chunks one after another into one cache of at most `config.target_len` rows.

    prefix, context, suffix: token ids [tokens]. The prefix is always kept, and the suffix reads the
    finished cache once more. Chunks have at most `config.max_chunk_len` tokens, prefix and suffix
    included, and fewer where the kept rows beside them would else be beyond the model's context
    limit. Positions are the rows' numbers. Layers keep different rows: `source_indices` and
    `pruned_at` (0 for dropped tokens) are those of the last layer.

    Raises `ValueError` where prefix and suffix leave the target or a chunk no room.
    """
    chunk_len, limit = config.chunk_len(model.config), model.config.context_limit
    affix = len(prefix) + len(suffix)
    budget = config.most_rows(model.config, affix) - affix
    total, length = affix + min(budget, len(context)), affix + len(context)
    layers = model.config.num_hidden_layers
    # The tree of one chunk that reads as much and leaves as much.
    tree = build_plan(len(prefix), len(context), len(suffix), layers, length, total, 0)
    room = len(context) if len(context) <= budget else min(chunk_len, limit - budget) - affix
    if room < 1:
        raise ValueError(
            f"prefix and suffix ({affix} tokens) and the {budget} rows of context that target_len "
            f"allows leave chunks of {chunk_len} no room within a context limit of {limit}; lower "
            "target_len or raise max_chunk_len."
        )
    watch = Stopwatch(model.device)
    before, middle, after = (x.to(model.device) for x in (prefix, context, suffix))
    steps = list(lay_out_steps(len(context), budget, room))
    held = [0, *(step.kept for step in steps)]  # before each step, and after the last
    widths = [kept + step.stop - step.start for kept, step in zip(held, steps, strict=False)]
    cache = model.new_cache(affix + max(widths))
    if len(prefix):
        model.forward(before, cache)
    flops = layer_flops(model.config, 0, len(prefix))
    sources = torch.empty(0, dtype=torch.int64, device=model.device)
    for kept, step in zip(held, steps, strict=False):
        filled = len(prefix) + kept
        tokens = torch.cat([middle[step.start : step.stop], after])
        rows = _read(model, cache, tokens, filled, len(prefix), len(suffix), step.kept)
        sources = torch.cat([sources, torch.arange(step.start, step.stop, device=model.device)])
        sources = sources[rows - len(prefix)]
        flops += layer_flops(model.config, filled, len(tokens))
    logits = model.forward(after, cache, filled=total - len(suffix))
    flops += layer_flops(model.config, total - len(suffix), len(suffix))
    whole = torch.arange(length, device=model.device)
    source_indices = torch.cat([whole[: len(prefix)], sources + len(prefix), whole[-len(suffix) :]])
    pruned_at = torch.zeros(length, dtype=torch.int8, device=model.device)
    pruned_at[source_indices] = -1
    keys, values = (half.transpose(1, 2).contiguous() for half in cache[:, :, :total].unbind(1))
    watch.mark()
    seconds = sum(watch.laps())
    return EncodedContext(
        keys=keys,
        values=values,
        positions=whole[:total].clone(),
        source_indices=source_indices,
        token_ids=torch.cat([before, middle, after]),
        pruned_at=pruned_at,
        next_position=total,
        logits=logits,
        plan=tree,
        stats=EncodeStats(length, total, seconds, (seconds,), flops * layers, cache.shape[2]),
        model=model.fingerprint,
    )


def _read(
    model: Llama, cache: Tensor, tokens: Tensor, filled: int, prefix: int, suffix: int, keep: int
) -> Tensor:
    """Run `chunk ‖ suffix` after the first `filled` rows of the cache, and keep in every layer the
    prefix and the best `keep` of the context's rows, moved together behind it.

    cache: [L, 2, rows, HKV, D]; tokens: [T]. Returns the rows that the last layer kept, [keep],
    ascending.
    """
    rows = torch.arange(filled, filled + len(tokens), device=model.device)[None]
    end = filled + len(tokens) - suffix
    rotary = model.rotary(filled + len(tokens))
    run = Pass(model, rows, cache, rows, filled, rotary)
    hidden = model.embed(tokens[None])
    chosen = rows[0, :0]
    for index in range(model.config.num_hidden_layers):
        q, k, v = run.project(index, hidden)
        hidden = run.attend(index, hidden, q, k, v)
        run.feed_forward_(index, hidden)
        q = q[:, -suffix:]
        scores = attention_received(q[0], cache[index, 0, : end + suffix])[prefix:end]
        order = scores.argsort(descending=True, stable=True)
        chosen = prefix + order[:keep].sort().values
        keys, values = cache[index]
        places = torch.arange(prefix, prefix + keep, device=model.device)
        keys[prefix : prefix + keep] = rotate_back(model, keys[chosen], chosen - places, rotary)
        values[prefix : prefix + keep] = values[chosen]
    return chosen


def attention_received(q: Tensor, k: Tensor) -> Tensor:
    """The causal softmax attention of the last rows to all rows, summed over heads and queries.

    q: [S, HQ, D], the last S rows' rotated queries; k: [T, HKV, D], all rows' rotated keys. Returns
    [T], at least float32, with the sum S · HQ.
    """
    count, heads, dim = q.shape
    grouped = widen(q).unflatten(1, (k.shape[1], heads // k.shape[1]))
    logits = torch.einsum("shgd,thd->hgst", grouped, widen(k)) * dim**-0.5
    columns = torch.arange(len(k), device=k.device)
    unseen = columns > columns[-count:, None]
    return logits.masked_fill_(unseen, -torch.inf).softmax(-1).sum((0, 1, 2))


def rotate_back(model: Llama, keys: Tensor, shift: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Keys as they would be at smaller positions, rotated in at least float32.

    keys: [R, HKV, D] after RoPE; shift: [R], by how much each one's position becomes less; rotary:
    cos, sin [more than the largest shift, D/2] float32.
    """
    cos, sin = rotary
    # At position 0 nothing turns: its cosine is the scaling that some RoPEs have, which the keys
    # have already.
    turn, back = cos[shift] / cos[0], -sin[shift] / cos[0]
    turned = widen(keys)[None].contiguous()
    rows = torch.arange(len(shift), device=keys.device)[None]
    model.ops.apply_rotary_(turned, rows, turn, back)
    return turned[0].to(keys.dtype)
