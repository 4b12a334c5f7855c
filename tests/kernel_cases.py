"""What the kernel tests share: the device they run on, random inputs, and the rule for errors."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# bfloat16 is wrong in Triton's interpreter: it is tested where there is a GPU.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])

# Errors where the same operation in PyTorch happens to make none: a few roundings of its result.
FLOORS = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**16)

# Every example launches many interpreted programs: few of them, no deadline, and the same ones in
# every run.
few_examples = settings(
    max_examples=min(12, settings().max_examples),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def strided(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Like `random`, a view that skips memory between its rows."""
    return random(seed, *shape[:-1], 2 * shape[-1], dtype=dtype)[..., shape[-1] :]


def integers(seed: int, high: int, *shape: int) -> Tensor:
    """Random int64 below `high`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(high, shape, generator=generator).to(DEVICE)


def some_rows(seed: int, batch: int, rows: int, count: int) -> Tensor:
    """`count` of the rows, ascending, for each of the batch: [B, count]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(rows, generator=generator)[:count].sort().values for _ in range(batch)]
    return torch.stack(drawn).to(DEVICE)


def assert_as_exact(
    actual: Tensor, definition: Callable[..., Tensor], *inputs: Tensor | None
) -> None:
    """The error against float32 is at most twice that of the definition in the inputs' own dtype.

    `definition` maps the inputs, as they are and in float64, to what `actual` should be.
    """
    expected = definition(*(x if x is None else x.double() for x in inputs))
    own = (definition(*inputs).double() - expected).abs().max().item()
    error = (actual.double() - expected).abs().max().item()
    floor = FLOORS[actual.dtype] * max(1.0, expected.abs().max().item())
    assert error <= max(2 * own, floor), f"error {error:.2e}, PyTorch's {own:.2e}"


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new tensors with what no op returns, so that an output nobody wrote cannot pass."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            return x.fill_(math.nan if x.is_floating_point() else torch.iinfo(x.dtype).min)

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
