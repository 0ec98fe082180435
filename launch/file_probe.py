"""A file on a drive that is read and written for measurements, with what it takes to measure the drive and not a cache.

It is written whole and read back once before anything counts, its bytes do not compress, it bypasses the page cache
where the file system allows, and it loses its name as soon as it is open, so nothing is left however the process ends.
Must not know: what is measured when.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

import torch

from windlass.dist.errors import OffloadError
from windlass.launch.drives import IN_MEMORY, file_system, missing_folder
from windlass.offload.engines import BLOCK_BYTES, REFUSED, ThreadEngine, page_buffer


class FileProbe:
    """One file, to be used as a context. `read` and `write` may run at the same time, one thread each.

    `how` says in a few words by which way the bytes go, `notes` what a reader of the figures must know.
    Raises:      OffloadError for a folder that is missing or too full, or that gives back other bytes than were written
    """

    def __init__(self, folder: Path, num_bytes: int) -> None:
        self.folder = folder
        self._num_blocks = max(num_bytes // BLOCK_BYTES, 2)
        self.how, self.notes = "direct, 8 MiB blocks", list[str]()
        generator = torch.Generator().manual_seed(0)
        self._data, self._found = page_buffer(BLOCK_BYTES), page_buffer(BLOCK_BYTES)
        self._data.view(torch.int64).random_(generator=generator)
        self._engine = ThreadEngine()

    def __enter__(self) -> FileProbe:
        problem = missing_folder(str(self.folder))
        if problem:
            raise OffloadError(f"{self.folder}: {problem}.")
        self._open()
        try:
            self._fill()
        except BaseException:
            self._engine.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.close()

    def read(self, index: int) -> float:
        """Read one block, the first half of the file over and over."""
        self._engine.read(index % self._half * BLOCK_BYTES, self._found)
        return float(BLOCK_BYTES)

    def write(self, index: int) -> float:
        """Write one block, the second half of the file over and over."""
        self._engine.write((self._half + index % (self._num_blocks - self._half)) * BLOCK_BYTES, self._data)
        return float(BLOCK_BYTES)

    def sync(self) -> None:
        """Make what was written durable."""
        self._engine.sync()

    @property
    def _half(self) -> int:
        return self._num_blocks // 2

    def _open(self) -> None:
        wanted, free = self._num_blocks * BLOCK_BYTES, shutil.disk_usage(self.folder).free
        if free < wanted:
            raise OffloadError(
                f"{self.folder}: a file of {wanted} bytes is needed to measure it, {free} are free. Free some space, "
                f"or use --size {max(free // 2 // BLOCK_BYTES, 2) * BLOCK_BYTES}."
            )
        fd, name = tempfile.mkstemp(prefix=".windlass-bench-", dir=self.folder)
        try:
            os.posix_fallocate(fd, 0, wanted)
            try:
                self._engine.open(Path(name), wanted)
            except OSError as error:
                if error.errno not in REFUSED:
                    raise
                self._engine.open(Path(name), wanted, direct=False)
                self.how = "through the page cache, dropped after use"
                self.notes.append(
                    f"{self.folder}: direct transfers are refused here. Figures are through the page cache, flushed "
                    "after writes and dropped before reads; offloading would displace host memory the same way."
                )
        except OSError as error:
            raise OffloadError(f"{self.folder}: {error.strerror or error}. Give a folder on a local drive.") from error
        finally:
            os.close(fd)
            os.unlink(name)
        kind = file_system(self.folder)
        if kind in IN_MEMORY:
            self.notes.append(f"{self.folder}: this is host memory ({kind}), not a drive. Give a folder on a drive.")

    def _fill(self) -> None:
        """Write every block and see that it comes back: an extent that was never written reads as zeros, at no cost."""
        for block in range(self._num_blocks):
            self._data[:8].view(torch.int64).fill_(block)
            self._engine.write(block * BLOCK_BYTES, self._data)
        self._engine.sync()
        for block in range(self._num_blocks):
            self._data[:8].view(torch.int64).fill_(block)
            self._engine.read(block * BLOCK_BYTES, self._found)
            if not torch.equal(self._data, self._found):
                raise OffloadError(
                    f"{self.folder}: block {block} of a file just written reads back as other bytes. Do not use this "
                    "drive; check it (smartctl -a, dmesg)."
                )
