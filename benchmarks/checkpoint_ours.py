"""Ranks of Windlass with nothing but state: what benchmarks/checkpoint.py measures snapshots with.

A rank is its own node: a folder in memory, a snapshot process, a capturer. Nothing trains.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from windlass.checkpoint.memory import pids
from windlass.checkpoint.memory.capture import Capturer
from windlass.checkpoint.memory.client import SnapshotClient
from windlass.checkpoint.memory.folder import NodeFolder, list_jobs
from windlass.checkpoint.memory.generators import freeze_rng
from windlass.checkpoint.memory.groups import plan_groups
from windlass.checkpoint.memory.heartbeat import Heartbeat, Phase
from windlass.checkpoint.memory.membership import Member, Membership
from windlass.checkpoint.memory.settings import Settings
from windlass.checkpoint.memory.supervise import ensure_snapshot_process
from windlass.checkpoint.policy import SnapshotConfig
from windlass.dist.box import Box
from windlass.dist.device import Device
from windlass.dist.state import Piece

JOB = "be" * 8
TOKEN = "11" * 32  # the folders are the user's alone, and go with the benchmark
GENERATION = 1
NUM_TENSORS = 24


def make_state(num_bytes: int, rank: int) -> dict[str, torch.Tensor]:
    """Return the tensors of one rank: fp32 vectors of equal size, as an optimizer of flat shards has them."""
    generator = torch.Generator().manual_seed(rank)
    size = num_bytes // NUM_TENSORS // 4
    return {f"optimizer.state.{i}": torch.randn(size, generator=generator) for i in range(NUM_TENSORS)}


@dataclass(frozen=True)
class Held:
    """The state as the capturer and a synchronous save see it: this rank's row of every tensor, at rest."""

    pieces: Sequence[Piece]
    rank: int
    movable = False

    @staticmethod
    def of(state: Mapping[str, torch.Tensor], rank: int, world_size: int) -> Held:
        return Held(
            [Piece(key, (world_size, len(t)), Box((rank, 0), (1, len(t))), t.view(1, -1)) for key, t in state.items()],
            rank,
        )

    @property
    def replicas(self) -> tuple[int, ...]:
        return (self.rank,)

    def held(self) -> Sequence[Piece]:
        return self.pieces

    owned = wanted = held

    def loaded(self) -> None:
        """Nothing is derived from the state."""


class Rank:
    """One rank on a node of its own, with a snapshot process beside it."""

    def __init__(self, base: Path, held: Held, world_size: int, policy: SnapshotConfig) -> None:
        self.rank, self.world_size, self.policy = held.rank, world_size, policy
        self.folder = NodeFolder(base, JOB, f"node-{held.rank}").create(TOKEN)
        self.folder.raise_generation(GENERATION)
        self.served = ensure_snapshot_process(self.folder)
        self.beats = Heartbeat(self.folder.beat_path(held.rank), GENERATION)
        self.client = SnapshotClient.of(self.folder, GENERATION)
        self.capturer = Capturer(
            self.folder,
            job=JOB,
            generation=GENERATION,
            rank=held.rank,
            world_size=world_size,
            source=held,
            device=Device("cpu"),
            policy=policy,
        )
        self.capturer.open()

    def place(self) -> list[Any]:
        """Return what the others must know of this rank."""
        layout = self.capturer.layout
        return [self.served.host, self.served.port, layout.digest, layout.num_bytes]

    def join(self, places: Sequence[Sequence[Any]], settings: Settings) -> None:
        """Tell the snapshot process who protects whom; `places` of all ranks."""
        names = [f"node-{rank}" for rank in range(self.world_size)]
        scheme = self.policy.redundancy if self.world_size > 1 else "none"
        members = [
            Member(rank, names[rank], names[rank], str(host), int(port), str(digest), int(num_bytes))
            for rank, (host, port, digest, num_bytes) in enumerate(places)
        ]
        self.client.adopt(
            Membership(
                job=JOB,
                generation=GENERATION,
                world_size=self.world_size,
                scheme=scheme,
                k=1,
                groups=plan_groups(names, {name: name for name in names}, scheme, 0, 1),
                members=tuple(members),
                local_parity=False,
                chunk_bytes=self.policy.chunk_bytes,
            ),
            None,
            settings,
        )

    def snapshot(self, step: int, *, eager: bool = False) -> None:
        """Begin the snapshot of a step, as a trainer does: with the state of the random number generators."""
        self.beats.beat(Phase.STEP, step + 1)
        rng = freeze_rng()
        if not self.capturer.snapshot(step, {"extra": {"step": step}}, eager=eager, later=lambda: {"rng": rng()}):
            raise RuntimeError(f"rank {self.rank}: the snapshot of step {step} was skipped: no slot is free")

    def protected(self, step: int) -> bool:
        """Tell whether all nodes hold a step, parity included."""
        return self.client.status().newest.get("peers", -1) >= step

    def close(self) -> None:
        """End the capturer and the snapshot process, and remove the memory."""
        self.capturer.close()
        self.beats.beat(Phase.DONE, 0)
        self.client.stop(remove=True)
        self.client.close()
        until(lambda: not self.served.alive, 10)


def until(there: Callable[[], bool], timeout_s: float, pause_s: float = 0.005) -> None:
    """Wait for something.

    Raises: TimeoutError
    """
    end = time.monotonic() + timeout_s
    while not there():
        if time.monotonic() > end:
            raise TimeoutError(f"not so after {timeout_s:.0f} s")
        time.sleep(pause_s)


def end_nodes(base: Path) -> None:
    """End the snapshot processes of all nodes below a folder and remove their memory."""
    for folder in list_jobs(base):
        served = folder.read_smp()
        if served is not None:
            pids.kill([(served.pid, served.started)], 5.0)
        folder.remove()


def files_bytes(folder: Path) -> int:
    """Return the memory or disk that the files below a folder take."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.lstat().st_blocks * 512
    return total


def own_bytes(pid: int) -> int:
    """Return what a process takes beside files in memory: its heap and stacks, and its share of code."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    wanted = ("Pss_Anon:", "Pss_File:")
    return sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith(wanted))


def end_mentioning(folder: Path) -> list[int]:
    """Kill every process that names a folder of this benchmark in its command or its environment."""
    killed = []
    for pid in _processes():
        with suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
            if os.fsencode(folder) in words:
                os.kill(pid, 9)
                killed.append(pid)
    return killed


def _processes() -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            yield int(entry.name)
