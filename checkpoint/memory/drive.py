"""The snapshots on this node's drive, read for those who look for something to restore.

Must not know: torch, networks, who writes them (local_level.py knows how they look).
"""

from __future__ import annotations

import contextlib
import threading
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
    """The local level of one node; nothing is open until somebody asks. Any thread."""

    def __init__(self, folder: NodeFolder, local_dir: str) -> None:
        self.local_dir = local_dir
        self._level = LocalLevel(folder, local_dir) if local_dir else None
        self._open: dict[tuple[Path, int], Segment] = {}  # by inode too: a step may be written anew
        self._lock = threading.Lock()

    def steps(self) -> list[LocalStep]:
        """Return the complete steps, newest first."""
        return self._level.complete() if self._level is not None else []

    def _segments(self) -> Iterator[tuple[LocalStep, str, int, Path]]:
        for step in self.steps():
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile: it was not among the newest
                for (role, rank), path in step.segments().items():
                    yield step, role, rank, path

    def _segment(self, path: Path) -> Segment:
        key = (path, path.stat().st_ino)
        if key not in self._open:
            self._open[key] = Segment.open(path)
        return self._open[key]

    def inventory(self) -> list[SlotHeader | dict[str, Any]]:
        """Return what every segment holds; for one that cannot be read, why not."""
        out: list[SlotHeader | dict[str, Any]] = []
        with self._lock:
            for step, role, rank, path in self._segments():
                known = {"tier": "local", "rank": rank, "role": role, "step": step.step, "generation": step.generation}
                try:
                    header = self._segment(path).slots[0].header()
                    out.append(header or {**known, "state": 0, "ok": False, "why": f"{path} is damaged"})
                except (CheckpointError, OSError) as error:
                    out.append({**known, "state": 0, "ok": False, "why": str(error)})
            self._forget_removed()
        return out

    def find(self, role: str, rank: int, step: int, generation: int) -> tuple[Slot, SlotHeader] | None:
        """Return the slot that holds a rank's step, if one does."""
        with self._lock:
            for found, its_role, its_rank, path in self._segments():
                if (its_role, its_rank, found.step, found.generation) == (role, rank, step, generation):
                    with contextlib.suppress(FileNotFoundError):
                        slot = self._segment(path).slots[0]
                        header = slot.header()
                        if header is not None and (header.step, header.generation) == (step, generation):
                            return slot, header
        return None

    def _forget_removed(self) -> None:
        for path, inode in list(self._open):
            if not path.exists():
                self._open.pop((path, inode)).close()

    def memberships(self) -> list[int]:
        """Return the generations whose membership lies beside a step."""
        return sorted({step.generation for step in self.steps()})

    def read_membership(self, generation: int) -> bytes | None:
        """Return the membership of a generation."""
        for step in self.steps():
            with contextlib.suppress(FileNotFoundError):
                text = step.membership_path.read_bytes()
                if step.generation == generation and Membership.parse(text).generation == generation:
                    return text
        return None

    def read_layout(self, digest: str) -> Layout | None:
        """Return a layout that lies beside a step."""
        for step in self.steps():
            with contextlib.suppress(FileNotFoundError):
                return Layout.parse(step.layout_path(digest).read_bytes(), digest)
        return None

    def close(self) -> None:
        """Close what is open."""
        with self._lock:
            for segment in self._open.values():
                segment.close()
            self._open = {}
