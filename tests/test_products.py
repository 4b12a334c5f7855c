"""Matrix products with what follows them, against the same in float64."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kernel_cases import DEVICE
from torch import Tensor
from torch.nn import functional as F

from homer_triton.kernels import products, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True, params=[0, products.LEAST_WORK], ids=["fused", "plain"])
def least_work(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Products of any size through oneDNN where it can, and these small ones past it."""
    monkeypatch.setattr(products, "LEAST_WORK", request.param)
    return request.param


@pytest.fixture(params=[True, False], ids=["own", "widened"])
def knows_halves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this chip knows, and a chip where float32 stands in for half precision, five rows of a
    matrix at a time.
    """
    if not request.param:
        monkeypatch.setattr(products, "has_instructions", lambda dtype: False)
    monkeypatch.setattr(products, "LEAST_WIDE_ROWS", 2)
    monkeypatch.setattr(products, "WIDE_ELEMENTS", 5 * 16)


def made(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def assert_close(got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    error = (got.double() - exact).norm() / exact.norm()
    assert error <= BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("split", [[12], [5, 7]])
@pytest.mark.usefixtures("knows_halves")
def test_linear_is_the_product_and_the_residual(
    dtype: torch.dtype, rows: int, split: list[int]
) -> None:
    x, whole = made(2, rows, 16, dtype=dtype), made(12, 16, dtype=dtype, seed=1)
    residual = made(2, rows, 12, dtype=dtype, seed=2)
    exact = x.double() @ whole.double().T
    before = residual.clone()
    assert_close(products.linear(x, whole.split(split)), exact, dtype)
    assert_close(products.linear(x, whole.split(split), residual), exact + residual, dtype)
    assert torch.equal(residual, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add_", [products.add_linear_, products._multiply_into_])
@pytest.mark.usefixtures("knows_halves")
def test_a_product_is_added_in_place(
    dtype: torch.dtype, add_: Callable[[Tensor, Tensor, Tensor], None]
) -> None:
    """Both as it is done here and as a GPU does it, to some rows of a tensor."""
    x, weight = made(7, 16, dtype=dtype), made(12, 16, dtype=dtype, seed=1)
    whole = made(10, 12, dtype=dtype, seed=2)
    before = whole.clone()
    add_(whole[1:8], x, weight)
    assert_close(whole[1:8], before[1:8] + x.double() @ weight.double().T, dtype)
    assert torch.equal(whole[0], before[0])
    assert torch.equal(whole[8:], before[8:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.usefixtures("knows_halves")
def test_gated_linear_is_swiglu(dtype: torch.dtype, parts: int) -> None:
    x, whole = made(2, 5, 16, dtype=dtype), made(24, 16, dtype=dtype, seed=1)
    gate, up = (x.double() @ half.double().T for half in whole.chunk(2))
    assert_close(reference.gated_linear(x, whole.chunk(parts)), F.silu(gate) * up, dtype)


@pytest.mark.skipif(DEVICE != "cpu" or not products._is_x86(), reason="an x86 CPU's way")
@pytest.mark.parametrize("intels", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_few_rows_are_multiplied_in_the_way_that_is_fastest(
    dtype: torch.dtype, intels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_is_intels", lambda: intels)
    monkeypatch.setattr(products, "has_instructions", lambda dtype: True)
    weight = made(24, 32, dtype=dtype)
    ways = {
        rows: products.few_rows(weight.new_empty(rows, 32), (weight,)).__name__
        for rows in range(40)
    }
    parted = {torch.float32: products.PARTED_ROWS}
    own = (products.TURNED_ROWS if intels else parted).get(dtype, ())
    assert {rows for rows, way in ways.items() if way != "linear"} == set(own)
    assert set(ways.values()) - {"linear"} <= {"_turned" if intels else "_in_parts"}
    asked = weight.new_empty(8, 32).requires_grad_()
    assert products.few_rows(asked, (weight,)) is F.linear


@pytest.mark.parametrize("way", [products._turned, products._in_parts])
@pytest.mark.parametrize("outputs", [24, 32, 16, 7, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_is_the_product(way: products.Multiply, outputs: int, dtype: torch.dtype) -> None:
    weight, bias = made(outputs, 32, dtype=dtype, seed=1), made(outputs, dtype=dtype, seed=2)
    x = made(2, 6, 32, dtype=dtype)
    for rows in (x, x[:1, :1], x[:, :2], x[0, :3].T.contiguous().T):  # many, one, few, strided
        exact = rows.double() @ weight.double().T
        assert_close(way(rows, weight, None), exact, dtype)
        assert_close(way(rows, weight, bias), exact + bias.double(), dtype)
        assert way(rows, weight, bias).is_contiguous()
    columns = made(32, outputs, dtype=dtype, seed=1).T
    assert_close(way(x, columns, None), x.double() @ columns.double().T, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_of_many_rows_are_widened(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "has_instructions", lambda dtype: False)
    matrix, rows = made(12, 16, dtype=dtype, seed=1), products.LEAST_WIDE_ROWS
    x = made(rows, 16, dtype=dtype)
    on_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    assert products.widens(x, (matrix,)) == on_x86
    assert not products.widens(x[1:], (matrix,))
    assert not products.widens(x.float(), (matrix.float(),))
    if on_x86:  # rounded once: no half-precision sum is as exact
        exact = x.double() @ matrix.double().T
        error = (products.linear(x, (matrix,)) - exact).abs()
        assert bool((error <= 0.501 * torch.finfo(dtype).eps * exact.abs() + 1e-6).all())


def test_rows_may_skip_memory() -> None:
    x = made(2, 9, 16, dtype=torch.float32)[:, ::3]
    whole = made(12, 16, dtype=torch.float32, seed=1)
    residual = made(2, 9, 12, dtype=torch.float32, seed=2)[:, 1::3]
    exact = x.double() @ whole.double().T + residual
    assert_close(products.linear(x, (whole,), residual), exact, torch.float32)


def test_no_rows_give_no_rows() -> None:
    x, whole = made(1, 0, 16, dtype=torch.float32), made(12, 16, dtype=torch.float32)
    assert products.linear(x, (whole,)).shape == (1, 0, 12)
    assert reference.gated_linear(x, (whole,)).shape == (1, 0, 6)


@pytest.mark.skipif(DEVICE != "cpu", reason="oneDNN runs on CPUs")
def test_autograd_goes_through(least_work: int) -> None:
    x = made(3, 16, dtype=torch.float32).requires_grad_()
    weights = (made(12, 16, dtype=torch.float32, seed=1),)
    assert not products.fuses(x, weights)
    reference.gated_linear(x, weights).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    trained = (weights[0].clone().requires_grad_(),)
    assert not products.fuses(x.detach(), trained)
    products.linear(x.detach(), trained).sum().backward()
    assert trained[0].grad is not None
    with torch.no_grad():
        available = torch.backends.mkldnn.is_available()
        assert products.fuses(x, weights) == (available and least_work == 0)


EVER_NEW_ROWS = """
from pathlib import Path
import torch
from homer_triton.engine.heap import trim_heap
from homer_triton.kernels.products import fuses, linear

def resident():
    trim_heap()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

weights = (torch.randn(1024, 512),)
assert fuses(torch.randn(200, 512), weights)
for rows in range(100, 200):
    linear(torch.randn(rows, 512), weights)
before = resident()
for rows in range(200, 400):
    linear(torch.randn(rows, 512), weights)
print(resident() - before)
"""


@pytest.mark.process
@pytest.mark.skipif(
    not Path("/proc/self/statm").exists() or not products._is_x86(), reason="x86 Linux"
)
def test_texts_of_every_length_cost_no_memory_of_their_own() -> None:
    own = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}
    done = subprocess.run(
        [sys.executable, "-c", EVER_NEW_ROWS], env=own, capture_output=True, text=True
    )
    # 200 more kernels of half a megabyte each would take 100 MiB.
    assert float(done.stdout) < 10, done.stderr


@pytest.mark.process
def test_a_capacity_that_was_set_stays() -> None:
    script = "import os, homer_triton.kernels.products; print(os.environ['LRU_CACHE_CAPACITY'])"
    own = {**os.environ, "LRU_CACHE_CAPACITY": "7"}
    done = subprocess.run([sys.executable, "-c", script], env=own, capture_output=True, text=True)
    assert done.stdout == "7\n", done.stderr
