"""Records lent to whoever saves or restores state, one at a time, so that no more than one is in memory for it.

Must not know: checkpoints, what the bytes mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from windlass.offload.lane import Lanes
from windlass.offload.slabs import Slab, SlabPool
from windlass.offload.store import Lease, TensorStore


@dataclass(frozen=True)
class _Loan:
    key: str
    offset: int
    bytes: torch.Tensor
    write: bool
    lease: Lease | None = None
    slab: Slab | None = None


class Loans:
    """Lends records, or parts of them, out of the store.

    Blocks:     host, until what is lent is in memory and what was lent before is back
    """

    def __init__(self, store: TensorStore, lanes: Lanes) -> None:
        self._store, self._lanes = store, lanes
        self._loan: _Loan | None = None

    def borrow(self, key: str, *, write: bool) -> torch.Tensor:
        """Return a record's bytes; with `write` they go back as its latest version."""
        if not self._has(key, 0, write):
            self.give_back()
            lease = self._lanes.wait(self._store.fetch(key), key)
            self._loan = _Loan(key, 0, lease.ready(), write, lease=lease)
        assert self._loan is not None
        return self._loan.bytes

    def borrow_part(self, key: str, offset: int, num_bytes: int, pool: SlabPool | None, *, write: bool) -> torch.Tensor:
        """Return some of the bytes of a record with one slot, which pass through a slab of `pool` if it is on nvme."""
        if not self._store.on_file(key):
            return self._store.memory(key)[offset : offset + num_bytes]
        if not self._has(key, offset, write):
            self.give_back()
            assert pool is not None
            slab = self._lanes.wait(pool.take(key), "a slab")
            part = slab.bytes[:num_bytes]
            if self._store.written(key, offset):
                self._lanes.wait(self._store.read(key, offset, num_bytes, lambda: part), key)
            self._loan = _Loan(key, offset, part, write, slab=slab)
        assert self._loan is not None
        return self._loan.bytes

    def _has(self, key: str, offset: int, write: bool) -> bool:
        loan = self._loan
        return loan is not None and (loan.key, loan.offset, loan.write) == (key, offset, write)

    def give_back(self) -> None:
        """Return what is lent."""
        loan, self._loan = self._loan, None
        if loan is None:
            return
        if loan.lease is not None and loan.write:
            self._lanes.wait(self._store.put(loan.key, self._lanes.done(loan.lease)), loan.key)
            self._store.commit([loan.key])
        elif loan.lease is not None:
            self._store.drop(loan.lease)
        elif loan.slab is not None:
            if loan.write:
                whole = loan.bytes
                self._lanes.wait(self._store.write(loan.key, loan.offset, whole.numel(), lambda: whole), loan.key)
            loan.slab.give()
