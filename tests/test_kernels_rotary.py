"""The rotary kernels against their definitions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    assert_as_exact,
    dtypes,
    few_examples,
    integers,
    poisoned,
    random,
    seeds,
)

from homer_triton.kernels import apply_rotary_, reference, rotary_and_store_

__all__ = ["poisoned"]


def rotated(x, positions, cos, sin):
    """x by complex numbers, in x's dtype: another form of the definition."""
    pairs = x.unflatten(-1, (2, -1)).double()
    turn = torch.complex(cos.double(), sin.double())[positions.long()][:, :, None]
    turned = torch.complex(pairs[..., 0, :], pairs[..., 1, :]) * turn
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


@few_examples
@given(
    seed=seeds,
    dtype=dtypes,
    batch=st.integers(1, 2),
    rows=st.integers(1, 40),
    key_heads=st.integers(1, 3),
    group=st.sampled_from([None, 1, 2, 8]),
    dim=st.sampled_from([16, 64, 80, 96, 128]),
)
def test_any_shape(seed, dtype, batch, rows, key_heads, group, dim):
    heads = 0 if group is None else group * key_heads
    # Views of one fused projection, as the model makes them.
    fused = random(seed, batch, rows, heads + 2 * key_heads, dim, dtype=dtype)
    before = fused.clone()
    q, k, v = fused.split([heads, key_heads, key_heads], dim=2)
    positions = integers(seed, 50, batch, rows)
    cos, sin = random(seed + 1, 50, dim // 2), random(seed + 2, 50, dim // 2)
    cache = random(seed + 3, 2, 2 * batch * rows, key_heads, dim, dtype=dtype)
    untouched = cache.clone()
    slots = 2 * torch.arange(batch * rows, device=k.device).flip(0).view(batch, rows)

    rotary_and_store_(q if heads else None, k, v, positions, cos, sin, cache[0], cache[1], slots)

    old_q, old_k, old_v = before.split([heads, key_heads, key_heads], dim=2)
    if heads:
        assert_as_exact(q, rotated, old_q, positions, cos, sin)
    assert_as_exact(k, rotated, old_k, positions, cos, sin)
    assert torch.equal(v, old_v)
    assert torch.equal(cache[0][slots], k)
    assert torch.equal(cache[1][slots], v)
    assert torch.equal(cache[:, 1::2], untouched[:, 1::2])


@few_examples
@given(
    seed=seeds,
    dtype=dtypes,
    batch=st.integers(1, 2),
    rows=st.integers(1, 40),
    heads=st.integers(1, 9),
    dim=st.sampled_from([16, 48, 128]),
)
def test_rotation_in_place(seed, dtype, batch, rows, heads, dim):
    x = random(seed, batch, rows, 2 * heads, dim, dtype=dtype)
    before = x.clone()
    positions = integers(seed, 50, batch, rows)
    cos, sin = random(seed + 1, 50, dim // 2), random(seed + 2, 50, dim // 2)
    apply_rotary_(x[:, :, heads:], positions, cos, sin)
    assert_as_exact(x[:, :, heads:], rotated, before[:, :, heads:], positions, cos, sin)
    assert torch.equal(x[:, :, :heads], before[:, :, :heads])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_full_size_equals_the_definition(dtype):
    results = []
    for ops in (rotary_and_store_, reference.rotary_and_store_):
        fused = random(0, 1, 2048, 48, 128, dtype=dtype)
        q, k, v = fused.split([32, 8, 8], dim=2)
        angles = random(1, 4096, 64)
        cache = random(2, 2, 4096, 8, 128, dtype=dtype)
        slots = torch.arange(2048, device=k.device).flip(0)[None]
        ops(q, k, v, integers(3, 4096, 1, 2048), angles.cos(), angles.sin(), *cache, slots)
        results.append((fused, cache))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_queries_and_keys_of_one_product_or_of_two():
    heads, positions = random(0, 2, 5, 4, 16), integers(1, 50, 2, 5)
    cos, sin = random(2, 50, 8), random(3, 50, 8)
    slots = torch.arange(10).view(2, 5)
    results = []
    for apart in (False, True):
        q, k, v = heads.clone().split([2, 1, 1], dim=2)
        if apart:
            k = k.clone()
        cache = torch.zeros(2, 10, 1, 16)
        reference.rotary_and_store_(q, k, v, positions, cos, sin, *cache, slots)
        results.append((q, k, cache))
    for joined, separate in zip(*results, strict=True):
        assert torch.equal(joined, separate)
    assert not torch.equal(results[0][1], heads[:, :, 2:3])


@pytest.mark.parametrize("at_once", [1, 3 * 2 * 16, 5 * 2 * 16])
def test_the_definition_is_one_for_few_rows_and_for_many(at_once, monkeypatch):
    x, positions = random(0, 2, 5, 2, 16), integers(1, 50, 2, 5)
    cos, sin = random(2, 50, 8), random(3, 50, 8)
    whole = x.clone()
    reference.apply_rotary_(whole, positions, cos, sin)
    monkeypatch.setattr(reference, "ROTATED_AT_ONCE", at_once)
    reference.apply_rotary_(x, positions, cos, sin)
    assert torch.equal(x, whole)
