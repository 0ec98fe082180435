"""Where a unit's compute parameters are between uses: always here, or gathered on use.

One protocol. The walk calls `approach` early, `ready` when it needs the bytes, `release` when it does not; the stepper
writes the own box between `writable` and `publish`. Must not know: gradients, optimizers, models.
Source: Rajbhandari et al. 2020, arXiv:1910.02054, section 5.
"""

from __future__ import annotations

from typing import Protocol

import torch

from windlass.dist.comm import Pending, Symmetric
from windlass.parallel.buffers import BufferPool


class Residency(Protocol):
    """The flat compute parameters of one unit."""

    own: torch.Tensor  # the part this rank updates: (shard_numel,), or the whole when replicated
    held_bytes: int  # held between steps, without gather buffers
    transient: bool  # the whole unit exists only between `start` and `release`
    reach: int  # how many parts ahead `approach` has something to begin

    def approach(self, distance: int) -> None:
        """Begin what is due when the walk is this many parts away. Collective of the shard group, in walk order."""

    def advance(self, distance: int) -> None:
        """Begin what is due and may hold up the host: called when the work of the present part has been issued.

        Collective of the shard group, in walk order.
        """

    def start(self) -> None:
        """Begin to bring the whole unit here. Collective of the shard group, in walk order."""

    def ready(self) -> torch.Tensor:
        """Return the whole flat unit, waiting for it if need be."""

    def release(self) -> None:
        """Say that the whole unit is not needed until the next `start`."""

    def writable(self) -> None:
        """Wait until no peer still reads `own`."""

    def publish(self) -> None:
        """Say that `own` was rewritten, so that peers see the new values at their next `ready`."""


class Replicated:
    """Every rank holds and updates the whole unit (stage 0, and frozen units of stages 0-2)."""

    transient = False
    reach = 0

    def __init__(self, flat: torch.Tensor) -> None:
        self.own = flat
        self.held_bytes = flat.nbytes

    def approach(self, distance: int) -> None:
        """It is here."""

    def advance(self, distance: int) -> None:
        """It is here."""

    def start(self) -> None:
        """Nothing to bring."""

    def ready(self) -> torch.Tensor:
        return self.own

    def release(self) -> None:
        """Resident: nothing to release."""

    def writable(self) -> None:
        """No peer reads it."""

    def publish(self) -> None:
        """Every rank made the same update."""


class Resident:
    """Every rank holds the whole unit and updates its own box, which is gathered after the step (stages 1 and 2)."""

    transient = False
    reach = 0

    def __init__(self, symmetric: Symmetric, name: str) -> None:
        self._symmetric = symmetric
        self._label = f"param {name}"
        self._pending: Pending[None] | None = None
        self.own = symmetric.mine
        self.held_bytes = symmetric.tensor.nbytes

    def approach(self, distance: int) -> None:
        """The gather began at `publish`."""

    def advance(self, distance: int) -> None:
        """The gather began at `publish`."""

    def start(self) -> None:
        """The gather began at `publish`."""

    def ready(self) -> torch.Tensor:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.wait()
        return self._symmetric.tensor

    def release(self) -> None:
        """Resident: nothing to release."""

    def writable(self) -> None:
        self.ready()
        self._symmetric.wait_free()

    def publish(self) -> None:
        self._pending = self._symmetric.all_gather(tag="param", label=self._label)


class GatherOnUse:
    """Every rank holds its own box; the whole exists only between `start` and `release` (stage 3).

    The gather begins `reach` parts ahead of the use.
    """

    transient = True

    def __init__(self, symmetric: Symmetric, padded: int, pool: BufferPool, name: str, reach: int) -> None:
        self.reach = reach
        self._symmetric = symmetric
        self._padded = padded
        self._pool = pool
        self._label = f"param {name}"
        self._flat: torch.Tensor | None = None
        self._pending: Pending[None] | None = None
        self.own = symmetric.tensor
        self.held_bytes = symmetric.tensor.nbytes

    def approach(self, distance: int) -> None:
        if distance <= self.reach:
            self.start()

    def advance(self, distance: int) -> None:
        """A gather from the device holds nothing up, so it began before."""

    def start(self) -> None:
        if self._flat is None:
            self._flat = self._pool.take(self._padded, self.own.dtype)
            self._pending = self._symmetric.gather_into(self._flat, tag="param", label=self._label)

    def ready(self) -> torch.Tensor:
        self.start()
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.wait()
        assert self._flat is not None
        return self._flat

    def release(self) -> None:
        if self._flat is not None:
            flat, self._flat = self.ready(), None
            self._pool.give(flat)

    def writable(self) -> None:
        self.release()
        self._symmetric.wait_free()

    def publish(self) -> None:
        """Peers read the box itself at their next gather."""
