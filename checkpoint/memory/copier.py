"""Copies state into slots: at once, or in a thread beside training, bucket by bucket and not faster than the link.

Fault points, in order: snapshot.chunk (before each bucket), snapshot.filled (before the slot is said to be whole).
Must not know: what the bytes are, which slot is free, who waits.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from windlass.checkpoint.memory.moves import Stretch
from windlass.checkpoint.memory.pace import Pace
from windlass.checkpoint.memory.segment import Slot, SlotHeader, State
from windlass.dist.device import Device
from windlass.dist.env import fault
from windlass.dist.errors import CheckpointError
from windlass.dist.trace import Tracer

HEADER_S = 1.0  # what another writer of a header may take


@dataclass
class Fill:
    """One snapshot on its way into its slots, which are claimed for it."""

    step: int
    facts: Callable[[], dict[str, Any]]  # worked out when everything else is there
    slots: list[tuple[Slot, SlotHeader]] = field(default_factory=list)  # parity first: whole data means all is whole
    after: Any = None  # the mark of the device behind the update
    done: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None
    copied: bool = False

    @property
    def data(self) -> Slot:
        return self.slots[-1][0]

    @property
    def parity(self) -> Slot | None:
        return self.slots[0][0] if len(self.slots) > 1 else None

    def give_up(self) -> None:
        """Free the slots: what is in them is worth nothing."""
        for slot, header in self.slots:
            slot.free(header)
        self.release()

    def release(self) -> None:
        """Let others fill the slots, when they are free again: nothing of this snapshot is written any more."""
        for slot, _ in self.slots:
            slot.release()


class Copier:
    """The hand that fills slots, for one rank. `gaps`: places of the data that nothing is copied to."""

    def __init__(
        self,
        rank: int,
        device: Device,
        pace: Pace,
        gaps: Sequence[tuple[int, int]],
        staging_bytes: int,
        tracer: Tracer | None = None,
    ) -> None:
        self.num_bytes = 0  # copied so far
        self.turned_away = 0  # fills that found a slot busy
        self._rank, self._device, self._pace, self._gaps, self._tracer = rank, device, pace, gaps, tracer
        # Parity is made on the host, of bytes that pass through page-locked memory.
        staged = staging_bytes if device.kind != "cpu" else 0
        self._staging = device.empty_pinned(staged, torch.uint8) if staged else None
        self._cleared: set[int] = set()
        self._queue: queue.SimpleQueue[tuple[Fill, Callable[[], Iterable[Stretch]]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"snapshot of rank {rank}", daemon=True)
        self._thread.start()

    def begin(self, fill: Fill, todo: Callable[[], Iterable[Stretch]]) -> None:
        """Copy what `todo` returns, beside training; `fill.done` is set when that has ended. Blocks: no."""
        self._queue.put((fill, todo))

    def close(self, timeout_s: float) -> None:
        """Finish what was begun, and end. Blocks: host."""
        self._queue.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        self._device.use()
        while (work := self._queue.get()) is not None:
            fill, todo = work
            try:
                tracer = self._tracer
                with nullcontext() if tracer is None else tracer.span("snapshot", "snapshot", step=fill.step):
                    self.fill(fill, todo())
            except Exception as error:
                fill.error = error
                fill.give_up()
            fill.done.set()

    def fill(self, fill: Fill, todo: Iterable[Stretch]) -> bool:
        """Say what is copied, copy it, then say so: first of the parity, then of the data. False if a slot is busy.

        Blocks: host
        """
        if not self._mark_filling(fill):
            self.turned_away += 1
            fill.give_up()
            return False
        if fill.data.index not in self._cleared:  # gaps hold zeros, so parity is the same whoever makes it
            self._cleared.add(fill.data.index)
            for low, high in self._gaps:
                fill.data.data[low:high] = 0
        if fill.parity is not None:
            fill.parity.data[:] = 0
        target = torch.from_numpy(fill.data.data)
        for stretch in todo:
            fault("snapshot.chunk", rank=self._rank, step=fill.step)
            size = stretch.source.numel()
            end = stretch.at + size
            if stretch.parity:
                assert fill.parity is not None
                mixed = fill.parity.data[stretch.at : end]
                np.bitwise_xor(mixed, self._on_host(stretch.source, fill.after), out=mixed)
            else:
                self._device.copy(target[stretch.at : end], stretch.source, fill.after)
                fill.data.progress = end
            self.num_bytes += size
            self._pace.spend(size)
        fault("snapshot.filled", rank=self._rank, step=fill.step)
        facts = fill.facts()
        for slot, header in fill.slots:
            slot.progress = header.num_bytes
            told = facts if slot is fill.data else {}
            if not slot.write(replace(header, state=State.COPIED, facts=told)):
                raise CheckpointError(
                    f"rank {self._rank}: somebody else wrote slot {slot.index} of {slot.segment.path} while it was "
                    f"filled with step {fill.step}. Is an older process of this rank alive?"
                )
        fill.release()
        fill.copied = True
        return True

    def _mark_filling(self, fill: Fill) -> bool:
        """Write the headers that say that the slots are being filled; False if one has changed since it was picked, or
        somebody else is writing one."""
        for place, (slot, header) in enumerate(fill.slots):
            if not slot.write(header, wait_s=HEADER_S):
                return False
            fill.slots[place] = slot, replace(header, sequence=header.sequence + 1)
        return True

    def _on_host(self, source: torch.Tensor, after: Any) -> np.ndarray:
        if source.device.type == "cpu":
            return source.numpy()
        assert self._staging is not None
        staged = self._staging[: source.numel()]
        self._device.copy(staged, source, after)
        return staged.numpy()
