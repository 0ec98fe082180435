"""Nodes with real snapshot processes and trainers that are played by the test: they fill slots and beat, no torch."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.waiting import until
from windlass.checkpoint.frames import frames_of
from windlass.checkpoint.memory import pids
from windlass.checkpoint.memory.base import Base
from windlass.checkpoint.memory.client import SnapshotClient
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.groups import plan_groups
from windlass.checkpoint.memory.header import SlotHeader, State
from windlass.checkpoint.memory.heartbeat import Heartbeat, Phase
from windlass.checkpoint.memory.layout import Fragment, Layout
from windlass.checkpoint.memory.membership import Member, Membership
from windlass.checkpoint.memory.persisting import Persisting
from windlass.checkpoint.memory.segment import Segment, num_chunks, pick_slot, verify
from windlass.checkpoint.memory.service import Service
from windlass.checkpoint.memory.settings import Settings
from windlass.checkpoint.memory.supervise import ensure_snapshot_process
from windlass.dist.box import Box

JOB = "0123456789abcdef"
CHUNK = 4096
PEER_S = 30.0
PATIENCE_S = 60.0  # for a process that starts, answers or ends, however busy the machine


def data_of(rank: int, step: int, num_bytes: int) -> np.ndarray:
    """Return the bytes of a rank's state after a step: every chunk differs from every other."""
    return np.random.default_rng([rank, step]).integers(0, 256, num_bytes, dtype=np.uint8)


class Rank:
    """A trainer without training."""

    def __init__(self, node: Node, rank: int, num_bytes: int, num_slots: int) -> None:
        self.node, self.rank, self.num_bytes = node, rank, num_bytes
        world = node.world_size
        row = Fragment("state", "uint8", (world, num_bytes), Box((rank, 0), (1, num_bytes)), 0, num_bytes)
        self.layout = Layout((row,), num_bytes, frames_of([row]))
        node.folder.put_layout(self.layout)
        path = node.folder.segment_path("data", rank, num_bytes, num_slots, num_chunks(num_bytes, CHUNK))
        self.segment = Segment.ensure(path, "data", rank, num_bytes, num_slots, CHUNK, num_chunks(num_bytes, CHUNK))
        self.beats = Heartbeat(node.folder.beat_path(rank), node.generation)

    def snapshot(self, step: int, *, copied: int | None = None) -> bool:
        """Fill a slot (only the first `copied` bytes of it, where given); False if none is free."""
        generation = self.node.generation
        found = pick_slot(self.segment, generation)
        self.beats.beat(Phase.STEP, step + 1)
        if found is None:
            return False
        slot, sequence = found
        header = SlotHeader(
            job=JOB,
            generation=generation,
            step=step,
            rank=self.rank,
            world_size=self.node.world_size,
            role="data",
            layout=self.layout.digest,
            num_bytes=self.num_bytes,
            chunk_bytes=CHUNK,
            state=State.FILLING,
            facts={"extra": {"step": step}},
        )
        assert slot.write(replace(header, sequence=sequence))
        done = self.num_bytes if copied is None else copied
        slot.data[:done] = data_of(self.rank, step, self.num_bytes)[:done]
        slot.progress = done
        if copied is None:
            assert slot.write(replace(header, state=State.COPIED, sequence=slot.sequence))
        return True


class Node:
    """One machine of the job: its folder, its snapshot process, its ranks."""

    def __init__(self, base: Path, name: str, generation: int, world_size: int, faults: bool = True) -> None:
        self.name, self.generation, self.world_size = name, generation, world_size
        self.folder = NodeFolder(base, JOB, name).create("11" * 32)
        self.folder.raise_generation(generation)
        self.respawn(faults=faults)
        self.client = SnapshotClient.of(self.folder, generation, PATIENCE_S)
        self.ranks: list[Rank] = []

    def states(self, role: str = "data") -> dict[tuple[int, int, int], str]:
        """Return the state of every slot by generation, rank and step."""
        slots = self.client.status().slots
        return {(s["generation"], s["rank"], s["step"]): s["state"] for s in slots if s["role"] == role}

    def kill(self) -> None:
        served = self.folder.read_smp()
        assert served is not None
        assert pids.kill([(served.pid, served.started)], PATIENCE_S) == []

    def respawn(self, *, faults: bool = False) -> None:
        self.served = ensure_snapshot_process(self.folder, PATIENCE_S, faults=faults)

    def meet_again(self) -> None:
        """Speak to whatever process serves this node by now, for its generation."""
        self.client.close()
        self.client = SnapshotClient.of(self.folder, self.generation, PATIENCE_S)

    def log(self) -> str:
        return (self.folder.path / "smp.log").read_text()

    def check(self, step: int) -> None:
        """Compare every byte of this node's ranks at a step with what they were, and data and parity with hashes."""
        for role in ("data", "parity"):
            for file in self.folder.segments():
                segment = Segment.open(file.path)
                held = [(slot, h) for slot in segment.slots if (h := slot.header()) is not None]
                found = [(s, h) for s, h in held if (h.role, h.generation, h.step) == (role, self.generation, step)]
                for slot, header in found:
                    assert verify(slot, header) == []
                    if role == "data":
                        wanted = data_of(header.rank, step, header.num_bytes)
                        assert np.array_equal(slot.data[: header.num_bytes], wanted)
                assert file.role != role or len(found) == 1, f"{file.path.name} holds {[(h.step) for _, h in held]}"
                segment.close()

    def end(self) -> None:
        self.client.close()
        served = self.folder.read_smp()
        if served is not None:
            pids.kill([(served.pid, served.started)], PATIENCE_S)
        self.folder.remove()


class NodeInThreads(Node):
    """A node whose snapshot process is threads of the test, which may look into it and replace its parts."""

    service: Service

    def respawn(self, *, faults: bool = False) -> None:
        self.service = Service(self.folder.path, "127.0.0.1", 0)
        self.service._server.start()
        self.service.folder.write_smp(self.service.served)
        threading.Thread(target=self.service._hash_for_ever, daemon=True).start()
        self.served = self.service.served

    def end(self) -> None:
        self.client.close()
        if self.service.duty is not None:
            self.service.duty.stop()
        self.service._ending.set()
        self.service._server.close(timeout_s=1.0)
        self.folder.remove()

    @property
    def persisting(self) -> Persisting:
        assert self.service.duty is not None and self.service.duty.persisting is not None
        return self.service.duty.persisting


class Fleet:
    """Nodes of one job with one rank each, unless `seats` says which node every rank is on."""

    def __init__(self, base: Path, num_nodes: int, *, scheme: str = "xor", k: int = 1, kind: type[Node] = Node) -> None:
        self.scheme, self.k, self.num_bytes = scheme, k, 10 * CHUNK + 100
        self.nodes: list[Node] = []
        self.generation = 0
        for i in range(num_nodes):
            self.nodes.append(kind(base, f"node-{i}", 1, num_nodes))

    def begin(
        self,
        restored: tuple[int, int] | None = None,
        *,
        num_slots: int = 2,
        seats: Sequence[int] | None = None,
        settings: Settings | None = None,
        base: Base | None = None,
    ) -> None:
        """Begin another generation, with all ranks anew."""
        seats = seats if seats is not None else range(len(self.nodes))
        self.generation += 1
        for node in self.nodes:
            node.generation, node.world_size, node.ranks = self.generation, len(seats), []
            node.folder.raise_generation(self.generation)
            node.meet_again()
        self.ranks = [Rank(self.nodes[seat], rank, self.num_bytes, num_slots) for rank, seat in enumerate(seats)]
        for rank in self.ranks:
            rank.node.ranks.append(rank)
        self.membership = self._membership(self.generation)
        self.settings = settings or Settings(peer_timeout_s=PEER_S)
        for node in self.nodes:
            node.client.adopt(self.membership, restored, self.settings, base=base)

    def _membership(self, generation: int) -> Membership:
        names = [rank.node.name for rank in self.ranks]
        return Membership(
            job=JOB,
            generation=generation,
            world_size=len(names),
            scheme=self.scheme,
            k=self.k,
            groups=plan_groups(names, {name: name for name in names}, self.scheme, 0, self.k),
            members=tuple(
                Member(
                    r.rank,
                    r.node.name,
                    r.node.name,
                    r.node.served.host,
                    r.node.served.port,
                    r.layout.digest,
                    r.num_bytes,
                )
                for r in self.ranks
            ),
            local_parity=False,
            chunk_bytes=CHUNK,
        )

    def snapshot(self, step: int) -> None:
        for rank in self.ranks:
            assert rank.snapshot(step), f"rank {rank.rank} has no slot for step {step}"

    def ready(self) -> bool:
        return all(pick_slot(rank.segment, self.generation) is not None for rank in self.ranks)

    def committed(self, step: int) -> bool:
        """Whether every node knows that a step is committed, and has freed what is older."""
        return all(
            node.client.status().newest["peers"] >= step
            and all(node.states().get((self.generation, r.rank, step)) == "COMMITTED" for r in node.ranks)
            for node in self.nodes
        )

    def commit(self, step: int) -> None:
        """Take a snapshot on all ranks and wait until it is protected."""
        until(self.ready)
        self.snapshot(step)
        until(lambda: self.committed(step))


@contextmanager
def fleet_of(
    base: Path, num_nodes: int, *, scheme: str = "xor", k: int = 1, kind: type[Node] = Node
) -> Iterator[Fleet]:
    """Start a fleet and end all its processes."""
    fleet = Fleet(base, num_nodes, scheme=scheme, k=k, kind=kind)
    try:
        yield fleet
    finally:
        for node in fleet.nodes:
            node.end()
