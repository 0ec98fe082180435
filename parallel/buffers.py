"""Scratch memory of the walk: buffers that many units use in turn.

On CPU the first touch of fresh memory costs more than the copy into it, so buffers are kept and handed out again; on
CUDA the caching allocator does exactly that already. Must not know: what the buffers hold.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch

from windlass.dist.comm import Pending, Symmetric

Account = Callable[[str, int], None]  # (state class, bytes) -> None; negative bytes are given back


class BufferPool:
    """Plain buffers for gathered parameters, reused by size."""

    def __init__(self, device: torch.device, account: Account) -> None:
        self._device = device
        self._account = account
        self._free: dict[tuple[int, torch.dtype], list[torch.Tensor]] = defaultdict(list)

    def take(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        free = self._free[(numel, dtype)]
        if free:
            return free.pop()
        self._account("gather", numel * dtype.itemsize)
        return torch.zeros(numel, dtype=dtype, device=self._device)

    def give(self, buffer: torch.Tensor) -> None:
        if self._device.type == "cpu":
            self._free[(buffer.numel(), buffer.dtype)].append(buffer)
        else:
            self._account("gather", -buffer.numel() * buffer.dtype.itemsize)


class GradSlot:
    """A full-unit gradient buffer that peers can read, and the reduction still reading it."""

    def __init__(self, symmetric: Symmetric) -> None:
        self.symmetric = symmetric
        self.pending: Pending[None] | None = None
        self.layout: object = None  # what wrote it last: another layout has other gaps, which must read as zero
        self.held = False  # between `take` and the start of its reduction

    def settle(self) -> None:
        """Finish the reduction that reads this slot, if one is under way."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.wait()


class SlotPool:
    """Gradient slots by size. Two per size: one being filled while the other is being reduced.

    Invariant: every rank takes slots in the same order, because every rank walks the same stages.
    """

    def __init__(self, make: Callable[[int, str], Symmetric]) -> None:
        self._make = make
        self._slots: dict[int, list[GradSlot]] = defaultdict(list)
        self._users: dict[int, int] = defaultdict(int)

    def register(self, shard_numel: int) -> None:
        """Say that one more unit of this size will take slots (at build time; at most two slots are made)."""
        self._users[shard_numel] += 1
        if len(self._slots[shard_numel]) < min(2, self._users[shard_numel]):
            name = f"grad slot {shard_numel}/{len(self._slots[shard_numel])}"
            self._slots[shard_numel].append(GradSlot(self._make(shard_numel, name)))

    def take(self, shard_numel: int, layout: object) -> GradSlot:
        slots = self._slots[shard_numel]
        slot = next(s for s in slots if not s.held)  # a tied unit holds one through the whole backward, never both
        slots.remove(slot)
        slots.append(slot)
        slot.settle()
        slot.held = True
        slot.symmetric.wait_free()
        if slot.layout != layout:
            slot.symmetric.tensor.zero_()
            slot.layout = layout
        return slot
