"""The scores of a stored text: the kernel against its definition, that against a loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from homer_triton.kernels import reference, score_units

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def stored(
    tokens: int, units: int, asking: int, dim: int, dtype: torch.dtype, seed: int = 0
) -> tuple[object, ...]:
    """Arguments of `score_units`: three query heads over two key heads."""
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(asking, 3, dim, generator=draw).to(dtype)
    keys = torch.randn(tokens, 2, dim, generator=draw)
    scales = keys.abs().amax(-1) / 127
    if dtype is torch.float16:
        keys, scales = (keys / scales[..., None]).round().char(), scales.half()
    else:
        keys, scales = keys.to(dtype), None
    cuts = torch.randperm(tokens - 1, generator=draw)[: units - 1].sort().values + 1
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), cuts])
    before = torch.randn(asking, 3, generator=draw)
    arguments = (q, keys, scales, (0, 0, 1), torch.tensor([0.5, 0.2, 0.3]), before, starts)
    return tuple(x.to(DEVICE) if isinstance(x, Tensor) else x for x in arguments)


def test_the_definition_is_a_softmax_over_all_that_is_seen() -> None:
    q, keys, _, key_heads, weights, before, starts = stored(50, 7, 3, 16, torch.float32)
    scores = reference.score_units(q, keys, None, key_heads, weights, before, starts)
    stops = [*starts.tolist()[1:], 50]
    for asking in range(3):
        total = torch.zeros(50, device=DEVICE)
        for head, key_head in enumerate(key_heads):
            logits = keys[:, key_head] @ q[asking, head] / 4
            seen = torch.cat([before[asking, head].view(1), logits])
            total += weights[head] * seen.softmax(0)[1:]
        for unit, (start, stop) in enumerate(zip(starts.tolist(), stops, strict=True)):
            torch.testing.assert_close(scores[asking, unit], total[start:stop].max())


def test_blocks_of_the_definition_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = stored(300, 20, 4, 32, torch.float16)
    whole = reference.score_units(*arguments)
    monkeypatch.setattr("homer_triton.kernels.reference.STORED_LOGITS", 1)
    torch.testing.assert_close(reference.score_units(*arguments), whole)


@pytest.mark.interpreter
@settings(max_examples=8, deadline=None)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 700))
    units = data.draw(st.integers(1, min(tokens, 60)))
    asking, dim = data.draw(st.integers(1, 33)), data.draw(st.sampled_from([16, 64, 80]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    arguments = stored(tokens, units, asking, dim, dtype, data.draw(st.integers(0, 99)))
    torch.testing.assert_close(
        score_units(*arguments), reference.score_units(*arguments), atol=1e-4, rtol=1e-3
    )


def test_nothing_but_the_text_may_be_seen() -> None:
    q, keys, scales, key_heads, weights, before, _ = stored(40, 1, 2, 16, torch.float32)
    alone = torch.full_like(before, -torch.inf)
    every = torch.arange(40, device=DEVICE)
    for ops in (reference.score_units, score_units):
        scores = ops(q, keys, scales, key_heads, weights, alone, every)
        torch.testing.assert_close(scores.sum(1), torch.ones(2, device=DEVICE))
