"""Rebuilds bytes of a lost member's data from the rest of its redundancy group.

Any range is rebuilt by itself, piece by piece, from n-k blocks of its stripe; where more are left, those are read whose
holders have been asked for least. A holder that fails while it is read counts as lost, and another one takes its place.
Must not know: sockets, files, hashes (a Fetch gives sound bytes or raises).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from windlass.checkpoint.memory.codes import Code
from windlass.checkpoint.memory.encode import LANES, Fetch, piece_bytes
from windlass.checkpoint.memory.stripes import Block, Stripes
from windlass.dist.errors import CheckpointError


class Decoder:
    """Rebuilds data of one group, whose members lack the segments in `missing`: (rank, "data" or "parity").

    `loads` counts the bytes asked for by rank. One thread at a time.
    """

    def __init__(self, stripes: Stripes, missing: Collection[tuple[int, str]], fetch: Fetch) -> None:
        self.stripes, self.missing, self._fetch = stripes, set(missing), fetch
        self._code = Code(stripes.n, stripes.k)
        self._rows = np.empty((stripes.num_data, 0), np.uint8)
        self._failures: dict[tuple[int, str], str] = {}
        self.loads: Counter[int] = Counter()

    def read(self, rank: int, start: int, stop: int, into: memoryview | None = None) -> memoryview:
        """Rebuild bytes [start, stop) of the data of a rank, into `into` where given.

        Segments are read in whole chunks (but for the last of a member's data), so that they can be verified.

        Blocks: host
        Raises: CheckpointError if too few blocks can be had, with the reason for each that cannot
        """
        stripes = self.stripes
        size = stripes.sizes[stripes.ranks.index(rank)]
        if not 0 <= start <= stop <= size:
            raise CheckpointError(f"rank {rank}: bytes [{start}, {stop}) of its {size} bytes of data cannot be rebuilt")
        if into is not None and into.nbytes != stop - start:
            raise CheckpointError(f"rank {rank}: room for {into.nbytes} bytes to rebuild {stop - start}")
        out = np.empty(stop - start, np.uint8) if into is None else np.frombuffer(into, np.uint8)
        at, step, block_bytes = start, max(piece_bytes(stripes), stripes.chunk_bytes), stripes.block_bytes
        with ThreadPoolExecutor(min(LANES, stripes.num_data), "snapshot-decode") as pool:
            while at < stop:
                block, offset = divmod(at, block_bytes)
                low = offset // stripes.chunk_bytes * stripes.chunk_bytes
                end = min(stop - block * block_bytes, block_bytes)
                high = min(low + step, -(-end // stripes.chunk_bytes) * stripes.chunk_bytes)
                upto = min(high, end)
                rebuilt = self._piece(pool, rank, block, low, high)
                out[at - start : at - start + upto - offset] = rebuilt[offset - low : upto - low]
                at += upto - offset
        return out.data

    def _piece(self, pool: ThreadPoolExecutor, rank: int, block: int, low: int, high: int) -> np.ndarray:
        """Rebuild [low, high) of a data block."""
        number = self.stripes.stripe_of_data(rank, block)
        blocks = self.stripes.stripe(number)
        lost = {i for i, b in enumerate(blocks) if i == block or (b.length > low and (b.rank, b.role) in self.missing)}
        if self._rows.shape[1] < high - low:
            self._rows = np.empty((self.stripes.num_data, high - low), np.uint8)
        present: dict[int, np.ndarray] = {}
        free = list(self._rows)
        while len(present) < self.stripes.num_data:
            chosen = self._choose(blocks, lost | set(present), low, self.stripes.num_data - len(present))
            if len(present) + len(chosen) < self.stripes.num_data:
                raise CheckpointError(self._shortage(rank, block, blocks, lost))
            coming: list[tuple[int, np.ndarray, Future[None]]] = []
            for index in chosen:
                source, row = blocks[index], free.pop()
                part = row[: max(min(source.length, high) - low, 0)]
                self.loads[source.rank] += len(part)
                coming.append((index, row, pool.submit(self._get, source, low, part)))
                present[index] = part
            for index, row, future in coming:
                source = blocks[index]
                try:
                    future.result()
                except (CheckpointError, OSError) as exc:
                    self._failures[source.rank, source.role] = str(exc)
                    lost.add(index)
                    del present[index]
                    free.append(row)
        return self._code.decode(present, high - low, (block,))[block]

    def _get(self, source: Block, low: int, part: np.ndarray) -> None:
        if len(part):  # beyond the end of a member's data there is nothing to ask for: zeros
            self._fetch(source.rank, source.role, source.start + low, part.data)

    def _choose(self, blocks: list[Block], without: set[int], low: int, count: int) -> list[int]:
        """Return which blocks to read: zeros cost nothing; those who failed before are asked last."""

        def cost(index: int) -> tuple[bool, bool, int, int]:
            block = blocks[index]
            return block.length > low, (block.rank, block.role) in self._failures, self.loads[block.rank], index

        return sorted((index for index in range(len(blocks)) if index not in without), key=cost)[:count]

    def _shortage(self, rank: int, block: int, blocks: list[Block], lost: set[int]) -> str:
        reasons = "; ".join(
            f"{b.role} of rank {b.rank}: {self._failures.get((b.rank, b.role), 'missing')}"
            for index, b in enumerate(blocks)
            if index in lost and index != block
        )
        return (
            f"rank {rank}: block {block} of its data cannot be rebuilt: {self.stripes.num_data} of the other "
            f"{self.stripes.n - 1} blocks of its stripe are needed, and these cannot be had: {reasons}"
        )
