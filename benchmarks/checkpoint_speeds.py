"""What one core of a snapshot process does per second: XOR, Reed-Solomon, checksums. A process like it: no torch.

Blocks lie one after the other in memory far larger than the caches and are taken 2 MiB at a time, as encoding takes
them. Counted are the bytes of data that go in, per second of the CPU's work for this process.

Not meant to be started by hand: see benchmarks/checkpoint.py.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

from windlass.checkpoint.memory.codes import Code
from windlass.checkpoint.memory.segment import hash_chunks
from windlass.dist.errors import CheckpointError

PIECE = 2 << 20
CHUNK = 1 << 20
CODES = {"XOR of 2 (3 nodes)": (3, 1), "XOR of 3 (4 nodes)": (4, 1), "XOR of 7 (8 nodes)": (8, 1)}
LIBRARY = {"Reed-Solomon 6+2": (8, 2)}


def encoding(n: int, k: int, block_bytes: int) -> tuple[int, Callable[[], None]]:
    """Return how many bytes go in, and the work."""
    code = Code(n, k)
    rng = np.random.default_rng(0)
    blocks = [rng.integers(0, 256, block_bytes, np.uint8) for _ in range(code.num_data)]
    out = np.zeros(block_bytes, np.uint8)

    def work() -> None:
        for low in range(0, block_bytes, PIECE):
            pieces = [block[low : low + PIECE] for block in blocks]
            code.encode_one(0, pieces, out[low : low + PIECE])

    work()
    return block_bytes * code.num_data, work


def hashing(num_bytes: int) -> tuple[int, Callable[[], None]]:
    data = np.random.default_rng(0).integers(0, 256, num_bytes, np.uint8)

    def work() -> None:
        hash_chunks(data, num_bytes, CHUNK)

    work()
    return num_bytes, work


def measure() -> None:
    rounds, total = int(sys.argv[1]), int(sys.argv[2])
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    works: dict[str, tuple[int, Callable[[], None]]] = {}
    missing = {}
    for name, (n, k) in {**CODES, **LIBRARY}.items():
        try:
            works[name] = encoding(n, k, total // (n - k) // PIECE * PIECE)
        except CheckpointError as error:
            missing[name] = str(error)
    works["xxh3"] = hashing(total)
    rates: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, (num_bytes, work) in works.items():
            began = time.process_time()
            work()
            rates[name].append(num_bytes / (time.process_time() - began) / 1e9)
    assert "torch" not in sys.modules
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(json.dumps({"rates": medians, "best": {name: max(v) for name, v in rates.items()}, "missing": missing}))


if __name__ == "__main__":
    measure()
