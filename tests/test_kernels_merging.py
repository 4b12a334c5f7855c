"""The kernels that close a level against their definitions."""

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
    some_rows,
)

from homer_triton.kernels import average_affix_, prune_and_concatenate, reference

__all__ = ["poisoned"]


def siblings(seed, batch, suffix, context, kept, width, kinds, dtype):
    """The arguments for children of (left, right) context rows, pruned to as many kept ones."""
    rows = [c + suffix for c in context]
    hidden, labels, survivors = [], [], []
    for side in range(2):
        labels.append(integers(seed + side, 9999, batch, kinds, rows[side]))
        tail = torch.arange(context[side], rows[side], device=DEVICE).expand(batch, -1)
        chosen = some_rows(seed + side, batch, context[side], kept[side])
        survivors.append(torch.cat([chosen, tail], dim=1))
        hidden.append(random(seed + side, batch, kept[side] + suffix, width, dtype=dtype))
    return (*hidden, *labels, *survivors, suffix)


def assert_joins_as_defined(arguments):
    hidden, labels = prune_and_concatenate(*arguments)
    expected, expected_labels = reference.prune_and_concatenate(*arguments)
    assert torch.equal(labels, expected_labels)
    # Copies and one rounded mean: nothing to differ in.
    assert torch.equal(hidden, expected)


def assert_averages_as_defined(seed, layers, batch, suffix, heads, dim, dtype):
    slots = 2 * batch * suffix + 5
    order = torch.randperm(slots, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    left, right = order[: 2 * batch * suffix].view(2, batch, suffix)
    cache = random(seed, layers + 1, 2, slots, heads, dim, dtype=dtype)
    expected = cache.clone()
    # The last layer is not the op's to touch.
    average_affix_(cache[:-1], left, right)
    reference.average_affix_(expected[:-1], left, right)
    assert torch.equal(cache, expected)


@few_examples
@given(
    seed=seeds,
    dtype=dtypes,
    batch=st.integers(1, 2),
    suffix=st.integers(0, 4),
    context=st.tuples(st.integers(1, 15), st.integers(1, 15)),
    share=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    width=st.integers(1, 70),
    kinds=st.integers(1, 9),
)
def test_rows_of_any_shape(seed, dtype, batch, suffix, context, share, width, kinds):
    kept = [max(1, round(c * s)) for c, s in zip(context, share, strict=True)]
    assert_joins_as_defined(siblings(seed, batch, suffix, context, kept, width, kinds, dtype))


@few_examples
@given(
    seed=seeds,
    dtype=dtypes,
    layers=st.integers(1, 3),
    batch=st.integers(1, 2),
    suffix=st.integers(0, 4),
    heads=st.integers(1, 3),
    dim=st.sampled_from([16, 80]),
)
def test_suffixes_of_any_shape(seed, dtype, layers, batch, suffix, heads, dim):
    assert_averages_as_defined(seed, layers, batch, suffix, heads, dim, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_full_size(dtype):
    assert_joins_as_defined(siblings(0, 2, 100, (1948, 1948), (974, 974), 4096, 4, dtype))
    assert_averages_as_defined(0, 9, 2, 100, 8, 128, dtype)
