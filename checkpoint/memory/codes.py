"""Erasure codes: from n-k data blocks k parity blocks, so that any n-k of the n give the data back.

k = n-1 is a copy, k = 1 an XOR, anything else Reed-Solomon by ISA-L (pyeclib). All are bytewise: equal ranges of the
blocks code and decode by themselves. Must not know: members, segments, networks.
Source: Plank 1997, "A tutorial on Reed-Solomon coding"; the Cauchy matrix, because every choice of its rows inverts.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from windlass.dist.errors import CheckpointError, PlanError

TILE = 512 << 10  # bytes of a block combined at a time: what is summed up stays in the cache of the core
MAX_BLOCKS = 32  # of pyeclib


@dataclass(frozen=True)
class Code:
    """The code of a stripe of n blocks of which k may be lost: blocks 0 to n-k-1 are data, the others parity.

    Shapes: a block is a one-dimensional array of bytes; one that is shorter than the others goes on with zeros
    """

    n: int
    k: int

    def __post_init__(self) -> None:
        if not 1 <= self.k < self.n:
            raise PlanError(f"a code of {self.n} blocks with {self.k} of parity: needs 1 to {self.n - 1}")
        if self.by_library and self.n > MAX_BLOCKS:
            raise PlanError(f"a code of {self.n} blocks with {self.k} of parity: at most {MAX_BLOCKS} blocks, or k = 1")

    @property
    def num_data(self) -> int:
        return self.n - self.k

    @property
    def by_library(self) -> bool:
        """Return whether this is neither a copy nor an XOR."""
        return 1 < self.k < self.n - 1

    def encode_one(self, index: int, data: Sequence[np.ndarray], out: np.ndarray) -> None:
        """Write the parity block `index` (0 to k-1) of n-k data blocks into `out`, at least as long as they are."""
        if len(data) != self.num_data:
            raise CheckpointError(f"{len(data)} data blocks given to a code that takes {self.num_data}")
        if self.by_library:
            self._solve(dict(enumerate(data)), {self.num_data + index: out}, len(out))
        else:
            _xor(data, out)

    def decode(
        self, present: Mapping[int, np.ndarray], length: int | None = None, wanted: Collection[int] | None = None
    ) -> dict[int, np.ndarray]:
        """Return the data blocks that are not present (of these: those wanted), from at least n-k blocks that are.

        They are of the given length, or as long as the longest that is present.

        Raises: CheckpointError if fewer are present
        """
        if len(present) < self.num_data or not all(0 <= index < self.n for index in present):
            raise CheckpointError(
                f"blocks {sorted(present)} of a stripe of {self.n} are there, {self.num_data} are needed to decode"
            )
        missing = [i for i in range(self.num_data) if i not in present and (wanted is None or i in wanted)]
        length = max(len(block) for block in present.values()) if length is None else length
        out = {index: np.empty(length, np.uint8) for index in missing}
        if not missing:
            return out
        if self.by_library:
            self._solve(present, out, length)
        elif self.k == 1:
            _xor(list(present.values())[: self.num_data], out[missing[0]])
        else:
            _xor([next(iter(present.values()))], out[0])
        return out

    def _solve(self, present: Mapping[int, np.ndarray], out: Mapping[int, np.ndarray], length: int) -> None:
        chosen = sorted(present)[: self.num_data]
        driver = _driver(self.num_data, self.k)
        for low, high in _tiles(length):
            heads = _heads(self.num_data, self.k, high - low)
            # Bytes objects only: pyeclib 1.8 takes the address of anything else to be null, and aborts the process.
            given = [b"".join((heads[index], *_tile(present[index], low, high))) for index in chosen]
            for index, block in zip(sorted(out), driver.reconstruct(given, sorted(out)), strict=True):
                out[index][low:high] = _body(block, high - low)


def _tiles(length: int) -> list[tuple[int, int]]:
    return [(low, min(low + TILE, length)) for low in range(0, length, TILE)]


def _xor(blocks: Sequence[np.ndarray], out: np.ndarray) -> None:
    """Write the XOR of the blocks, tile by tile, so that the sum is read and written in the cache."""
    for low, high in _tiles(len(out)):
        total, done = out[low:high], 0  # `done`: bytes of it that hold a sum already
        for block in blocks:
            part = block[low:high]
            size, both = len(part), min(len(part), done)
            np.bitwise_xor(total[:both], part[:both], out=total[:both])
            if size > done:
                total[done:size] = part[done:]
                done = size
        total[done:] = 0


def _tile(block: np.ndarray, low: int, high: int) -> tuple[memoryview, bytes]:
    part = block[low:high]
    return part.data, bytes(high - low - len(part))


# -- pyeclib: its fragments are a header that says which block of which code this is, and the bytes of the block ------


@lru_cache(maxsize=32)
def _driver(num_data: int, k: int) -> Any:
    try:
        library = importlib.import_module("pyeclib.ec_iface")
        return library.ECDriver(ec_type="isa_l_rs_cauchy", k=num_data, m=k)
    except Exception as exc:  # its own errors, and those of the system that loads it
        raise CheckpointError(
            f"{k} parity blocks for {num_data} of data need pyeclib with ISA-L, which cannot be used here: {exc}. "
            "Install it (pip install 'pyeclib>=1.7'), or use snapshot.redundancy = 'xor', or 'replica' on a multiple "
            f"of {k + 1} nodes"
        ) from exc


@lru_cache(maxsize=64)
def _heads(num_data: int, k: int, length: int) -> list[bytes]:
    """Return the headers of the fragments of blocks of this length: they do not depend on what the blocks hold."""
    encoded = _driver(num_data, k).encode(bytes(num_data * length))
    return [fragment[: len(fragment) - length] for fragment in encoded]


def _body(fragment: bytes, length: int) -> np.ndarray:
    return np.frombuffer(fragment, np.uint8, length, len(fragment) - length)
