"""The simulation of many GPUs: its bounds, and what it says of eight of them."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))

from random_models import SHAPES  # noqa: E402
from ranks import Machine, simulate  # noqa: E402

import homer_triton as ht  # noqa: E402
from homer_triton.engine.tree import Plan  # noqa: E402
from homer_triton.model.config import ModelConfig  # noqa: E402

SHAPE = ModelConfig.from_hf(SHAPES["Llama-3-8B"].config(torch.bfloat16))
CONFIG = ht.HomerConfig.paper(layers_warmup=12)


def plan(ranks: int, tokens: int = 256 * 2015) -> Plan:
    return ht.plan(SHAPE, tokens, 16, 16, CONFIG, 2, ranks=ranks)


def test_one_gpu_takes_what_its_operations_take() -> None:
    alone = plan(1)
    assert simulate(alone, SHAPE, 2, 1, Machine(1e12, 1.0, 1.0)) == pytest.approx(
        [alone.flops(SHAPE) / 1e12] * 2
    )


@pytest.mark.parametrize("ranks", [2, 3, 7, 8])
def test_ranks_wait_for_what_is_on_its_way(ranks: int) -> None:
    tree = plan(ranks)
    at_once, late, slow = (
        simulate(tree, SHAPE, 2, ranks, machine)
        for machine in (Machine(1e14, 1e30, 0.0), Machine(1e14, 1e30, 9.0), Machine(1e14, 1e6, 0.0))
    )
    assert at_once[:-1] == late[:-1] == slow[:-1]  # they work no longer
    assert max(at_once[:-1]) <= at_once[-1] < late[-1] < at_once[-1] + 9.0 * ranks
    assert slow[-1] > at_once[-1] + 9.0


def test_eight_ranks_are_nine_tenths_of_linear_on_256_leaves() -> None:
    """An H200's rate, and a network's."""
    alone, shared = plan(1, 256 * 2000), plan(8, 256 * 2000)
    assert len(shared.levels[0].nodes) == 256
    machine = Machine(6e14, 5e10, 2e-5)
    seconds = simulate(shared, SHAPE, 2, 8, machine)[-1]
    assert simulate(alone, SHAPE, 2, 1, machine)[-1] / seconds >= 0.9 * 8
