"""The prune-and-concatenate kernel against its definition."""

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

from homer_triton.kernels import prune_and_concatenate, reference

__all__ = ["poisoned"]


def siblings(seed, batch, suffix, context, kept, width, heads, dim, layers, dtype):
    """The arguments for children of (left, right) context rows, pruned to as many kept ones."""
    generator = torch.Generator().manual_seed(seed)
    rows = [c + suffix for c in context]
    slots = torch.randperm(batch * sum(rows) + 5, generator=generator)
    hidden, labels, survivors = [], [], []
    for side in range(2):
        own = slots[: batch * rows[side]].view(batch, 1, rows[side]).to(DEVICE)
        slots = slots[batch * rows[side] :]
        others = integers(seed + side, 9999, batch, 2, rows[side])
        labels.append(torch.cat([others, own], dim=1))
        tail = torch.arange(context[side], rows[side], device=DEVICE).expand(batch, -1)
        chosen = some_rows(seed + side, batch, context[side], kept[side])
        survivors.append(torch.cat([chosen, tail], dim=1))
        hidden.append(random(seed + side, batch, kept[side] + suffix, width, dtype=dtype))
    cache = random(seed, layers, 2, batch * sum(rows) + 5, heads, dim, dtype=dtype)
    return (*hidden, *labels, *survivors, cache, suffix)


def assert_equals_definition(arguments):
    *inputs, cache, suffix = arguments
    expected_cache = cache.clone()
    # The last layer has not run yet: it is not the op's to touch.
    hidden, labels = prune_and_concatenate(*inputs, cache[:-1], suffix)
    expected, expected_labels = reference.prune_and_concatenate(
        *inputs, expected_cache[:-1], suffix
    )
    assert torch.equal(labels, expected_labels)
    # Copies and one rounded mean: nothing to differ in.
    assert torch.equal(hidden, expected)
    assert torch.equal(cache, expected_cache)


@few_examples
@given(
    seed=seeds,
    dtype=dtypes,
    batch=st.integers(1, 2),
    suffix=st.integers(0, 4),
    context=st.tuples(st.integers(1, 15), st.integers(1, 15)),
    share=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    width=st.integers(1, 70),
    heads=st.integers(1, 3),
    dim=st.sampled_from([16, 80]),
    layers=st.integers(1, 3),
)
def test_any_shape(seed, dtype, batch, suffix, context, share, width, heads, dim, layers):
    kept = [max(1, round(c * s)) for c, s in zip(context, share, strict=True)]
    assert_equals_definition(
        siblings(seed, batch, suffix, context, kept, width, heads, dim, layers, dtype)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_full_size(dtype):
    assert_equals_definition(siblings(0, 2, 100, (1948, 1948), (974, 974), 4096, 8, 128, 9, dtype))
