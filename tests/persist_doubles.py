"""Nodes that hold a snapshot of some state, for tests of what is made of it: node folders, layouts and filled slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoint_doubles import FlatSource, even_shards
from windlass.checkpoint import persist as persist_module
from windlass.checkpoint import storage as storage_module
from windlass.checkpoint.frames import frames_of
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.header import OWN_PARITY, SlotHeader, State
from windlass.checkpoint.memory.layout import ALIGNMENT, Fragment, Layout
from windlass.checkpoint.memory.membership import Member, Membership
from windlass.checkpoint.memory.segment import Segment, Slot, hash_chunks
from windlass.checkpoint.memory.settings import Settings
from windlass.checkpoint.persist import Persister
from windlass.checkpoint.reader import dtype_name, read_tensor
from windlass.checkpoint.storage import storage_of
from windlass.checkpoint.store import list_checkpoints, verify
from windlass.checkpoint.url_storage import FsspecStorage

JOB = "0123456789abcdef"
CHUNK = 256


def layout_of(source: FlatSource) -> tuple[Layout, np.ndarray]:
    """Lay the pieces of a rank out, and return the bytes as a segment would hold them."""
    fragments, end = [], 0
    for piece in source.pieces:
        end += -end % ALIGNMENT
        fragments.append(Fragment(piece.key, dtype_name(piece.dtype), piece.global_shape, piece.box, end, piece.nbytes))
        end += piece.nbytes
    data = np.zeros(end, np.uint8)
    for piece, f in zip(source.pieces, fragments, strict=True):
        data[f.offset : f.offset + f.num_bytes] = piece.tensor.reshape(-1).view(torch.uint8).numpy()
    return Layout(tuple(fragments), end, frames_of(fragments)), data


@dataclass
class Nodes:
    """The nodes of a job, two ranks on each, with one slot per rank."""

    root: Path
    sources: Sequence[FlatSource]
    storage: str
    options: dict[str, Any] = field(default_factory=dict)
    generation: int = 1

    def __post_init__(self) -> None:
        self.log: list[str] = []
        (self.root / "shm").mkdir(parents=True, exist_ok=True)
        held = [layout_of(source) for source in self.sources]
        members = tuple(
            Member(rank, f"node-{rank // 2}", f"node-{rank // 2}", "", 0, layout.digest, layout.num_bytes)
            for rank, (layout, _) in enumerate(held)
        )
        groups = tuple((rank,) for rank in range(len(held)))
        self.membership = Membership(
            JOB, self.generation, len(held), "none", 1, groups, members, local_parity=False, chunk_bytes=CHUNK
        )
        self.folders: dict[str, NodeFolder] = {}
        self.slots: dict[int, Slot] = {}
        self.persisters: dict[str, Persister] = {}
        for node in self.membership.nodes:
            folder = self.folders[node] = NodeFolder(self.root / "shm", JOB, node).create()
            options = {"storage": self.storage, "mode": "lazy", **self.options}
            self.persisters[node] = Persister(folder, node, Settings(**options), self.log.append)
        for member, (layout, data) in zip(members, held, strict=True):
            folder = self.folders[member.node]
            folder.put_layout(layout)
            path = folder.path / f"data-{member.rank}-{self.generation}.seg"
            segment = Segment.create(path, "data", member.rank, max(len(data), 1), 1, CHUNK, len(data) // CHUNK + 1)
            self.slots[member.rank] = segment.slots[0]
            segment.slots[0].data[: len(data)] = data

    @property
    def leader(self) -> Persister:
        return self.persisters["node-0"]

    def hold(self, step: int, extra: Mapping[str, Any] | None = None) -> None:
        """Say that the slots hold this step, hashed."""
        for member in self.membership.members:
            slot = self.slots[member.rank]
            table = hash_chunks(slot.data, member.num_bytes, CHUNK)
            header = SlotHeader(
                job=JOB,
                generation=self.generation,
                step=step,
                rank=member.rank,
                world_size=len(self.slots),
                role="data",
                layout=member.layout,
                num_bytes=member.num_bytes,
                chunk_bytes=CHUNK,
                state=State.COMMITTED,
                facts={"extra": {"step": step, **(extra or {})}} if member.rank == 0 else {},
                hashes={member.rank: table},
            )
            assert slot.write(header)

    def begin(self, step: int) -> str:
        return self.leader.begin("storage", step, self.generation, self.membership)

    def prepare(self, step: int, temporary: str, node: str, level: str = "storage") -> dict[str, Any]:
        data = {m.rank: self.slots[m.rank] for m in self.membership.by_node[node]}
        persister = self.persisters[node]
        return persister.prepare(level, step, self.generation, temporary, self.membership, data, {})

    def commit(self, step: int, temporary: str, rows: Mapping[str, Any]) -> str:
        return self.leader.commit("storage", step, self.generation, temporary, rows, self.membership)

    def persist(self, step: int, extra: Mapping[str, Any] | None = None) -> str:
        """Do what the snapshot processes do together: both phases, and clearing up where one fails."""
        self.hold(step, extra)
        temporary = self.begin(step)
        try:
            rows = {node: self.prepare(step, temporary, node) for node in self.folders}
            place = self.commit(step, temporary, rows)
            self.leader.retire(step, self.generation)
            return place
        except BaseException as error:
            if isinstance(error, Exception):  # others stand for a process that is no more
                self.leader.abandon("storage", temporary)
            raise


def nodes_with(
    root: Path, state: Mapping[str, torch.Tensor], storage: Path | str, num_ranks: int = 4, **options: Any
) -> Nodes:
    """Return nodes that hold this state in even shards."""
    generation = options.pop("generation", 1)
    return Nodes(root, even_shards(state, num_ranks), str(storage), options, generation)


def parity_header(job: str, generation: int, step: int, rank: int, data: np.ndarray) -> SlotHeader:
    """Describe a parity slot of these bytes."""
    return SlotHeader(
        job=job,
        generation=generation,
        step=step,
        rank=rank,
        world_size=1,
        role="parity",
        layout="",
        num_bytes=len(data),
        chunk_bytes=CHUNK,
        state=State.ENCODED,
        hashes={OWN_PARITY: hash_chunks(data, len(data), CHUNK)},
    )


class Crash(BaseException):
    """The process ends here: nothing below catches it, nothing is cleared up."""


PLACES = ["folder", "memory://", "file by fsspec"]


def place_for_checkpoints(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path | str:
    """Return a place for checkpoints: a folder, or one of the two kinds of URL that need no server."""
    if kind == "folder":
        return tmp_path / "run" / "checkpoints"
    if kind == "memory://":
        forget_memory()
        return "memory://run/checkpoints"
    monkeypatch.setattr(storage_module, "LocalStorage", lambda folder: FsspecStorage(f"local://{folder}"))
    return f"file://{tmp_path}/run/checkpoints"


def forget_memory() -> None:
    """Empty the file system that lies in memory."""
    import fsspec

    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def failing_at(monkeypatch: pytest.MonkeyPatch, wanted: str, error: BaseException, rank: int = 0) -> None:
    """Raise at a fault point of persisting, on one rank."""

    def fault(point: str, *, rank: int, step: int, generation: int) -> None:
        if point == f"persist.{wanted}" and rank == of:
            raise error

    of = rank
    monkeypatch.setattr(persist_module, "fault", fault)


def assert_holds(place: Path | str, state: Mapping[str, torch.Tensor]) -> None:
    """Assert that a checkpoint is valid and holds these tensors bit for bit."""
    assert verify(place) == []
    for key, tensor in state.items():
        found = read_tensor(place, key)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), key


def steps_at(target: Path | str) -> list[tuple[int, int]]:
    """Return (generation, step) of what is complete, newest first."""
    return [(info.generation, info.step) for info in list_checkpoints(target) if info.problem is None]


def everything_at(target: Path | str) -> list[str]:
    """Return the names of all files, and of folders that hold none."""
    storage, found = storage_of(target), []
    for name in storage.names():
        found += [f"{name}/{inner}" for inner in storage.names(name)] or [name]
    return found
