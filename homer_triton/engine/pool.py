"""The slots that all live nodes of a tree share: keys and values are written once and never move
(Kwon et al. 2023).

Pruning frees slots, merging joins two lists of them. How many are taken and freed is known
beforehand, only which ones depends on the data, so the free list is a stack on the device and no
call waits for it.
"""

import torch
from torch import Tensor

from ..model.llama import Llama
from .tree import Plan


class SlotPool:
    """A cache [L, 2, slots, HKV, D] with a stack of its free slots; the first `reserved` are never
    handed out.
    """

    def __init__(self, cache: Tensor, reserved: int) -> None:
        self.cache = cache
        self._reserved, self._capacity = reserved, cache.shape[2]
        self.clear()

    def clear(self) -> None:
        """Free all slots but the reserved ones."""
        self.high_water = self._reserved
        self._free = torch.arange(self._reserved, self._capacity, device=self.cache.device)
        self._left = self._capacity - self._reserved

    @property
    def live(self) -> int:
        """Slots in use, the reserved ones included."""
        return self._capacity - self._left

    def take(self, count: int) -> Tensor:
        """`count` free slots, [count] int64. Raises `RuntimeError` when the pool has fewer."""
        if count > self._left:
            raise RuntimeError(f"the pool has {self._left} free slots, {count} were asked for")
        self._left -= count
        self.high_water = max(self.high_water, self.live)
        return self._free[self._left : self._left + count].clone()

    def give(self, slots: Tensor) -> None:
        """Return slots of any shape, each taken before."""
        count = slots.numel()
        self._free[self._left : self._left + count] = slots.flatten()
        self._left += count


def make_pools(model: Llama, plan: Plan, documents: int = 1) -> list[SlotPool]:
    """Each level's pool of just the slots that a plan needs, the prefix's reserved."""
    return [
        SlotPool(model.new_cache(slots, level.last_layer - level.first_layer), plan.prefix_len)
        for level, slots in zip(plan.levels, plan.slots(documents), strict=True)
    ]
