"""What snapshots take of a node, and how fast they get to disk: parts `memory` and `persist` of checkpoint.py.

`memory`: nodes with one rank each take snapshots one after the other, with XOR parity, while what every node holds is
sampled: the files of its folder, and what its snapshot process takes beside them. `persist`: one node writes a
protected snapshot to disk, in turns with a plain loop that writes the same bytes out of the same memory and syncs; the
drive is at rest before each turn.

Not meant to be started by hand: see benchmarks/checkpoint.py.
"""

from __future__ import annotations

import argparse
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoint_ours import Held, Rank, files_bytes, make_state, own_bytes, until
from ranks import Reporter

from windlass.checkpoint.memory.segment import Segment
from windlass.checkpoint.memory.settings import Settings
from windlass.checkpoint.policy import SnapshotConfig

LOOK_S = 0.02
WAIT_S = 120.0
SETTLE_S = 0.2
EXTRA_BYTES = 64 << 20
PAGE = 4096
PIECE = 8 << 20


@contextmanager
def nodes_of(
    base: Path, num_nodes: int, num_bytes: int, policy: SnapshotConfig, settings: Settings
) -> Iterator[Sequence[Rank]]:
    """Start nodes with one rank each, and end them."""
    base.mkdir()
    ranks: list[Rank] = []
    try:
        for number in range(num_nodes):
            held = Held.of(make_state(num_bytes, number), number, num_nodes)
            ranks.append(Rank(base, held, num_nodes, policy))
        places = [rank.place() for rank in ranks]
        for rank in ranks:
            rank.join(places, settings)
        yield ranks
    finally:
        for rank in ranks:
            rank.close()


def snapshot(ranks: Sequence[Rank], step: int) -> None:
    """Take a snapshot on all nodes and wait until it is copied."""
    until(lambda: all(rank.capturer.ready() for rank in ranks), WAIT_S)
    for rank in ranks:
        rank.snapshot(step)
    for rank in ranks:
        rank.capturer.gate()


class Peaks:
    """Samples what nodes hold: the most of each."""

    def __init__(self, ranks: Sequence[Rank]) -> None:
        self.total, self.files, self.own = [[0] * len(ranks) for _ in range(3)]
        self._ranks, self._stopped = ranks, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(LOOK_S):
            for place, rank in enumerate(self._ranks):
                files, own = files_bytes(rank.folder.path), own_bytes(rank.served.pid)
                self.total[place] = max(self.total[place], files + own)
                self.files[place], self.own[place] = max(self.files[place], files), max(self.own[place], own)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


def measure_memory(given: argparse.Namespace, num_nodes: int) -> dict[str, Any]:
    """Return the peaks of the fullest node, in bytes."""
    policy = SnapshotConfig(every=1, redundancy="xor")
    with nodes_of(given.memory / f"of-{num_nodes}", num_nodes, given.bytes, policy, Settings()) as ranks:
        peaks = Peaks(ranks)
        try:
            for step in range(1, given.rounds + 4):
                snapshot(ranks, step)
            until(lambda: all(rank.protected(step) for rank in ranks), WAIT_S)
        finally:
            peaks.stop()
        shard = max(rank.capturer.layout.num_bytes for rank in ranks)
    fullest = max(range(num_nodes), key=lambda place: peaks.total[place])
    return {
        "nodes": num_nodes,
        "slots": policy.slots,
        "shard": shard,
        "total": peaks.total[fullest],
        "files": peaks.files[fullest],
        "own": peaks.own[fullest],
    }


def measure_persist(given: argparse.Namespace) -> list[dict[str, float]]:
    """Return the bytes per second of both ways, by round."""
    target, plain = given.folder / "checkpoints", given.folder / "plain.bin"
    settings = Settings(mode="lazy", every=10**9, storage=str(target), keep=0)
    found = []
    with nodes_of(given.memory / "persist", 1, given.bytes, SnapshotConfig(every=1), settings) as ranks:
        rank = ranks[0]
        for step in range(1, given.rounds + 2):
            snapshot(ranks, step)
            until(partial(rank.protected, step), WAIT_S)
            ways = {"windlass": partial(flush, rank, step, target), "plain": partial(write_plainly, rank, step, plain)}
            order = ways if step % 2 else reversed(ways)
            rates = {name: ways[name]() for name in order}
            if step > 1:  # the first one finds folders and files to be made, and code to be read
                found.append(rates)
    return found


def settle(old: Sequence[Path], num_bytes: int) -> None:
    """Remove what a way wrote before, wait until the drive has nothing to do, and have free memory at hand: so neither
    way pays for what the other one left to be written or freed, nor for memory that a virtual machine has to ask for.
    """
    for path in old:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    os.sync()
    time.sleep(SETTLE_S)  # freed blocks are told to the drive after that
    np.empty(num_bytes + EXTRA_BYTES, np.uint8)[::PAGE] = 1


def flush(rank: Rank, step: int, target: Path) -> float:
    """Return the bytes per second of making a step durable, as whoever asks for it sees it."""
    settle(sorted(target.glob("step-*"))[:-1], rank.capturer.layout.num_bytes)
    began = time.perf_counter()
    done = rank.client.flush(WAIT_S, at_least=step)
    seconds = time.perf_counter() - began
    assert done.step == step
    return rank.capturer.layout.num_bytes / seconds


def write_plainly(rank: Rank, step: int, path: Path) -> float:
    """Return the bytes per second of a sequential writer of the same memory with one fsync."""
    settle([path] if path.exists() else [], rank.capturer.layout.num_bytes)
    file = next(file for file in rank.folder.segments() if file.role == "data")
    segment, num_bytes = Segment.open(file.path), rank.capturer.layout.num_bytes
    slot = next(slot for slot in segment.slots if (header := slot.header()) is not None and header.step == step)
    data = slot.data[:num_bytes]
    began = time.perf_counter()
    with path.open("wb", buffering=0) as out:
        for low in range(0, num_bytes, PIECE):
            out.write(data[low : low + PIECE].data)
        os.fsync(out.fileno())
    seconds = time.perf_counter() - began
    del data, slot
    segment.close()
    return num_bytes / seconds


def measure() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("memory", "persist"), required=True)
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--memory", type=Path, required=True)
    parser.add_argument("--events", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    reporter = Reporter(given.events)
    reporter.phase("timed")
    if given.part == "memory":
        reporter.result(rows=[measure_memory(given, num_nodes) for num_nodes in (2, 3)])
    else:
        reporter.result(rows=measure_persist(given))


if __name__ == "__main__":
    measure()
