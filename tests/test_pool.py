"""The slot pool against a set of numbers."""

import pytest
import torch
from cases import REPEATABLE
from hypothesis import given
from hypothesis import strategies as st

from homer_triton.engine.pool import SlotPool


def make_pool(slots: int, reserved: int) -> SlotPool:
    return SlotPool(torch.empty(1, 2, slots, 1, 2), reserved)


@REPEATABLE
@given(reserved=st.integers(0, 5), moves=st.lists(st.tuples(st.booleans(), st.integers(0, 8))))
def test_no_slot_has_two_owners(reserved: int, moves: list[tuple[bool, int]]) -> None:
    slots = 20
    pool = make_pool(slots, reserved)
    owned: list[int] = []
    most = 0
    for takes, count in moves:
        if takes and count > slots - reserved - len(owned):
            with pytest.raises(RuntimeError, match=f"{count} were asked for"):
                pool.take(count)
        elif takes:
            taken = pool.take(count).tolist()
            assert len(taken) == count
            assert not set(taken) & set(owned)
            assert all(reserved <= slot < slots for slot in taken)
            owned += taken
        else:
            given_back, owned = owned[:count], owned[count:]
            pool.give(torch.tensor(given_back, dtype=torch.int64))
        most = max(most, len(owned))
        assert pool.live == reserved + len(owned)
        assert pool.high_water == reserved + most
    assert len({*owned, *pool.take(slots - pool.live).tolist()}) == slots - reserved


def test_taken_slots_do_not_change_with_later_calls() -> None:
    pool = make_pool(6, 1)
    first = pool.take(3)
    before = first.tolist()
    pool.give(pool.take(2))
    pool.give(torch.tensor([before[::-1]]))
    assert first.tolist() == before
