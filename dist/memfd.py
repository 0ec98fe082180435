"""Memory that the processes of one host share: files that exist only as descriptors, mapped as tensors.

Must not know: who maps it, what for, how descriptors travel.
"""

from __future__ import annotations

import os

import torch

from windlass.dist.errors import CommError


def new_memory(name: str, numel: int, dtype: torch.dtype) -> tuple[int, torch.Tensor]:
    """Make zeroed memory that other processes can map through its descriptor, with every page present.

    Raises: CommError naming the bytes that could not be had.
    """
    num_bytes = max(numel * dtype.itemsize, 1)
    try:
        fd = os.memfd_create(f"windlass {name}"[:200], os.MFD_CLOEXEC)
        # Allocates now: memory that is only promised would kill the process (SIGBUS) when it is first touched.
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError as error:
        raise CommError(
            f"shared memory for '{name}': {num_bytes} bytes could not be had: {error}. Use fewer ranks on this host, "
            "a smaller model, or a higher ZeRO stage"
        ) from error
    return fd, _as_tensor(fd, numel, dtype).zero_()  # the zeros are there already; writing them maps the pages


def map_memory(fd: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Map a peer's memory and close the descriptor. Pages are mapped as they are read."""
    tensor = _as_tensor(fd, numel, dtype)
    os.close(fd)
    return tensor


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory of a contiguous tensor as a flat tensor of bytes."""
    return tensor.detach().view(-1).view(torch.uint8)


def _as_tensor(fd: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    # Unlike the mmap module, torch keeps no descriptor per mapping, of which a process may only have so many.
    if numel == 0:
        return torch.empty(0, dtype=dtype)
    return torch.from_file(f"/proc/self/fd/{fd}", shared=True, size=numel, dtype=dtype)
