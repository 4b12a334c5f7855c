"""Micro benchmarks of the ops with pytest-benchmark: PyTorch's anywhere, Triton's on a GPU.

    pytest bench/micro.py --benchmark-only

The input is one chunk, of a small model on a CPU and of Llama-3-8B's shape on a GPU. The time is
that of the whole call, including the launch. `bench/kernels.py` measures the GPU's own time, and
compares with other kernels.
"""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from homer_triton import kernels
from homer_triton.kernels import reference

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
ROWS, HIDDEN, HEADS, KEY_HEADS, DIM = (2048, 4096, 32, 8, 128) if ON_GPU else (512, 512, 8, 4, 64)
SUFFIX, KEPT, ASKING = ROWS // 16, ROWS // 2, ROWS // 64
OPS = {"torch": reference} | ({"triton": kernels} if ON_GPU else {})

Call = Callable[[], object]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE, device=DEVICE)


def calls(ops: ModuleType) -> dict[str, Call]:
    """A call of each op."""
    x, weight, gate_up = random(1, ROWS, HIDDEN), random(HIDDEN), random(1, ROWS, 6 * HIDDEN)
    q, k = random(1, ROWS, HEADS, DIM), random(1, ROWS, KEY_HEADS, DIM)
    rows = torch.arange(ROWS, device=DEVICE)[None]
    angles = torch.rand(ROWS, DIM // 2, device=DEVICE)
    cache = random(4, 2, 2 * ROWS, KEY_HEADS, DIM)
    finished = torch.empty(2, 4, KEY_HEADS, ROWS, DIM, dtype=DTYPE, device=DEVICE)
    kept, child = rows[:, -KEPT:], random(1, KEPT, HIDDEN)
    labels = torch.stack([rows] * 3, dim=1)
    selection = (q[:, -1], k, rows, None, KEPT - SUFFIX, 0, ROWS - SUFFIX)
    children = (child, child, labels, labels + ROWS, kept, kept, SUFFIX)
    return {
        "rms_norm": lambda: ops.rms_norm(x, weight, 1e-5),
        "add_rms_norm": lambda: ops.add_rms_norm(x, x, weight, 1e-5),
        "silu_mul": lambda: ops.silu_mul(gate_up),
        "rotary_and_store_": lambda: ops.rotary_and_store_(
            q, k, k, rows, angles, angles, cache[0, 0], cache[0, 1], rows
        ),
        "causal_attention": lambda: ops.causal_attention(q, k, k),
        "causal_attention, half the rows": lambda: ops.causal_attention(
            q[:, -KEPT:], k, k, query_rows=kept
        ),
        "score_and_select": lambda: ops.score_and_select(*selection),
        "vote_and_select": lambda: ops.vote_and_select(
            q[:, -ASKING:], k, k[0, :1], None, *selection[-3:], reach=(15, 15)
        ),
        "prune_and_concatenate": lambda: ops.prune_and_concatenate(*children),
        "average_affix_": lambda: ops.average_affix_(cache, rows[:, :SUFFIX], rows[:, -SUFFIX:]),
        "gather_cache_": lambda: ops.gather_cache_(cache, rows[0], *finished),
    }


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("name", calls(reference))
def test_speed(benchmark: BenchmarkFixture, name: str, ops: str) -> None:
    call = calls(OPS[ops])[name]

    def finish() -> None:
        call()
        if ON_GPU:
            torch.cuda.synchronize()

    benchmark.group = name
    benchmark(finish)
