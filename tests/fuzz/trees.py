"""Drawn trees, selections and batches, encoded by homer_triton and by the oracle."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import oracle as naive
from cases import HEADS, LAYERS, assert_equal, peers, random_bias, random_tokens, retrieving
from oracle_tree import Settings
from torch import Tensor

import homer_triton as ht

from .attempts import FaultError

# Scores nearer to each other than this may change places by rounding: angles are float32.
TIE = 1e-6
LONGEST_AFFIX, LONGEST_ROOM, HIGHEST = 4, 36, 4


@dataclass(frozen=True)
class Case:
    """What is encoded. documents: context and suffix of each; weights: the model's retrieval heads,
    None for none; settings: HomerConfig's.
    """

    heads: tuple[int, int]
    prefix: list[int]
    documents: list[tuple[list[int], list[int]]]
    weights: list[list[float]] | None
    settings: dict[str, Any]
    batch_size: int


class Trees:
    """Models of a few layers with every grouping of heads, in float64."""

    name, together, seconds = "trees", 50, 60.0

    def __init__(self, folder: Path) -> None:
        for heads in HEADS:
            peers(*heads)

    def attempt(self, draw: Random, folder: Path) -> None:
        case = draw_case(draw)
        _, model, oracle = peers(*case.heads)
        config = ht.HomerConfig(**case.settings)
        contexts, suffixes = map(list, zip(*case.documents, strict=True))
        with retrieving(model, case.weights):
            found = ht.encode_batch(
                model, contexts, case.prefix, suffixes, config, batch_size=case.batch_size
            )
        for encoded, (context, suffix) in zip(found, case.documents, strict=True):
            settings = as_oracle(case, config, encoded.plan)
            with smallest_gap() as gap:
                expected = oracle.encode(case.prefix, context, suffix, settings)
            try:
                assert_equal(encoded, expected)
            except AssertionError as error:
                if min(gap, default=1.0) < TIE:
                    continue
                raise FaultError(
                    "another encoding than the oracle's", f"{case}: {error}"
                ) from error


def draw_case(draw: Random) -> Case:
    """Lengths, settings and selections that fit each other; settings that have defaults are often
    left out.
    """
    prefix = draw.randint(0, LONGEST_AFFIX)
    longest_suffix = draw.randint(1, LONGEST_AFFIX)
    room = draw.randint(1, draw.choice([6, 12, 12, LONGEST_ROOM]))
    documents = [_draw_document(draw, longest_suffix, room) for _ in range(draw.choice([1, 1, 3]))]
    if draw.random() < 0.5:  # side by side
        lengths = [(len(documents[0][0]), len(documents[0][1])) for _ in documents]
        documents = [(_tokens(draw, a), _tokens(draw, b)) for a, b in lengths]
    shortest_suffix = min(len(suffix) for _, suffix in documents)
    # The longest suffix leaves the least room, and so makes the highest tree.
    chunk = prefix + max(len(suffix) for _, suffix in documents) + room
    height = max((-(-len(context) // room) - 1).bit_length() for context, _ in documents)
    recompute = draw.choice(["none", "suffix", "all", None])
    settings: dict[str, Any] = {
        "max_chunk_len": chunk,
        "target_len": draw.choice([None, chunk - room + draw.randint(1, 2 * room)]),
        "recompute": recompute,
        "leaf_batch": draw.choice([None, 1, 2, 4, 8]),
        "offload": draw.choice([None, "cpu"]),
        "memory_budget": draw.choice([None, None, "1GiB"]),
    }
    tree = LAYERS
    if recompute in ("all", None):
        tree = draw.randint(height + 1, LAYERS)
        settings["layers_tree"] = draw.choice([None, tree])
    settings["layers_warmup"] = draw.choice([None, draw.randint(0, tree - height - 1)])
    if settings["layers_warmup"] is not None and settings.get("layers_tree") is None:
        settings["layers_tree"] = LAYERS  # the default runs fewer, which may be too few
    weights = None
    if draw.random() < 0.3:
        settings["selection"] = "paper"
        if draw.random() < 0.7:
            bias = random_bias(2 * chunk, seed=draw.randrange(1000))
            settings["calibration"] = ht.Calibration(bias)
    else:
        settings["selection"] = ht.Selection(
            rows=draw.choice([None, draw.randint(1, shortest_suffix)]),
            logit=draw.choice(["logit", "log_softmax", "softmax"]),
            heads=draw.choice(["max", "sum", "retrieval", "retrieval"]),
            layers=draw.choice(["last", "all", "levels", "tree"]),
            window=draw.choice([None, None, *range(1, room + 1, 2)]),
        )
        if draw.random() < 0.7:
            weights = [[draw.choice([0.0, 1.0]) for _ in range(4)] for _ in range(LAYERS)]
    own = _tokens(draw, prefix)
    heads = draw.choice(HEADS)
    return Case(heads, own, documents, weights, settings, draw.randint(1, len(documents)))


def as_oracle(case: Case, config: ht.HomerConfig, plan: ht.Plan) -> Settings:
    """The settings of one document's encoding for the oracle, defaults as its plan has them."""
    selection, weights = config.selected_by, None
    if selection.heads == "retrieval":
        weights = case.weights
        if weights is None:
            selection = selection.without_retrieval()
    return Settings(
        max_chunk_len=plan.max_chunk_len,
        target_len=plan.target_len,
        layers_warmup=plan.layers_warmup,
        bias=None if config.calibration is None else config.calibration.bias,
        recompute=plan.recompute,
        layers_tree=plan.layers_tree,
        asking=plan.asking,
        logit=selection.logit,
        heads=selection.join,
        layers=selection.layers,
        window=selection.window,
        weights=weights,
    )


@contextmanager
def smallest_gap() -> Iterator[list[float]]:
    """Within it, a list that the oracle's prunes add to: how far the lowest score that they keep is
    above the highest that they remove.
    """
    gaps: list[float] = []
    prune = naive._prune

    def measured(
        chunk: naive.Chunk, scores: Tensor, target: int, before: int, after: int
    ) -> naive.Chunk:
        ranked = scores[before : len(scores) - after].sort().values
        removed = len(scores) - target
        if 0 < removed < len(ranked):
            gap = float(ranked[removed] - ranked[removed - 1])
            if gap:  # equal scores are equal on both sides
                gaps.append(gap)
        return prune(chunk, scores, target, before, after)

    naive._prune = measured
    try:
        yield gaps
    finally:
        naive._prune = prune


def _draw_document(draw: Random, longest_suffix: int, room: int) -> tuple[list[int], list[int]]:
    """A context for a tree of a drawn height, and a suffix."""
    height = draw.randint(0, HIGHEST)
    shortest = room * 2 ** (height - 1) + 1 if height else 1
    context = draw.randint(shortest, room * 2**height)
    return _tokens(draw, context), _tokens(draw, draw.randint(1, longest_suffix))


def _tokens(draw: Random, count: int) -> list[int]:
    return random_tokens(count, draw.randrange(2**32))
