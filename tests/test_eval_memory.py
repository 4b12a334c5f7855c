"""Peak memory as the process and the GPU tell it."""

from pathlib import Path

import pytest
import torch

from homer_triton.evaluation import memory
from homer_triton.evaluation.memory import watch_peak

CPU = torch.device("cpu")
LARGE = 64 * 2**20


def test_the_peak_is_what_came_on_top_and_went() -> None:
    kept = torch.ones(LARGE // 4)
    peak_above = watch_peak(CPU)
    torch.ones(LARGE // 4)
    assert 0.9 * LARGE < peak_above() < 1.5 * LARGE
    assert watch_peak(CPU)() < LARGE // 8
    assert kept[-1] == 1


def test_a_system_that_does_not_tell_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError("read-only")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert watch_peak(CPU)() is None
    monkeypatch.undo()
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    assert watch_peak(CPU)() is None


@pytest.mark.gpu
def test_a_gpu_tells_what_its_allocator_gave() -> None:
    device = torch.device("cuda")
    kept = torch.ones(LARGE // 4, device=device)
    peak_above = watch_peak(device)
    torch.ones(LARGE // 4, device=device)
    assert peak_above() == LARGE
    assert kept[-1] == 1
