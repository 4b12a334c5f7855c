"""The paper's selection, one launch, against its definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    DEVICE,
    dtypes,
    few_examples,
    integers,
    poisoned,
    random,
    seeds,
)

from homer_triton.kernels import reference, score_and_select
from homer_triton.kernels.scoring import MAX_ROWS

__all__ = ["poisoned"]

heads = st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 8]))


def digits(seed, *shape, dtype=torch.float32):
    """Small whole numbers: their products are exact, and many rows tie."""
    return (integers(seed, 7, *shape) - 3).to(dtype)


@pytest.mark.interpreter
@few_examples
@given(
    seed=seeds,
    dtype=dtypes,
    batch=st.integers(1, 3),
    rows=st.integers(1, 120),
    heads=heads,
    calibrated=st.booleans(),
    cuts=st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
)
def test_the_kept_rows_with_ties(seed, dtype, batch, rows, heads, calibrated, cuts):
    q = digits(seed, batch, heads[0] * heads[1], 16, dtype=dtype)
    k = digits(seed + 1, batch, rows, heads[0], 16, dtype=dtype)
    first_row, last_row = sorted(round(cut * rows) for cut in cuts[:2])
    keep = round(cuts[2] * (last_row - first_row))
    # Positions are neither unique nor in order after a merge; the last row's is the largest.
    positions = integers(seed, 50, batch, rows)
    positions[:, -1] = 50
    bias = digits(seed, 51) if calibrated else None
    arguments = (q, k, positions, bias, keep, first_row, last_row)

    for actual, expected in zip(
        score_and_select(*arguments), reference.score_and_select(*arguments), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.interpreter
def test_the_lowest_significances_are_dropped():
    q, k, bias = random(0, 2, 8, 32), random(1, 2, 300, 4, 32), random(2, 300)
    positions = torch.arange(300, device=DEVICE).expand(2, -1)
    kept, dropped = score_and_select(q, k, positions, bias, 120, 5, 290)
    together = torch.cat([kept, dropped], dim=1).sort(dim=1).values
    assert torch.equal(together, positions)
    assert (kept.diff(dim=1) > 0).all()
    assert (dropped.diff(dim=1) > 0).all()
    significance = reference.score_rows(q[:, None], k) - bias.flip(0)
    # Scores closer than rounding may change places.
    lowest_kept = significance.gather(1, kept[:, 5:125]).amin(1)
    assert (significance.gather(1, dropped).amax(1) <= lowest_kept + 1e-5).all()


@pytest.mark.parametrize("keep", [0, 7, 40])
def test_when_all_tie_the_last_rows_are_kept(keep):
    k = torch.zeros(1, 48, 2, 16, device=DEVICE)
    positions = torch.arange(48, device=DEVICE)[None]
    kept, dropped = score_and_select(k[:, 0], k, positions, None, keep, 3, 43)
    assert dropped.tolist() == [list(range(3, 43 - keep))]
    assert kept.tolist() == [[0, 1, 2, *range(43 - keep, 48)]]


def test_both_zeros_tie():
    q = torch.ones(1, 1, 16, device=DEVICE)
    k = torch.zeros(1, 4, 1, 16, device=DEVICE)
    bias = torch.tensor([0.0, 0.0, -0.0, 0.0], device=DEVICE)
    k[:, 1] = -0.0
    positions = torch.arange(4, device=DEVICE)[None]
    assert score_and_select(q, k, positions, bias, 2, 0, 4)[0].tolist() == [[2, 3]]


@pytest.mark.interpreter
@pytest.mark.parametrize("key_heads", [1, 3, 8])
@pytest.mark.parametrize("biased", [False, True])
def test_nan_is_the_lowest_score(key_heads, biased):
    q, k = random(0, 2, 8 if key_heads == 8 else 6, 16), random(1, 2, 70, key_heads, 16)
    k[0, [5, 30], 0, 2] = torch.nan
    k[1, ::4, -1, 0] = -torch.nan
    positions = torch.arange(70, device=DEVICE).expand(2, -1)
    bias = random(2, 70) if biased else None
    if bias is not None:
        bias[12] = torch.nan
    arguments = (q, k, positions, bias, 20, 3, 64)
    got, expected = score_and_select(*arguments), reference.score_and_select(*arguments)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    dropped = set(got[1][0].tolist())
    assert {5, 30} <= dropped
    assert not biased or 69 - 12 in dropped
    # Where all are, they are equal: the last rows stay.
    every_row = torch.full_like(k, torch.nan)
    kept, _ = score_and_select(q, every_row, *arguments[2:])
    assert kept.tolist() == [[0, 1, 2, *range(44, 70)]] * 2


@pytest.mark.interpreter
def test_the_most_rows_that_counts_hold():
    rows = 70_000  # all of one score: more than 16 bits count
    q, k = torch.zeros(1, 1, 16, device=DEVICE), digits(1, 1, rows, 1, 16)
    positions = torch.arange(rows, device=DEVICE)[None]
    arguments = (q, k, positions, None, 1000, 7, rows - 68)
    for actual, expected in zip(
        score_and_select(*arguments), reference.score_and_select(*arguments), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.interpreter
def test_all_of_the_most_rows_may_reach_a_threshold():
    k = 1 + digits(1, 1, 32_768, 1, 16).abs()
    positions = torch.arange(32_768, device=DEVICE)[None]
    arguments = (torch.ones_like(k[:, 0]), k, positions, None, 1000, 0, 32_768)
    for actual, expected in zip(
        score_and_select(*arguments), reference.score_and_select(*arguments), strict=True
    ):
        assert torch.equal(actual, expected)


def test_too_many_rows_are_refused():
    q = torch.zeros(1, 1, 16, device=DEVICE)
    k = q[None].expand(1, MAX_ROWS + 1, 1, 16)
    positions = torch.zeros(1, MAX_ROWS + 1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=f"the number of rows of k is {MAX_ROWS + 1}: it must be"):
        score_and_select(q, k, positions, None, 1, 0, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("key_heads", [8, 32])
def test_full_size_in_a_replayed_graph(batch, key_heads):
    q = digits(0, batch, 32, 128, dtype=torch.bfloat16)
    k = digits(1, batch, 2048, key_heads, 128, dtype=torch.bfloat16)
    positions = torch.arange(2048, device=DEVICE).expand(batch, -1)
    arguments = (q, k, positions, digits(2, 2048), 974, 0, 1948)
    expected = reference.score_and_select(*arguments)
    score_and_select(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = score_and_select(*arguments)
    for _ in range(3):
        graph.replay()
        eager = score_and_select(*arguments)
        for i in range(2):
            assert torch.equal(replayed[i], expected[i])
            assert torch.equal(eager[i], expected[i])
