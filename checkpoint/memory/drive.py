"""The snapshots on this node's drive, read for those who look for something to restore.

Must not know: torch, networks, who writes them (local_level.py knows how they look).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from windlass.checkpoint.local_level import LocalLevel, LocalStep
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.header import SlotHeader
from windlass.checkpoint.memory.layout import Layout
from windlass.checkpoint.memory.membership import Membership
from windlass.checkpoint.memory.segment import Segment, Slot
from windlass.dist.errors import CheckpointError


class Drive:
    """The local level of one node. Any thread.

    Invariant: nothing is open between two calls, so a step that is removed gives its room back
    """

    def __init__(self, folder: NodeFolder, local_dir: str) -> None:
        self.local_dir = local_dir
        self._level = LocalLevel(folder, local_dir) if local_dir else None

    def steps(self) -> list[LocalStep]:
        """Return the complete steps, newest first."""
        return self._level.complete() if self._level is not None else []

    def _segments(self) -> Iterator[tuple[LocalStep, str, int, Path]]:
        for step in self.steps():
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile: it was not among the newest
                for (role, rank), path in step.segments().items():
                    yield step, role, rank, path

    def inventory(self) -> list[SlotHeader | dict[str, Any]]:
        """Return what every segment holds; for one that cannot be read, why not."""
        out: list[SlotHeader | dict[str, Any]] = []
        for step, role, rank, path in self._segments():
            known = {"tier": "local", "rank": rank, "role": role, "step": step.step, "generation": step.generation}
            try:
                header = _read(path)[1]
                out.append(header or {**known, "state": 0, "ok": False, "why": f"{path} is damaged"})
            except (CheckpointError, OSError) as error:
                out.append({**known, "state": 0, "ok": False, "why": str(error)})
        return out

    def find(self, role: str, rank: int, step: int, generation: int) -> tuple[Slot, SlotHeader] | None:
        """Return the slot that holds a rank's step, if one does; its data stays mapped as long as it is held."""
        for found, its_role, its_rank, path in self._segments():
            if (its_role, its_rank, found.step, found.generation) == (role, rank, step, generation):
                with contextlib.suppress(FileNotFoundError):
                    slot, header = _read(path)
                    if header is not None and (header.step, header.generation) == (step, generation):
                        return slot, header
        return None

    def memberships(self) -> list[int]:
        """Return the generations whose membership lies beside a step."""
        return sorted({step.generation for step in self.steps()})

    def read_membership(self, generation: int) -> bytes | None:
        """Return the membership of a generation."""
        for step in self.steps():
            if step.generation == generation:
                with contextlib.suppress(CheckpointError, OSError):  # damaged or removed: an older step has it too
                    text = step.membership_path.read_bytes()
                    if Membership.parse(text).generation == generation:
                        return text
        return None

    def read_layout(self, digest: str) -> Layout | None:
        """Return a layout that lies beside a step."""
        for step in self.steps():
            with contextlib.suppress(CheckpointError, OSError):  # damaged or removed: an older step may have it too
                return Layout.parse(step.layout_path(digest).read_bytes(), digest)
        return None


def _read(path: Path) -> tuple[Slot, SlotHeader | None]:
    """Return the only slot of a file, which is closed again, and what it holds."""
    with contextlib.closing(Segment.open(path)) as segment:
        slot = segment.slots[0]
        return slot, slot.header()
