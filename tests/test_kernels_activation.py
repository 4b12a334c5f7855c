"""The activation kernel against its definition."""

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

from homer_triton.kernels import reference, silu_mul

__all__ = ["poisoned"]


@pytest.mark.interpreter
@few_examples
@given(
    seed=seeds,
    dtype=dtypes,
    make=st.sampled_from([random, strided]),
    shape=st.lists(st.integers(1, 9), max_size=3),
    width=st.integers(1, 200) | st.just(2600),
)
def test_any_shape(seed, dtype, make, shape, width):
    gate_up = make(seed, *shape, 2 * width, dtype=dtype)
    assert_as_exact(silu_mul(gate_up), reference.silu_mul, gate_up)


def test_large_gates_do_not_overflow():
    gate_up = torch.tensor([[-200.0, 200.0, 3.0, 3.0]], device=random(0, 1).device)
    assert torch.equal(silu_mul(gate_up), reference.silu_mul(gate_up))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_full_size(dtype):
    gate_up = random(0, 4, 2048, 2 * 11008, dtype=dtype)
    assert_as_exact(silu_mul(gate_up), reference.silu_mul, gate_up)
