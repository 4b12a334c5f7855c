"""The norm kernels against their definitions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    assert_as_exact,
    dtypes,
    few_examples,
    poisoned,
    random,
    seeds,
    strided,
)

from homer_triton.kernels import add_rms_norm, reference, rms_norm

__all__ = ["poisoned"]

shapes = st.lists(st.integers(1, 9), max_size=3)
widths = st.integers(1, 300) | st.just(4096)


@few_examples
@given(
    seed=seeds,
    dtype=dtypes,
    make=st.sampled_from([random, strided]),
    shape=shapes,
    width=widths,
    eps=st.sampled_from([1e-6, 1e-5]),
)
def test_any_shape(seed, dtype, make, shape, width, eps):
    x, residual = (make(seed + i, *shape, width, dtype=dtype) for i in range(2))
    weight = random(seed + 2, width, dtype=dtype)

    assert_as_exact(rms_norm(x, weight, eps), lambda x, w: reference.rms_norm(x, w, eps), x, weight)
    total, normal = add_rms_norm(x, residual, weight, eps)
    assert torch.equal(total, x + residual)
    assert_as_exact(normal, lambda x, w: reference.rms_norm(x, w, eps), total, weight)


def test_rows_that_do_not_lie_evenly():
    x, weight = random(0, 2, 9, 40)[:, 3:7], random(1, 40)
    assert torch.equal(rms_norm(x, weight, 1e-5), rms_norm(x.contiguous(), weight, 1e-5))


def test_no_rows():
    assert rms_norm(random(0, 0, 8), random(1, 8), 1e-5).shape == (0, 8)


def test_too_many_uneven_dimensions_are_refused():
    x = random(0, 2, 3, 4, 8)[:, :2]
    with pytest.raises(ValueError, match="the stride of x is"):
        rms_norm(x, random(1, 8), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_full_size_twice_the_same_bits(dtype):
    x, residual = (random(seed, 4, 2048, 4096, dtype=dtype) for seed in range(2))
    weight = random(2, 4096, dtype=dtype)
    first, second = (add_rms_norm(x, residual, weight, 1e-5) for _ in range(2))
    assert_as_exact(first[1], lambda x, w: reference.rms_norm(x, w, 1e-5), first[0], weight)
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_definition_is_one_for_few_rows_and_for_many(dtype, monkeypatch):
    x, weight = random(0, 3, 5, 64, dtype=dtype) * 40, random(1, 64, dtype=dtype)
    exact = reference.rms_norm(x.double(), weight.double(), 1e-5)
    size = x.numel()
    for few, most in ((size, size), (size - 1, size), (size - 1, size - 1)):
        monkeypatch.setattr(reference, "FEW_NORMED", few)
        monkeypatch.setattr(reference, "NORMED_AT_ONCE", most)
        out = reference.rms_norm(x, weight, 1e-5)
        assert out.dtype == dtype
        error = (out.double() - exact).abs().max() / exact.abs().max()
        assert error <= 2 * torch.finfo(dtype).eps
