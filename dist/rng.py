"""Counter-based random streams: element i of a named tensor has one value, whoever computes it and in what pieces.

Element i is made of 64-bit word i of numpy's Philox generator, whose streams numpy documents as stable. The key is the
seed and a hash of the name, so the same weights arise for any world size, shard layout or chunking.
Must not know: models, ranks. Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch

from windlass.dist.errors import ConfigError

CHUNK = 1 << 18  # elements; bounds the float64 temporaries
WORDS_PER_COUNTER = 4  # Philox 4x64


def fill_normal(out: torch.Tensor, *, seed: int, name: str, start: int, std: float, mean: float = 0.0) -> None:
    """Fill a flat tensor with elements `[start, start + numel)` of a normal stream.

    Invariant: bitwise independent of how a range is cut into calls, and of the number of threads
    """
    for low, high, uniform in _uniform_chunks(out.numel(), seed, name, start):
        # In float64 and rounded once, so that a format changes only the rounding.
        out[low:high].copy_(torch.special.ndtri(uniform).mul_(std).add_(mean))


def fill_uniform(out: torch.Tensor, *, seed: int, name: str, start: int, low: float = 0.0, high: float = 1.0) -> None:
    """Fill a flat tensor with elements `[start, start + numel)` of a uniform stream over (low, high)."""
    for first, last, uniform in _uniform_chunks(out.numel(), seed, name, start):
        out[first:last].copy_(uniform.mul_(high - low).add_(low))


def words(seed: int, name: str, start: int, count: int) -> np.ndarray:
    """Return 64-bit words `[start, start + count)` of the stream of this name."""
    if not 0 <= seed < 2**64:
        raise ConfigError(f"seed = {seed}: must be at least 0 and below 2^64")
    hashed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    generator = np.random.Philox(key=np.array([seed, hashed], dtype=np.uint64))
    generator.advance(start // WORDS_PER_COUNTER)
    skip = start % WORDS_PER_COUNTER
    return generator.random_raw(skip + count)[skip:]


def _uniform_chunks(numel: int, seed: int, name: str, start: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield (low, high, float64 in the open interval (0, 1)); the middles of 2^53 equal cells, never 0 or 1."""
    for low in range(0, numel, CHUNK):
        high = min(low + CHUNK, numel)
        cells = (words(seed, name, start + low, high - low) >> np.uint64(11)).astype(np.float64)
        yield low, high, torch.from_numpy((cells + 0.5) * 2.0**-53)
