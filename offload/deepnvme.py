"""DeepSpeed's asynchronous file handle (DeepNVMe, libaio) as a file engine.

The handle kills the process at a range outside the file, and reports neither short nor failed transfers: ranges are
checked here first, and whoever uses this engine compares checksums. It moves page-locked memory; other memory goes
through a page-locked block.
Must not know: keys, slots, commits.
Source: DeepSpeed 0.19, csrc/aio.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import torch

from windlass.dist import env
from windlass.dist.deepspeed_ops import load_op
from windlass.dist.errors import OffloadError
from windlass.offload.engines import BLOCK_BYTES, PAGE, require_pages

_REQUEST_BYTES = 1 << 20
_QUEUE_DEPTH = 32
_PROBE = b"#include <libaio.h>\nint main() { io_context_t c = 0; return io_destroy(c); }\n"


class _Half:
    """A handle for one direction, as waiting for one transfer waits for all of its handle."""

    def __init__(self, module: Any) -> None:
        self.handle = module.aio_handle(_REQUEST_BYTES, _QUEUE_DEPTH, False, True, 1)
        self.block = torch.empty(0, dtype=torch.uint8)  # page-locked while the file is open
        self.lock = threading.Lock()

    def open(self) -> None:
        self.block = self.handle.new_cpu_locked_tensor(BLOCK_BYTES, self.block)

    def close(self) -> None:
        self.handle.free_cpu_locked_tensor(self.block)
        self.block = torch.empty(0, dtype=torch.uint8)


class DeepSpeedEngine:
    """Reads and writes through one handle each. Always bypasses the page cache."""

    name = "deepspeed"
    alignment = PAGE
    reports_errors = False

    def __init__(self) -> None:
        """Build or load DeepSpeed's operator.

        Blocks: host, minutes on the first use on a machine
        Raises: OffloadError if something that it needs is missing
        """
        module = _load()
        self._reading, self._writing = _Half(module), _Half(module)
        self.direct = False
        self._path, self._fd, self._cancelled = Path(), -1, False

    def open(self, path: Path, num_bytes: int, *, direct: bool = True) -> None:
        """Open a file that exists.

        Raises: OSError if the file system has no direct access; OffloadError without `direct`
        """
        if not direct:
            raise OffloadError(
                f"offload.engine=deepspeed needs direct access, which {path.parent} refuses: use threads"
            )
        self._fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        self._path, self.direct, self._cancelled = path, True, False
        self._reading.open()
        self._writing.open()

    def read(self, offset: int, out: torch.Tensor) -> None:
        """Fill `out` from the file.

        Blocks: host
        Raises: OSError
        """
        self._transfer("read", offset, out)

    def write(self, offset: int, data: torch.Tensor) -> None:
        """Write all of `data` to the file.

        Blocks: host
        Raises: OSError
        """
        self._transfer("write", offset, data)

    def _transfer(self, verb: str, offset: int, buffer: torch.Tensor) -> None:
        require_pages(verb, offset, buffer)
        buffer = buffer.view(-1)
        size, total = os.fstat(self._fd).st_size, buffer.numel()
        if offset + total > size:
            raise OSError(errno.ENODATA, f"the file ends after {max(size - offset, 0)} of {total} bytes")
        half = self._reading if verb == "read" else self._writing
        straight = half.handle.is_pinned(buffer)
        with half.lock:
            for done in range(0, total, BLOCK_BYTES):
                part = buffer[done : done + BLOCK_BYTES]
                moved = part if straight else half.block[: part.numel()]
                if self._cancelled:
                    raise OSError(errno.ECANCELED, f"closed after {done} of {total} bytes")
                if verb == "write" and not straight:
                    moved.copy_(part)
                call = half.handle.sync_pread if verb == "read" else half.handle.sync_pwrite
                if call(moved, str(self._path), offset + done) != 1:
                    raise OSError(errno.EIO, f"DeepSpeed's handle refused it after {done} of {total} bytes")
                if verb == "read" and not straight:
                    part.copy_(moved)

    def sync(self) -> None:
        """Make what was written durable."""
        os.fdatasync(self._fd)

    def cancel(self) -> None:
        """Make transfers under way fail at their next block."""
        self._cancelled = True

    def close(self) -> None:
        """Close the file. Nothing may be under way."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
            self._reading.close()
            self._writing.close()


def _load() -> Any:
    if importlib.util.find_spec("deepspeed") is not None and not _links_libaio():
        raise OffloadError(
            "offload.engine=deepspeed needs libaio and its header. apt-get install libaio-dev, or use "
            "offload.engine=threads"
        )
    return load_op("async_io", "offload.engine=deepspeed", "offload.engine=threads")


def _links_libaio() -> bool:
    """Return whether a program with libaio can be built; a moment, where DeepSpeed's own answer takes minutes."""
    compiler = shutil.which(env.get("CXX", "c++"))
    if compiler is None:
        return True  # which is said, too, but not here
    command = [compiler, "-x", "c++", "-", "-laio", "-o", os.devnull]
    return subprocess.run(command, input=_PROBE, capture_output=True, check=False).returncode == 0
