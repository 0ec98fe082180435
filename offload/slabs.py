"""Host memory for what is on its way between tiers: page-aligned, touched, page-locked at its exact size, lent in turn.

Slabs of a pool are all alike and are never freed while training runs; who asks first is served first.
Must not know: records, lanes, files.
Source: the rules on memory and on order in the design's sections 14.6 and 14.7.
"""

from __future__ import annotations

import mmap
import threading
import warnings
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

import torch

from windlass.dist.device import Device, available_host_bytes
from windlass.dist.errors import OffloadError, TierOutOfMemory
from windlass.offload.ledger import TierLedger
from windlass.offload.placement import pages


class Memory(Protocol):
    """What slabs are cut from."""

    def allocate(self, num_bytes: int, state: str, requester: str) -> torch.Tensor:
        """Return at least these bytes, booked under this class of state."""


class HostMemory:
    """Ordinary host memory in whole pages, page-locked where there is an accelerator; all of it is held until `close`.

    `warn` is told once if the driver does not page-lock: copies are slower then and hold up the thread that makes them.
    """

    def __init__(
        self,
        ledger: TierLedger,
        device: Device,
        *,
        require_pinned: bool = False,
        warn: Callable[[str], object] = warnings.warn,
    ) -> None:
        self.ledger, self.device, self.require_pinned, self.warn = ledger, device, require_pinned, warn
        self._held: list[tuple[torch.Tensor, str, bool]] = []  # bytes, class of state, whether the driver locked them
        self._warned = False

    def allocate(self, num_bytes: int, state: str, requester: str) -> torch.Tensor:
        """Return zeroed bytes: as many as asked for, in whole pages, at a page.

        Raises: TierOutOfMemory if they are over the budget or the host has not got them; OffloadError if they must be
                page-locked and cannot be
        """
        size = pages(num_bytes)
        if size == 0:
            return torch.empty(0, dtype=torch.uint8)
        self.ledger.add("host", state, size, requester)
        try:
            memory = _mapped(size, requester)
            locked = self._lock(memory, requester)
        except OffloadError:
            self.ledger.drop("host", state, size)
            raise
        self._held.append((memory, state, locked))
        return memory

    def close(self) -> None:
        """Give all of it back; a tensor that is still in use keeps its own bytes alive."""
        held, self._held = self._held, []
        for memory, state, locked in held:
            if locked:
                self.device.unregister(memory)
            self.ledger.drop("host", state, memory.numel())

    def _lock(self, memory: torch.Tensor, requester: str) -> bool:
        """Page-lock memory if there is an accelerator; return whether it is locked."""
        if self.device.kind == "cpu":
            return False
        refusal = self.device.register(memory)
        if not refusal:
            return True
        text = f"{memory.numel()} bytes of host memory for {requester} cannot be page-locked: {refusal}"
        if self.require_pinned:
            raise OffloadError(f"{text}. Raise the limit (ulimit -l unlimited), or lower offload.host_bytes")
        if not self._warned:
            self._warned = True
            self.warn(f"{text}. Copies to and from the device will be slower; ulimit -l unlimited may help")
        return False


def _mapped(size: int, requester: str) -> torch.Tensor:
    """Return memory from the kernel at its exact size (allocators round up), in large pages where it has them."""
    free = available_host_bytes()
    if size > free:
        raise TierOutOfMemory(
            f"tier 'host': {requester} asks for {size} bytes, this host has {free} left. Lower offload.host_bytes or "
            "offload.slabs, or move state to nvme"
        )
    try:
        region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise TierOutOfMemory(
            f"tier 'host': {requester} asks for {size} bytes, which the kernel refuses: {error}. Lower "
            "offload.host_bytes or offload.slabs, or raise the limit on address space (ulimit -v)"
        ) from error
    if size >= 2 << 20 and hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    # The tensor keeps the mapping alive. Every page is touched now: a fault during a step would be booked as copying.
    return torch.frombuffer(region, dtype=torch.uint8).zero_()


class Slab:
    """One slab, lent: good until `give`."""

    def __init__(self, pool: SlabPool, number: int, memory: torch.Tensor, label: str) -> None:
        self.number, self.label = number, label
        self._pool, self._memory = pool, memory
        self._given = False

    @property
    def bytes(self) -> torch.Tensor:
        """All of it. Raises: OffloadError after `give`"""
        if self._given:
            raise OffloadError(f"pool '{self._pool.name}': {self} is used after it was given back")
        return self._memory

    def view(self, dtype: torch.dtype, numel: int, offset_bytes: int = 0) -> torch.Tensor:
        """Return elements of the slab from an offset on.

        Raises: OffloadError if they are not inside it, or after `give`
        """
        end = offset_bytes + numel * dtype.itemsize
        if not 0 <= offset_bytes <= end <= self.bytes.numel() or offset_bytes % dtype.itemsize:
            raise OffloadError(
                f"pool '{self._pool.name}': {numel} elements of {dtype} at byte {offset_bytes} must lie inside {self} "
                f"of {self.bytes.numel()} bytes, at a multiple of {dtype.itemsize}"
            )
        return self.bytes[offset_bytes:end].view(dtype)

    def give(self) -> None:
        """Give it back; the next in turn gets it.

        Raises: OffloadError if it was given back before
        """
        self._pool._take_back(self)

    def __str__(self) -> str:
        return f"slab {self.number} for '{self.label}'"


class SlabTurn(Future[Slab]):
    """A place in the queue for a slab."""

    def __init__(self, pool: SlabPool, label: str) -> None:
        super().__init__()
        self.lane, self.for_what = f"{pool.name} slabs", label
        self.label = f"a slab of pool '{pool.name}' for '{label}'"


class SlabPool:
    """Equal slabs of one memory, lent in the order in which they are asked for.

    `poison` fills a slab with NaN when it comes back, so that whoever reads bytes that were never written notices.
    Invariant:  a slab is lent to one at a time; safe to use from any thread
    """

    def __init__(self, memory: Memory, slab_bytes: int, count: int, name: str, *, poison: bool = False) -> None:
        if slab_bytes < 1 or count < 1:
            raise OffloadError(f"pool '{name}': {count} slabs of {slab_bytes} bytes must be at least one of one byte")
        self.name, self.count, self.slab_bytes, self.poison = name, count, pages(slab_bytes), poison
        whole = memory.allocate(self.slab_bytes * count, "slab", f"{count} slabs of pool '{name}'")
        self._slabs = [whole[i * self.slab_bytes : (i + 1) * self.slab_bytes] for i in range(count)]
        self._free = deque(range(count))
        self._turns: deque[SlabTurn] = deque()
        self._lent: dict[int, Slab] = {}
        self._lock = threading.Lock()

    def take(self, label: str) -> Future[Slab]:
        """Return a future of the next slab that is free when all who asked before have had theirs.

        Blocks:  no
        """
        turn = SlabTurn(self, label)
        with self._lock:
            self._turns.append(turn)
        self._lend()
        return turn

    def check_balanced(self, kept: int = 0) -> None:
        """Make sure that every slab is back and nobody waits for one, as at the end of a step.

        `kept`: how many stay lent from step to step.
        Raises: OffloadError naming who holds which slab and who waits
        """
        with self._lock:
            held = [str(slab) for slab in self._lent.values()]
            waiting = [f"'{turn.for_what}'" for turn in self._turns if not turn.cancelled()]
        if len(held) > kept or waiting:
            raise OffloadError(
                f"pool '{self.name}': {len(held)} of {self.count} slabs are lent at the end of the step, {kept} may "
                f"be: {', '.join(held) or 'none'}; waiting: {', '.join(waiting) or 'nobody'}. Every slab that is taken "
                "must be given back once"
            )

    def _take_back(self, slab: Slab) -> None:
        with self._lock:
            if slab._given:
                raise OffloadError(f"pool '{self.name}': {slab} is given back twice")
            slab._given = True
        if self.poison:
            slab._memory.fill_(0xFF)
        with self._lock:
            del self._lent[slab.number]
            self._free.append(slab.number)
        self._lend()

    def _lend(self) -> None:
        """Hand free slabs to those whose turn it is; whoever hears of it runs in this thread, without the lock."""
        while True:
            with self._lock:
                if not self._free or not self._turns:
                    return
                turn = self._turns.popleft()
                if not turn.set_running_or_notify_cancel():
                    continue
                number = self._free.popleft()
                slab = self._lent[number] = Slab(self, number, self._slabs[number], turn.for_what)
            turn.set_result(slab)
