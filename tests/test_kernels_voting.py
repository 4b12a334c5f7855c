"""The scores of several asking rows, and the selection by them, against their definitions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    DEVICE,
    assert_as_exact,
    dtypes,
    few_examples,
    integers,
    poisoned,
    random,
    seeds,
    strided,
)

from homer_triton.kernels import reference, score_rows, vote_and_select
from homer_triton.kernels.checks import JOINS, LOGITS
from homer_triton.kernels.scores import LOGITS as FUNCTIONS
from homer_triton.kernels.scoring import MAX_ROWS

__all__ = ["poisoned"]

heads = st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 8]))


def digits(seed, *shape, dtype=torch.float32):
    """Small whole numbers: their products are exact, and many rows tie."""
    return (integers(seed, 7, *shape) - 3).to(dtype)


def test_the_same_logits_are_named():
    assert tuple(FUNCTIONS) == LOGITS


@few_examples
@given(
    seed=seeds,
    dtype=dtypes,
    make=st.sampled_from([random, strided]),
    logit=st.sampled_from(LOGITS),
    join=st.sampled_from(JOINS),
    batch=st.integers(1, 2),
    rows=st.integers(1, 150),
    prefix=st.sampled_from([None, 0, 1, 70]),
    asking=st.sampled_from([1, 3, 17]),
    heads=heads,
    dim=st.sampled_from([16, 80, 128]),
    weigh=st.sampled_from([None, digits, random]),
)
def test_scores(seed, dtype, make, logit, join, batch, rows, prefix, asking, heads, dim, weigh):
    q = make(seed, batch, asking, heads[0] * heads[1], dim, dtype=dtype)
    k = make(seed + 1, batch, rows, heads[0], dim, dtype=dtype)
    before = None if prefix is None else make(seed + 2, prefix, heads[0], dim, dtype=dtype)
    weights = None if weigh is None else weigh(seed + 3, heads[0] * heads[1])
    scores = score_rows(q, k, before, logit, join, weights)
    assert scores.dtype == torch.float32
    assert_as_exact(scores, lambda *x: reference.score_rows(*x, logit, join, weights), q, k, before)


@pytest.mark.interpreter
@few_examples
@given(
    seed=seeds,
    dtype=dtypes,
    batch=st.integers(1, 3),
    rows=st.integers(1, 150),
    asking=st.sampled_from([1, 2, 4]),
    heads=heads,
    join=st.sampled_from(JOINS),
    voted=st.booleans(),
    reach=st.sampled_from([(0, 0), (1, 1), (15, 15), (7, 55), (3, 0)]),
    weighed=st.booleans(),
    cuts=st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
)
def test_the_kept_rows_with_ties(
    seed, dtype, batch, rows, asking, heads, join, voted, reach, weighed, cuts
):
    asking = min(asking, rows)
    q = digits(seed, batch, asking, heads[0] * heads[1], 16, dtype=dtype)
    k = digits(seed + 1, batch, rows, heads[0], 16, dtype=dtype)
    first_row, last_row = sorted(round(cut * rows) for cut in cuts[:2])
    keep = round(cuts[2] * (last_row - first_row))
    votes = digits(seed + 2, batch, rows) if voted else None
    weights = digits(seed + 3, heads[0] * heads[1]) if weighed else None
    # Powers of two asking rows, and logits as they are: all sums are exact.
    arguments = (q, k, None, votes, keep, first_row, last_row, "logit", join, reach, weights)
    for actual, expected in zip(
        vote_and_select(*arguments), reference.vote_and_select(*arguments), strict=True
    ):
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.interpreter
@pytest.mark.parametrize("logit", LOGITS)
@pytest.mark.parametrize("join", JOINS)
def test_the_least_significant_are_dropped(logit, join):
    q, k, prefix = random(0, 2, 5, 4, 32), random(1, 2, 150, 2, 32), random(2, 9, 2, 32)
    votes = random(3, 2, 150) * 0.01
    weights = torch.tensor([1.0, 0, 2, 0.5], device=DEVICE)
    kept, dropped, own = vote_and_select(
        q, k, prefix, votes, 60, 5, 140, logit, join, (2, 14), weights
    )
    together = torch.cat([kept, dropped], dim=1).sort(dim=1).values
    assert torch.equal(together, torch.arange(150, device=DEVICE).expand(2, -1))
    assert (kept.diff(dim=1) > 0).all()
    assert (dropped.diff(dim=1) > 0).all()
    scores = reference.score_rows(q, k, prefix, logit, join, weights) + votes
    torch.testing.assert_close(own, scores, atol=1e-5, rtol=1e-5)
    best = torch.stack(
        [scores[:, max(5, i - 14) : min(140, i + 3)].amax(1) for i in range(5, 140)], dim=1
    )
    lowest_kept = best.gather(1, kept[:, 5:65] - 5).amin(1)
    # Scores closer than rounding may change places.
    assert (best.gather(1, dropped - 5).amax(1) <= lowest_kept + 1e-5).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("logit", LOGITS)
@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("reach", [(0, 0), (2, 2)])
def test_nan_is_the_lowest_score(logit, join, reach):
    q, k, prefix = random(0, 2, 4, 8, 16), random(1, 2, 90, 4, 16), random(2, 9, 4, 16)
    votes = random(3, 2, 90) * 0.01
    weights = torch.tensor([1.0, 1, 0, 0, 2, 1, 1, 1], device=DEVICE)
    k[0, [3, 40, 41], 0, 5] = torch.nan
    k[1, ::7, 3, 0] = torch.nan
    votes[0, 60] = torch.nan
    arguments = (q, k, prefix, votes, 30, 2, 80, logit, join, reach, weights)
    got, expected = vote_and_select(*arguments), reference.vote_and_select(*arguments)
    torch.testing.assert_close(got[2], expected[2], atol=1e-5, rtol=1e-5, equal_nan=True)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    if logit == "logit":
        nan = expected[2].isnan()
        assert nan[0].nonzero()[:, 0].tolist() == [3, 40, 41, 60]
        assert nan[1].nonzero()[:, 0].tolist() == list(range(0, 90, 7))
    if logit == "logit" and reach == (0, 0):
        assert {3, 40, 41, 60} <= set(got[1][0].tolist())


def test_the_neighbours_of_a_found_row_are_kept():
    q = torch.ones(1, 2, 1, 16, device=DEVICE)
    k = torch.zeros(1, 60, 1, 16, device=DEVICE)
    k[:, [20, 45]] = torch.tensor([2.0, 1.0], device=DEVICE)[:, None, None]
    kept, *_ = vote_and_select(q, k, None, None, 12, 0, 58, reach=(1, 7))
    # One before it, seven behind it; of the other's equal neighbours the last ones.
    assert kept.tolist() == [[*range(19, 28), 50, 51, 52, 58, 59]]


def test_the_prefix_takes_its_share_of_attention():
    """A chunk that answers nothing gives its votes to the prefix, and so less to its rows."""
    q, k = torch.ones(1, 1, 1, 16, device=DEVICE), torch.zeros(1, 4, 1, 16, device=DEVICE)
    prefix = torch.ones(3, 1, 16, device=DEVICE)
    alone = score_rows(q, k, None, "softmax", "sum")
    beside = score_rows(q, k, prefix, "softmax", "sum")
    torch.testing.assert_close(alone, torch.full_like(alone, 0.25))
    expected = 1 / (4 + 3 * torch.tensor(4.0).exp().item())
    torch.testing.assert_close(beside, torch.full_like(beside, expected))


def test_too_many_rows_are_refused():
    q = torch.zeros(1, 1, 1, 16, device=DEVICE)
    k = q.expand(1, MAX_ROWS + 1, 1, 16)
    with pytest.raises(ValueError, match=f"the number of rows of k is {MAX_ROWS + 1}: it must be"):
        vote_and_select(q, k, None, None, 1, 0, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("key_heads", [8, 32])
def test_full_size_in_a_replayed_graph(batch, key_heads):
    # A head dim whose square root is a power of two: sums are exact in any order.
    q = digits(0, batch, 16, 32, 64, dtype=torch.bfloat16)
    k = digits(1, batch, 2048, key_heads, 64, dtype=torch.bfloat16)
    arguments = (q, k, None, None, 974, 0, 1948, "logit", "sum", (15, 15))
    expected = reference.vote_and_select(*arguments)
    vote_and_select(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = vote_and_select(*arguments)
    for _ in range(3):
        graph.replay()
        eager = vote_and_select(*arguments)
        for i in range(2):
            assert torch.equal(replayed[i], expected[i])
            assert torch.equal(eager[i], expected[i])
