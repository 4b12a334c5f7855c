"""HOMER again, as naively as it can be written: what the fast implementation is compared with.

Breadth first; every chunk holds its own copy of the prefix; attention is an explicit n x n softmax
under a mask, over all rows in every layer; every node owns its keys and values, and a prune copies
those it keeps. None of the exact shortcuts is taken: not the prefix computed once, not scoring
before attending, not slots in place of copies, not the last row alone at the root. Agreement with
it is therefore the proof that each of them changes nothing.

Nothing here is shared with homer_triton; the weights are a transformers state dict, computed with
in its own dtype.
"""

from dataclasses import dataclass, replace

import torch
from oracle_tree import Settings, Tree, lay_out
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Chunk:
    """A node's tokens: hidden [n, E], keys and values of each layer [n, HKV, D], positions and
    sources [n].
    """

    hidden: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    positions: Tensor
    sources: Tensor


@dataclass(frozen=True)
class Encoding:
    """keys, values: [L, HKV, T', D]; positions, sources: [T']; logits: [V]; pruned_at: the
    height at which each input token went, -1 for kept ones.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    sources: Tensor
    next_position: int
    logits: Tensor
    pruned_at: list[int]


class Oracle:
    """The method over the weights of a transformers Llama with default RoPE, in their own dtype; or
    of another family, whose biases, head norms and fused matrices the weights' names show.
    """

    def __init__(self, hf_model: PreTrainedModel) -> None:
        self.weights = {name: weight.detach() for name, weight in hf_model.state_dict().items()}
        config = hf_model.config
        self.layers: int = config.num_hidden_layers
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.dim: int = getattr(config, "head_dim", config.hidden_size // self.heads)
        self.rotated: list[int] = getattr(config, "no_rope_layers", [1] * self.layers)
        self.eps: float = config.rms_norm_eps
        self.theta: float = config.rope_parameters["rope_theta"]

    def encode(
        self, prefix: list[int], context: list[int], suffix: list[int], settings: Settings
    ) -> Encoding:
        """Run the whole tree, one height after the other."""
        before, after = len(prefix), len(suffix)
        in_chunks = _with_window(settings, settings.max_chunk_len - before - after)
        tree = lay_out(before, len(context), after, self.layers, settings)
        chunks: list[Chunk] = []
        pruned_at = [-1] * (before + len(context) + after)
        # By source, what the nodes so far gave it, where that counts.
        given = torch.zeros(len(pruned_at), dtype=torch.float64)
        for height, nodes in enumerate(tree.heights):
            if height == 0:
                chunks = [self._leaf(prefix, context, suffix, tree, i) for i in range(len(nodes))]
            else:
                chunks = [
                    _merge([chunks[i] for i in node.children], before, after) for node in nodes
                ]
            merged = chunks
            chunks = [
                self._run(chunk, tree.layers[height], node.target, before, after, in_chunks, given)
                for chunk, node in zip(chunks, nodes, strict=True)
            ]
            for whole, pruned in zip(merged, chunks, strict=True):
                for source in {*whole.sources.tolist()} - {*pruned.sources.tolist()}:
                    pruned_at[source] = height
        root = chunks[0]
        next_position = int(root.positions[-1]) + 1
        if settings.recompute == "suffix":
            root = self._recompute(root, suffix)
        elif settings.recompute == "all":
            tokens = [*prefix, *context, *suffix]
            if len(tokens) <= settings.target_len:  # there is nothing to choose
                pruned_at = [-1] * len(tokens)
                root = replace(root, sources=torch.arange(len(tokens)))
            elif settings.layers in ("levels", "tree") and len(tree.heights) > 1:
                chosen = self._choose_from_all(len(root.sources), before, after, in_chunks, given)
                for source, height in enumerate(pruned_at):
                    if source in chosen:
                        pruned_at[source] = -1
                    elif height == -1:
                        pruned_at[source] = len(tree.heights) - 1
                root = replace(root, sources=torch.tensor(chosen))
            if len(root.sources) > settings.target_len:
                fewer = self._narrow(tokens, root.sources, before, after, settings)
                for source in {*root.sources.tolist()} - {*fewer.tolist()}:
                    pruned_at[source] = len(tree.heights) - 1
                root = replace(root, sources=fewer)
            root = self._plain([tokens[i] for i in root.sources.tolist()], root.sources)
            next_position = len(root.sources)
        return Encoding(
            torch.stack(root.keys).transpose(1, 2),
            torch.stack(root.values).transpose(1, 2),
            root.positions,
            root.sources,
            next_position,
            self._logits(root.hidden[-1]),
            pruned_at,
        )

    def _choose_from_all(
        self, count: int, before: int, after: int, settings: Settings, given: Tensor
    ) -> list[int]:
        """As many sources as the root kept: those that the nodes gave most, neighbours included, of
        equal ones the later, and the affixes.
        """
        best = _widen(given, settings, before, after).tolist()
        context = range(before, len(best) - after)
        keep = sorted(context, key=lambda source: (best[source], source))
        keep = keep[len(context) - (count - before - after) :]
        return sorted([*range(before), *keep, *range(len(best) - after, len(best))])

    def _narrow(
        self, tokens: list[int], sources: Tensor, before: int, after: int, settings: Settings
    ) -> Tensor:
        """The sources that are left when the tokens at `sources` are one chunk from the start."""
        rows = torch.arange(len(sources))
        hidden = self._embed([tokens[i] for i in sources.tolist()])
        layers, given = range(settings.layers_tree or self.layers), torch.zeros(len(rows)).double()
        chunk = Chunk(hidden, [], [], rows, rows)
        target = settings.target_len
        anew = _with_window(settings, len(sources) - before - after)
        return sources[self._run(chunk, layers, target, before, after, anew, given).sources]

    def _plain(self, tokens: list[int], sources: Tensor) -> Chunk:
        """The ordinary model over an ordinary prompt."""
        rows = torch.arange(len(tokens))
        chunk = Chunk(self._embed(tokens), [], [], rows, sources)
        for layer in range(self.layers):
            q, k, v = self._project(layer, chunk.hidden, rows)
            hidden = self._mlp(layer, self._attend(layer, chunk.hidden, q, k, v))
            chunk = replace(chunk, hidden=hidden, keys=[*chunk.keys, k], values=[*chunk.values, v])
        return chunk

    def calibrate(self, segments: list[list[int]]) -> Tensor:
        """The bias [L, distance]: the mean score at each distance from the last token, over
        segments of one length.
        """
        totals = []
        for segment in segments:
            rows = torch.arange(len(segment))
            chunk = Chunk(self._embed(segment), [], [], rows, rows)
            scores = []
            for layer in range(self.layers):
                q, k, v = self._project(layer, chunk.hidden, rows)
                scores.append(self._scores(q[-1:], k, "logit", "max").flip(0))
                chunk = replace(
                    chunk, hidden=self._mlp(layer, self._attend(layer, chunk.hidden, q, k, v))
                )
            totals.append(torch.stack(scores))
        return torch.stack(totals).mean(0)

    def _leaf(
        self, prefix: list[int], context: list[int], suffix: list[int], tree: Tree, index: int
    ) -> Chunk:
        start = index * tree.leaf_context
        rows = range(start, start + tree.leaves[index])
        positions = [
            *range(len(prefix)),
            *(len(prefix) + i for i in range(len(rows))),
            *(len(prefix) + tree.leaf_context + i for i in range(len(suffix))),
        ]
        sources = [
            *range(len(prefix)),
            *(len(prefix) + i for i in rows),
            *(len(prefix) + len(context) + i for i in range(len(suffix))),
        ]
        hidden = self._embed([*prefix, *(context[i] for i in rows), *suffix])
        return Chunk(hidden, [], [], torch.tensor(positions), torch.tensor(sources))

    def _run(
        self,
        chunk: Chunk,
        layers: range,
        target: int,
        before: int,
        after: int,
        settings: Settings,
        given: Tensor,
    ) -> Chunk:
        """A node's layers, the prune within the last of them included."""
        votes = torch.zeros(len(chunk.hidden), dtype=chunk.hidden.dtype)
        for layer in layers:
            q, k, v = self._project(layer, chunk.hidden, chunk.positions)
            if settings.layers in ("all", "tree") or layer == layers[-1]:
                asking, weights = q[-settings.asking :], None
                if settings.weights is not None:
                    weights = settings.weights[layer]
                votes = votes + self._scores(asking, k, settings.logit, settings.heads, weights)
            if settings.layers in ("levels", "tree") and layer == layers[-1]:
                given[chunk.sources] = votes = votes + given[chunk.sources]
            hidden = self._attend(layer, chunk.hidden, q, k, v)
            chunk = replace(chunk, hidden=hidden, keys=[*chunk.keys, k], values=[*chunk.values, v])
            if layer == layers[-1] and len(hidden) > target:
                scores = votes
                if settings.bias is not None:
                    scores = scores - settings.bias[layer][chunk.positions[-1] - chunk.positions]
                scores = _widen(scores, settings, before, after)
                chunk = _prune(chunk, scores, target, before, after)
            chunk = replace(chunk, hidden=self._mlp(layer, chunk.hidden))
        return chunk

    def _recompute(self, root: Chunk, suffix: list[int]) -> Chunk:
        """The suffix once more, over the cache without its rows."""
        kept = len(root.hidden) - len(suffix)
        hidden = self._embed(suffix)
        keys, values = [], []
        for layer in range(self.layers):
            q, k, v = self._project(layer, hidden, root.positions[kept:])
            keys.append(torch.cat([root.keys[layer][:kept], k]))
            values.append(torch.cat([root.values[layer][:kept], v]))
            hidden = self._mlp(layer, self._attend(layer, hidden, q, keys[-1], values[-1]))
        return replace(root, hidden=hidden, keys=keys, values=values)

    def _embed(self, tokens: list[int]) -> Tensor:
        return self.weights["model.embed_tokens.weight"][torch.tensor(tokens, dtype=torch.int64)]

    def _project(
        self, layer: int, hidden: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [n, HQ, D] and k [n, HKV, D] after RoPE, v [n, HKV, D]."""
        name = f"model.layers.{layer}"
        x = self._norm(hidden, f"{name}.input_layernorm")
        name = f"{name}.self_attn"
        if f"{name}.qkv_proj.weight" in self.weights:
            both = x @ self.weights[f"{name}.qkv_proj.weight"].T
        else:
            both = torch.cat([self._linear(x, f"{name}.{part}_proj") for part in "qkv"], dim=1)
        groups = [self.heads, self.kv_heads, self.kv_heads]
        q, k, v = both.unflatten(1, (-1, self.dim)).split(groups, dim=1)
        if f"{name}.q_norm.weight" in self.weights:
            q, k = self._norm(q, f"{name}.q_norm"), self._norm(k, f"{name}.k_norm")
        if not self.rotated[layer]:
            return q, k, v
        # Angles in float32, as transformers has them in every dtype.
        frequencies = 1.0 / self.theta ** (torch.arange(0, self.dim, 2).float() / self.dim)
        angles = positions[:, None].float() * frequencies
        cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)

        def rotate(y: Tensor) -> Tensor:
            first, second = y[..., : self.dim // 2], y[..., self.dim // 2 :]
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

        return rotate(q), rotate(k), v

    def _attend(self, layer: int, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The residual plus attention of q's rows, which are the last of k's and v's."""
        q_rows, k_rows = len(q), len(k)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        logits = torch.einsum("qhd,khd->hqk", q, k) / self.dim**0.5
        hidden_keys = torch.ones(q_rows, k_rows, dtype=torch.bool).triu(k_rows - q_rows + 1)
        weights = logits.masked_fill(hidden_keys, float("-inf")).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", weights, v).flatten(1)
        return hidden + mixed @ self.weights[f"model.layers.{layer}.self_attn.o_proj.weight"].T

    def _mlp(self, layer: int, hidden: Tensor) -> Tensor:
        name = f"model.layers.{layer}"
        x = self._norm(hidden, f"{name}.post_attention_layernorm")
        down = self.weights[f"{name}.mlp.down_proj.weight"]
        if f"{name}.mlp.gate_up_proj.weight" in self.weights:
            gate, up = self.weights[f"{name}.mlp.gate_up_proj.weight"].chunk(2)
        else:
            gate, up = (self.weights[f"{name}.mlp.{part}_proj.weight"] for part in ("gate", "up"))
        return hidden + (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def _scores(
        self, q: Tensor, k: Tensor, logit: str, heads: str, weights: list[float] | None = None
    ) -> Tensor:
        """The score of each row [n] before calibration, by the asking rows' queries [a, HQ, D];
        weights: each head's.
        """
        group = self.heads // self.kv_heads
        by_head = []
        for head in range(self.heads):
            logits = q[:, head] @ k[:, head // group].T / self.dim**0.5
            if logit == "softmax":
                logits = logits.softmax(-1)
            elif logit == "log_softmax":
                logits = logits.log_softmax(-1)
            by_head.append(logits.mean(0) * (1.0 if weights is None else weights[head]))
        joined = torch.stack(by_head)
        return joined.max(0).values if heads == "max" else joined.sum(0)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        """x times a matrix, and its bias where it has one."""
        bias = self.weights.get(f"{name}.bias")
        product = x @ self.weights[f"{name}.weight"].T
        return product if bias is None else product + bias

    def _norm(self, x: Tensor, name: str) -> Tensor:
        mean_square = x.pow(2).mean(-1, keepdim=True)
        return x / torch.sqrt(mean_square + self.eps) * self.weights[f"{name}.weight"]

    def _logits(self, last: Tensor) -> Tensor:
        return self._norm(last, "model.norm") @ self.weights["lm_head.weight"].T


def _with_window(settings: Settings, room: int) -> Settings:
    """The settings with their window, or its default in chunks of `room` context tokens: an eighth,
    an odd number, at most 31, or 63 where retrieval heads are asked.
    """
    if settings.window is not None:
        return settings
    eighth, longest = room // 8, 31 if settings.weights is None else 63
    return replace(settings, window=min(eighth if eighth % 2 else eighth + 1, longest))


def _widen(scores: Tensor, settings: Settings, before: int, after: int) -> Tensor:
    """Each context row's best score among the context rows that it is a neighbour of: half of a
    row's neighbours stand before it, or an eighth where retrieval heads are asked.
    """
    context, neighbours = range(before, len(scores) - after), settings.window - 1
    best = torch.full_like(scores, -torch.inf)
    for row in context:
        first = row - neighbours // (2 if settings.weights is None else 8)
        for near in range(first, first + settings.window):
            if near in context:
                best[near] = max(best[near], scores[row])
    return best


def _prune(chunk: Chunk, scores: Tensor, target: int, before: int, after: int) -> Chunk:
    """Remove the lowest-scoring context rows, of equal ones the earlier, from everything that the
    chunk holds.
    """
    context = range(before, len(scores) - after)
    ranked = sorted(context, key=lambda row: (float(scores[row]), row))
    removed = set(ranked[: len(scores) - target])
    kept = torch.tensor([row for row in range(len(scores)) if row not in removed])
    return Chunk(
        chunk.hidden[kept],
        [k[kept] for k in chunk.keys],
        [v[kept] for v in chunk.values],
        chunk.positions[kept],
        chunk.sources[kept],
    )


def _merge(children: list[Chunk], before: int, after: int) -> Chunk:
    """Left's context, then right's, between the means of their affixes."""
    if len(children) == 1:
        return children[0]
    left, right = children

    def join(a: Tensor, b: Tensor) -> Tensor:
        suffix = (a[len(a) - after :] + b[len(b) - after :]) / 2
        prefix = (a[:before] + b[:before]) / 2
        return torch.cat([prefix, a[before : len(a) - after], b[before : len(b) - after], suffix])

    def label(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a[: len(a) - after], b[before:]])

    return Chunk(
        join(left.hidden, right.hidden),
        [join(a, b) for a, b in zip(left.keys, right.keys, strict=True)],
        [join(a, b) for a, b in zip(left.values, right.values, strict=True)],
        label(left.positions, right.positions),
        label(left.sources, right.sources),
    )
