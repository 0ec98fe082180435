"""State files for tests: two keys in a temporary folder, bytes that can be told apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch

from windlass.offload.engines import PAGE, ThreadEngine, page_buffer
from windlass.offload.extents import Extent
from windlass.offload.nvme import StateFile

EXTENTS = (Extent("a", 3 * PAGE, 2), Extent("b", PAGE + 1, 1))


def pages(count: int, seed: int = 0) -> torch.Tensor:
    """Return random bytes that begin at a page."""
    buffer = page_buffer(count * PAGE)
    return buffer.copy_(torch.randint(0, 256, (count * PAGE,), generator=torch.Generator().manual_seed(seed)))


def read(file: StateFile, key: str, slot: int, count: int, offset: int = 0) -> torch.Tensor:
    """Read pages of a slot."""
    file.read(key, slot, offset, out := page_buffer(count * PAGE))
    return out


class Drive:
    """A folder that stands for a drive. What was opened through it is closed at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: list[StateFile] = []

    def __enter__(self) -> Drive:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in self._files:
            file.close()

    def create(self, extents: Sequence[Extent] = EXTENTS, **changes: Any) -> StateFile:
        file = StateFile.create(self.folder, 0, extents, **self._settings(changes))
        self._files.append(file)
        return file

    def reopen(self, extents: Sequence[Extent] = EXTENTS, **changes: Any) -> StateFile | None:
        file = StateFile.reopen(self.folder, 0, extents, **self._settings(changes))
        self._files += [file] if file is not None else []
        return file

    def _settings(self, changes: dict[str, Any]) -> dict[str, Any]:
        return {"engine": ThreadEngine(), "checksums": False, "identity": {"run": 1}, "warn": pytest.fail} | changes
