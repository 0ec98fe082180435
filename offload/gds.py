"""GPUDirect Storage (cuFile) as a file engine: device memory to and from a drive without host memory between.

Buffers in host memory take the way of the thread engine. Must not know: keys, slots, commits, streams: what a buffer
holds must be complete before a write is asked for.
Source: NVIDIA cuFile API reference 1.13. Where drive or kernel lack support, cuFile itself stages through the host.
"""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from windlass.dist.errors import OffloadError
from windlass.offload.engines import BLOCK_BYTES, PAGE, ThreadEngine, move_all, require_pages

_LIBRARY = "libcufile.so.0"
_OPAQUE_FD = 1  # CU_FILE_HANDLE_TYPE_OPAQUE_FD


class _Status(ctypes.Structure):
    """CUfileError_t"""

    _fields_ = (("err", ctypes.c_int), ("cu_err", ctypes.c_int))


class _Descriptor(ctypes.Structure):
    """CUfileDescr_t; its union of a descriptor and a pointer is as wide as the pointer."""

    _fields_ = (("type", ctypes.c_int), ("fd", ctypes.c_int64), ("fs_ops", ctypes.c_void_p))


class GdsEngine:
    """Device buffers through cuFile, host buffers through preadv and pwritev."""

    name = "gds"
    alignment = PAGE
    reports_errors = True

    def __init__(self, library: Any = None) -> None:
        """Open the driver; `library` stands in for libcufile in tests.

        Raises: OffloadError if there is no cuFile, or it does not work here
        """
        self._library = library if library is not None else _load()
        _check(self._library.cuFileDriverOpen(), "cuFileDriverOpen")
        self._host = ThreadEngine()
        self._fd, self._handle, self._cancelled = -1, ctypes.c_void_p(), False

    @property
    def direct(self) -> bool:
        """Whether transfers bypass the page cache."""
        return self._host.direct

    def open(self, path: Path, num_bytes: int, *, direct: bool = True) -> None:
        """Open a file that exists.

        Raises: OSError if the file system has no direct access; OffloadError without `direct`, or if cuFile refuses it
        """
        if not direct:
            raise OffloadError(f"offload.engine=gds needs direct access, which {path.parent} refuses: use threads")
        self._host.open(path, num_bytes)
        self._fd, self._cancelled = os.open(path, os.O_RDWR | os.O_DIRECT), False
        try:
            descriptor = _Descriptor(_OPAQUE_FD, self._fd, None)
            register = self._library.cuFileHandleRegister
            _check(register(ctypes.byref(self._handle), ctypes.byref(descriptor)), "cuFileHandleRegister")
        except OffloadError:
            self._handle = ctypes.c_void_p()
            self.close()
            raise

    def read(self, offset: int, out: torch.Tensor) -> None:
        """Fill `out` from the file.

        Blocks: host
        Raises: OSError
        """
        if on_host(out):
            self._host.read(offset, out)
        else:
            self._transfer("read", offset, out)

    def write(self, offset: int, data: torch.Tensor) -> None:
        """Write all of `data`, which must be complete, to the file.

        Blocks: host
        Raises: OSError
        """
        if on_host(data):
            self._host.write(offset, data)
        else:
            self._transfer("write", offset, data)

    def _transfer(self, verb: str, offset: int, buffer: torch.Tensor) -> None:
        require_pages(verb, offset, buffer)
        call = self._library.cuFileRead if verb == "read" else self._library.cuFileWrite

        def step(done: int, length: int) -> int:
            if self._cancelled:
                raise OSError(errno.ECANCELED, "closed")
            base = ctypes.c_void_p(buffer.data_ptr())
            count = call(self._handle, base, ctypes.c_size_t(length), offset + done, done)
            if count == -1:
                raise OSError(ctypes.get_errno() or errno.EIO, os.strerror(ctypes.get_errno() or errno.EIO))
            if count < 0:
                raise OSError(errno.EIO, f"cuFile error {-count}")
            return int(count)

        move_all(verb, step, buffer.numel(), BLOCK_BYTES)

    def sync(self) -> None:
        """Make what was written durable."""
        self._host.sync()

    def cancel(self) -> None:
        """Make transfers under way fail at their next block."""
        self._cancelled = True
        self._host.cancel()

    def close(self) -> None:
        """Close the file. Nothing may be under way."""
        if self._handle:
            self._library.cuFileHandleDeregister(self._handle)
            self._handle = ctypes.c_void_p()
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
        self._host.close()


def on_host(tensor: torch.Tensor) -> bool:
    """Return whether a buffer lies in host memory."""
    return tensor.device.type == "cpu"


def _check(status: Any, what: str) -> None:
    if status.err:
        raise OffloadError(
            f"offload.engine=gds: {what} failed (cuFile error {status.err}, CUDA error {status.cu_err}). See "
            "cufile.log and gdscheck, or use offload.engine=threads"
        )


def _load() -> Any:
    """Return libcufile with the types of what is called: of the system, or of the wheels that torch comes with."""
    if torch.version.cuda is None:
        raise OffloadError("offload.engine=gds needs a torch with CUDA; this one has none. Use offload.engine=threads")
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec is not None else []
    bundled = [str(path) for folder in folders for path in sorted(folder.glob(f"*/lib/{_LIBRARY}"))]
    for name in (_LIBRARY, *bundled):
        try:
            library = ctypes.CDLL(name, use_errno=True)
            break
        except OSError as error:
            reason = str(error)
    else:
        raise OffloadError(
            f"offload.engine=gds needs cuFile ({reason}). Install it (pip install nvidia-cufile), or use "
            "offload.engine=threads"
        )
    for function in (library.cuFileDriverOpen, library.cuFileHandleRegister):
        function.restype = _Status
    library.cuFileHandleDeregister.restype = None
    for function in (library.cuFileRead, library.cuFileWrite):
        function.restype = ctypes.c_ssize_t
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int64]
    return library
