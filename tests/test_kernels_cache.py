"""The gather kernel against its definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import dtypes, few_examples, integers, poisoned, random, seeds

from homer_triton.kernels import gather_cache_, reference

__all__ = ["poisoned"]


def assert_equals_definition(cache, slots):
    layers, _, _, heads, dim = cache.shape
    got, expected = (
        torch.empty(2, layers, heads, len(slots), dim, dtype=cache.dtype, device=cache.device)
        for _ in range(2)
    )
    gather_cache_(cache, slots, *got)
    reference.gather_cache_(cache, slots, *expected)
    assert torch.equal(got, expected)
    assert torch.equal(expected.transpose(2, 3), cache.transpose(0, 1)[:, :, slots])


@few_examples
@given(
    seed=seeds,
    dtype=dtypes,
    layers=st.integers(1, 3),
    capacity=st.integers(1, 99),
    heads=st.integers(1, 3),
    dim=st.sampled_from([16, 80, 128]),
    rows=st.integers(0, 150),
)
def test_any_shape(seed, dtype, layers, capacity, heads, dim, rows):
    cache = random(seed, layers, 2, capacity, heads, dim, dtype=dtype)
    assert_equals_definition(cache, integers(seed, capacity, rows))


@pytest.mark.gpu
def test_full_size():
    cache = random(0, 32, 2, 4096, 8, 128, dtype=torch.bfloat16)
    assert_equals_definition(cache, integers(1, 4096, 2048))
