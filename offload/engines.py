"""Engines that move whole pages between one file and memory: blocking calls, made from the threads of lanes.

An engine knows pages and offsets. It returns when every byte is there, or raises OSError with what came of it; it never
returns early. Must not know: keys, slots, commits, which bytes mean what.
"""

from __future__ import annotations

import errno
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from windlass.dist.errors import OffloadError

PAGE = 4096  # a multiple of every drive's logical block
BLOCK_BYTES = 8 << 20
ENGINES = ("threads", "deepspeed", "gds")
_ATTEMPTS = 100
_PAUSE_S = 0.01
REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)  # how file systems decline O_DIRECT


class FileEngine(Protocol):
    """Access to one file. Offsets, lengths and addresses are multiples of `alignment`.

    `direct`: transfers bypass the page cache. `reports_errors`: a transfer that fails raises; where it is False, only a
    checksum tells. Reads and writes may be called from several threads at a time.
    """

    name: str
    alignment: int
    reports_errors: bool

    @property
    def direct(self) -> bool: ...

    def open(self, path: Path, num_bytes: int, *, direct: bool = True) -> None: ...

    def read(self, offset: int, out: torch.Tensor) -> None: ...

    def write(self, offset: int, data: torch.Tensor) -> None: ...

    def sync(self) -> None: ...

    def cancel(self) -> None: ...

    def close(self) -> None: ...


def build_engine(name: str) -> FileEngine:
    """Return the engine of a name (offload.engine); nothing is opened.

    Raises: OffloadError with the reason if it is not installed, or cannot work here
    """
    match name:
        case "threads":
            return ThreadEngine()
        case "deepspeed":
            from windlass.offload.deepnvme import DeepSpeedEngine

            return DeepSpeedEngine()
        case "gds":
            from windlass.offload.gds import GdsEngine

            return GdsEngine()
    raise OffloadError(f"offload.engine = {name!r}: must be one of {', '.join(ENGINES)}")


def page_buffer(num_bytes: int) -> torch.Tensor:
    """Return zeroed bytes that begin at a page, for what needs a page now and then.

    Units: bytes, rounded up to whole pages
    """
    pages = -(-num_bytes // PAGE)
    return torch.frombuffer(mmap.mmap(-1, max(pages, 1) * PAGE), dtype=torch.uint8)


def host_view(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor in host memory, without a copy.

    Raises: OffloadError if it is not in host memory
    """
    if tensor.device.type != "cpu":
        raise OffloadError(
            f"a buffer on {tensor.device} was given to a file engine for host memory: stage it in a slab"
        )
    return tensor.detach().numpy().data.cast("B")


def require_pages(name: str, offset: int, tensor: torch.Tensor) -> None:
    """Raise OffloadError unless offset, length and address of a transfer are whole pages."""
    if tensor.dtype != torch.uint8 or not tensor.is_contiguous():
        raise OffloadError(
            f"{name}: the buffer is {tensor.dtype} of shape {tuple(tensor.shape)}, contiguous: "
            f"{tensor.is_contiguous()}. Give contiguous bytes (tensor.view(torch.uint8))"
        )
    places = [("offset", offset), ("length", tensor.numel())]
    if tensor.device.type == "cpu":
        places.append(("address of the buffer", tensor.data_ptr()))
    for what, value in places:
        if value % PAGE or value < 0 or not tensor.numel():
            raise OffloadError(
                f"{name}: {what} {value} is no multiple of {PAGE} bytes. Pad the length, and take the buffer from a "
                "slab, which begins at a page"
            )


def move_all(verb: str, step: Callable[[int, int], int], total: int, block_bytes: int) -> None:
    """Call `step(done, length)`, which returns how many bytes it moved, until all are moved.

    Interruptions are repeated and short transfers continued, a limited number of times without progress.

    Blocks: host
    Raises: OSError with how many bytes were moved of how many
    """
    done = stuck = 0
    while done < total:
        length = min(block_bytes, total - done)
        try:
            count = step(done, length)
        except (BlockingIOError, InterruptedError) as error:
            stuck += 1
            if stuck >= _ATTEMPTS:
                raise _failed(error, done, total) from error
            time.sleep(_PAUSE_S)
            continue
        except OSError as error:
            raise _failed(error, done, total) from error
        # After a short transfer the rest must begin at a page again; a page that came in part is asked for anew.
        whole = count if count == length else count - count % PAGE
        stuck = 0 if whole else stuck + 1
        if (count == 0 and verb == "read") or stuck >= _ATTEMPTS:
            code, end = (errno.ENODATA, "the file ends") if verb == "read" else (errno.EIO, "the drive takes no more")
            raise OSError(code, f"{end} after {done + count} of {total} bytes")
        done += whole


def _failed(error: OSError, done: int, total: int) -> OSError:
    return OSError(error.errno or errno.EIO, f"{error.strerror or error} after {done} of {total} bytes")


class ThreadEngine:
    """preadv and pwritev in the calling thread, which releases the interpreter's lock while the kernel works."""

    name = "threads"
    alignment = PAGE
    reports_errors = True

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self.direct = False
        self._block_bytes = block_bytes
        self._fd = -1
        self._cancelled = False

    def open(self, path: Path, num_bytes: int, *, direct: bool = True) -> None:
        """Open a file that exists.

        Raises: OSError with EINVAL or EOPNOTSUPP if `direct` is not to be had here
        """
        self._fd = os.open(path, os.O_RDWR | (os.O_DIRECT if direct else 0))
        self.direct, self._cancelled = direct, False
        try:
            # Some file systems accept the flag and refuse the transfer.
            if num_bytes >= PAGE:
                os.preadv(self._fd, [host_view(page_buffer(PAGE))], 0)
        except OSError:
            self.close()
            raise

    def read(self, offset: int, out: torch.Tensor) -> None:
        """Fill `out` from the file.

        Blocks: host
        Raises: OSError
        """
        require_pages("read", offset, out)
        self._transfer("read", os.preadv, offset, host_view(out))

    def write(self, offset: int, data: torch.Tensor) -> None:
        """Write all of `data` to the file.

        Blocks: host
        Raises: OSError
        """
        require_pages("write", offset, data)
        self._transfer("write", os.pwritev, offset, host_view(data))

    def _transfer(
        self, verb: str, call: Callable[[int, list[memoryview], int], int], offset: int, view: memoryview
    ) -> None:
        def step(done: int, length: int) -> int:
            if self._cancelled:
                raise OSError(errno.ECANCELED, "closed")
            return call(self._fd, [view[done : done + length]], offset + done)

        move_all(verb, step, len(view), self._block_bytes)
        if not self.direct:
            # Bytes of state are read once per step: in the page cache they only displace what is needed.
            os.posix_fadvise(self._fd, offset, len(view), os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """Make what was written durable."""
        os.fdatasync(self._fd)
        if not self.direct:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def cancel(self) -> None:
        """Make transfers under way fail at their next block."""
        self._cancelled = True

    def close(self) -> None:
        """Close the file. Nothing may be under way: the number of a closed file can be another file's next."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
