"""The attention kernel against its definition."""

from contextlib import AbstractContextManager
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    DEVICE,
    DTYPES,
    assert_as_exact,
    dtypes,
    few_examples,
    poisoned,
    random,
    seeds,
    some_rows,
    strided,
)

from homer_triton.kernels import attention, causal_attention, reference
from homer_triton.kernels.attention import FLOAT32_TILES, attention_tile

__all__ = ["poisoned"]


# The interpreter has them, and chips from Hopper on.
HAVE_DESCRIPTORS = DEVICE == "cpu" or (
    torch.version.hip is None and torch.cuda.get_device_capability() >= (9, 0)
)
READ_BY_DESCRIPTORS = (False, True) if HAVE_DESCRIPTORS else (False,)


def tile_with(descriptors: bool) -> AbstractContextManager[object]:
    """Let attention take its usual tile, its keys read by pointers or by descriptors."""

    def tile(*args) -> attention.Tile:
        own = attention_tile(*args)
        return own if own in FLOAT32_TILES.values() else own._replace(descriptors=descriptors)

    return mock.patch.object(attention, "attention_tile", tile)


def definition(q, k, v, prefix_k, prefix_v, rows):
    rows = None if rows is None else rows.long()
    return reference.causal_attention(q, k, v, prefix_k, prefix_v, rows)


@pytest.mark.interpreter
@few_examples
@given(
    seed=seeds,
    dtype=dtypes,
    make=st.sampled_from([random, strided]),
    batch=st.integers(1, 2),
    rows=st.integers(1, 150),
    prefix=st.integers(0, 70),
    selected=st.none() | st.integers(1, 150),
    key_heads=st.integers(1, 2),
    group=st.sampled_from([1, 2, 3, 8]),
    dim=st.sampled_from([16, 32, 64, 80, 96, 128]),
)
def test_any_shape(seed, dtype, make, batch, rows, prefix, selected, key_heads, group, dim):
    count = rows if selected is None else min(selected, rows)
    q = make(seed, batch, count, key_heads * group, dim, dtype=dtype)
    k = make(seed + 1, batch, rows, key_heads, dim, dtype=dtype)
    v = make(seed + 2, batch, rows, key_heads, dim, dtype=dtype)
    prefix_k = make(seed + 3, prefix, key_heads, dim, dtype=dtype)
    prefix_v = make(seed + 4, prefix, key_heads, dim, dtype=dtype)
    at = None if selected is None else some_rows(seed, batch, rows, count)

    out = causal_attention(q, k, v, prefix_k, prefix_v, at)

    assert_as_exact(out, definition, q, k, v, prefix_k, prefix_v, at)


@pytest.mark.parametrize("dtype", DTYPES)
def test_widest_head(dtype):
    q, k, v = (random(seed, 1, 70, 1, 256, dtype=dtype) for seed in range(3))
    assert_as_exact(causal_attention(q, k, v), definition, q, k, v, None, None, None)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_one_row_after_a_long_prefix(dtype):
    q, k, v = (random(seed, 1, 1, heads, 64, dtype=dtype) for seed, heads in enumerate((4, 2, 2)))
    prefix_k, prefix_v = (random(seed, 700, 2, 64, dtype=dtype) for seed in (3, 4))
    out = causal_attention(q, k, v, prefix_k, prefix_v)
    assert_as_exact(out, definition, q, k, v, prefix_k, prefix_v, None)


@pytest.mark.interpreter
@pytest.mark.parametrize("prefix", [0, 5, 300])
@pytest.mark.parametrize("dim", [32, 80])
def test_one_query_a_chunk_sees_no_row_behind_its_own(prefix, dim):
    q = random(0, 3, 1, 6, dim)
    k, v = (random(seed, 3, 400, 2, dim) for seed in (1, 2))
    before = [random(seed, prefix, 2, dim) for seed in (3, 4)]
    at = torch.tensor([[0], [399], [130]], device=DEVICE)
    for chunk, row in enumerate(at[:, 0]):  # as in a cache that is not full yet
        k[chunk, row + 1 :], v[chunk, row + 1 :] = torch.nan, torch.nan
    out = causal_attention(q, k, v, *before, at)
    for chunk, row in enumerate(at[:, 0]):
        own = [x[chunk : chunk + 1, : row + 1] for x in (k, v)]
        assert_as_exact(
            out[chunk : chunk + 1], definition, q[chunk : chunk + 1], *own, *before, at[chunk][None]
        )
    # The definition sees none of them either.
    torch.testing.assert_close(definition(q, k, v, *before, at), out, atol=2e-5, rtol=2e-5)


def test_logits_of_any_size():
    q, k, v = (random(seed, 1, 40, 1, 32) for seed in range(3))
    out = causal_attention(1000 * q, k, v)
    assert_as_exact(out, definition, 1000 * q, k, v, None, None, None)


def test_rows_of_one_batch_entry_do_not_reach_another():
    q, k, v = (random(seed, 2, 33, 2, 32) for seed in range(3))
    assert torch.equal(causal_attention(q, k, v)[1:], causal_attention(q[1:], k[1:], v[1:]))


def test_an_unsupported_head_dim_is_refused():
    q = torch.zeros(1, 2, 1, 24, device=DEVICE)
    with pytest.raises(ValueError, match="the head dim of q is 24: it must be one of 16, 32"):
        causal_attention(q, q, q)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("key_heads", [8, 32])
@pytest.mark.parametrize("selected", [None, 1074])
def test_full_size_twice_the_same_bits(dtype, key_heads, selected):
    q = random(0, 2, selected or 2048, 32, 128, dtype=dtype)
    k, v = (random(seed, 2, 2048, key_heads, 128, dtype=dtype) for seed in (1, 2))
    prefix_k, prefix_v = (random(seed, 100, key_heads, 128, dtype=dtype) for seed in (3, 4))
    at = None if selected is None else some_rows(0, 2, 2048, selected)
    out = causal_attention(q, k, v, prefix_k, prefix_v, at)
    assert_as_exact(out, definition, q, k, v, prefix_k, prefix_v, at)
    assert torch.equal(out, causal_attention(q, k, v, prefix_k, prefix_v, at))


@pytest.mark.skipif(not HAVE_DESCRIPTORS, reason="the chip copies by pointers alone")
@pytest.mark.parametrize("offset", [0, 1])
def test_keys_that_no_descriptor_can_name_are_read_by_pointers(offset, monkeypatch):
    """A descriptor's addresses are multiples of 16 bytes."""
    described = mock.Mock(side_effect=attention.TensorDescriptor)
    monkeypatch.setattr(attention, "TensorDescriptor", described)
    q = random(0, 1, 20, 2, 16, dtype=torch.float16)
    k, v = (random(seed, 20 * 16 + 1, dtype=torch.float16)[offset:] for seed in (1, 2))
    k, v = (x[: 20 * 16].view(1, 20, 1, 16) for x in (k, v))
    with tile_with(descriptors=True):
        out = causal_attention(q, k, v)
    assert described.called == (not offset)
    assert_as_exact(out, definition, q, k, v, None, None, None)
