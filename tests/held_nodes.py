"""Test double of nodes that hold snapshots: folders with real segments and real parity, one rank per node."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.checkpoint_doubles import FlatSource
from windlass.checkpoint.memory.copies import Peer, Reach
from windlass.checkpoint.memory.encode import encode_parity, group_facts
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.header import OWN_PARITY, SlotHeader, State
from windlass.checkpoint.memory.inventory import Held
from windlass.checkpoint.memory.layout import ALIGNMENT, Fragment, Layout
from windlass.checkpoint.memory.membership import Member, Membership
from windlass.checkpoint.memory.segment import Segment, hash_chunks, num_chunks
from windlass.dist.errors import CheckpointError

CHUNK = 128
JOB = "0123456789abcdef"
TOKEN = "a shared secret"
NUM_SLOTS = 2


def layout_of(source: FlatSource) -> Layout:
    """Lay out the pieces of a source one after the other."""
    fragments, at = [], 0
    for piece in source.pieces:
        dtype = str(piece.dtype).removeprefix("torch.")
        fragments.append(Fragment(piece.key, dtype, piece.global_shape, piece.box, at, piece.nbytes))
        at += -(-piece.nbytes // ALIGNMENT) * ALIGNMENT
    return Layout(tuple(fragments), at)


def bytes_of(source: FlatSource, layout: Layout) -> np.ndarray:
    """Return what a slot holds of a source."""
    out = np.zeros(layout.num_bytes, np.uint8)
    for piece, f in zip(source.pieces, layout.fragments, strict=True):
        raw = piece.tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        out[f.offset : f.offset + f.num_bytes] = raw
    return out


class HeldNodes:
    """The nodes of one generation: node-r holds the data of rank r and its part of the parity."""

    def __init__(
        self,
        base: Path,
        sources: Sequence[FlatSource],
        *,
        generation: int = 1,
        scheme: str = "xor",
        k: int = 1,
        ports: Sequence[int] | None = None,
    ) -> None:
        self.base, self.generation = base, generation
        ranks = range(len(sources))
        self.layouts = [layout_of(source) for source in sources]
        self.folders = [NodeFolder(base, JOB, f"node-{rank}").create(TOKEN) for rank in ranks]
        members = tuple(
            Member(
                r, f"node-{r}", f"rack-{r}", "127.0.0.1", ports[r] if ports else 9000 + r, part.digest, part.num_bytes
            )
            for r, part in enumerate(self.layouts)
        )
        groups = (tuple(ranks),) if scheme != "none" else tuple((rank,) for rank in ranks)
        self.world = Membership(JOB, generation, len(sources), scheme, k, groups, members, False, CHUNK)
        for rank, folder in enumerate(self.folders):
            folder.replace(folder.membership_path(generation), self.world.dump().encode())
            for member in self.world.group_of(rank):
                folder.put_layout(self.layouts[member])

    # -- writing -----------------------------------------------------------------------------------------------------

    def take(self, step: int, sources: Sequence[FlatSource], extra: Any = None, *, slot: int = 0) -> None:
        """Write what all nodes hold of a step: data, then the parity of every group."""
        data = [bytes_of(source, layout) for source, layout in zip(sources, self.layouts, strict=True)]
        facts = [{"extra": extra or {"step": step}, "rng": f"of rank {rank}"} for rank in range(len(data))]
        tables = {rank: hash_chunks(part, len(part), CHUNK) for rank, part in enumerate(data)}
        for rank, part in enumerate(data):
            self._write("data", rank, step, part, {rank: tables[rank]}, facts[rank], slot)

        def fetch(rank: int, role: str, offset: int, into: memoryview) -> None:
            assert role == "data"
            np.frombuffer(into, np.uint8)[:] = data[rank][offset : offset + len(into)]

        for rank in range(len(data)):
            stripes = self.world.stripes_of(rank)
            if stripes is not None:
                parity = np.zeros(stripes.parity_bytes, np.uint8)
                encode_parity(stripes, rank, fetch, parity)
                hashes = {OWN_PARITY: hash_chunks(parity, len(parity), CHUNK), **{m: tables[m] for m in stripes.ranks}}
                wards = group_facts({member: facts[member] for member in stripes.wards(rank)})
                self._write("parity", rank, step, parity, hashes, wards, slot)

    def _write(self, role: str, rank: int, step: int, body: np.ndarray, hashes: Any, facts: Any, slot: int) -> None:
        header = SlotHeader(
            job=JOB,
            generation=self.generation,
            step=step,
            rank=rank,
            world_size=self.world.world_size,
            role=role,
            layout=self.layouts[rank].digest if role == "data" else "",
            num_bytes=len(body),
            chunk_bytes=CHUNK,
            state=State.COMMITTED,
            facts=facts,
            hashes=hashes,
        )
        table = num_chunks(len(body), CHUNK) + sum(num_chunks(layout.num_bytes, CHUNK) for layout in self.layouts)
        path = self.folders[rank].segment_path(role, rank, len(body), NUM_SLOTS, table)
        segment = Segment.ensure(path, role, rank, len(body), NUM_SLOTS, CHUNK, table)
        segment.slots[slot].data[: len(body)] = body
        assert segment.slots[slot].write(header)
        segment.close()

    def flip(self, role: str, rank: int, offset: int, *, slot: int = 0) -> None:
        """Change one byte of what a node holds."""
        path = next(s.path for s in self.folders[rank].segments() if (s.role, s.rank) == (role, rank))
        segment = Segment.open(path, writable=True)
        segment.slots[slot].data[offset] ^= 0x40
        segment.close()

    def lose(self, *ranks: int) -> None:
        """Lose nodes with all they hold."""
        for rank in ranks:
            shutil.rmtree(self.folders[rank].path)

    # -- reading -----------------------------------------------------------------------------------------------------

    def holdings(self) -> list[Held]:
        """Return what every node holds, as its headers say."""
        return [held for folder in self.folders for held in self._holdings_of(folder)]

    def _holdings_of(self, folder: NodeFolder) -> list[Held]:
        out = []
        for file in folder.segments():
            segment = Segment.open(file.path)
            for header in (slot.header() for slot in segment.slots):
                if header is not None and header.state >= State.FILLED:
                    port = self.world.members[header.rank].port
                    slot = (header.rank, header.role, header.step, header.generation)
                    out.append(Held(folder.node, "127.0.0.1", port, "ram", *slot))
            segment.close()
        return out

    def reach(self, node: int, wires: Wires | None = None) -> Reach:
        """Return what a trainer on a node reads with."""
        return Reach(self.folders[node], None, (wires or Wires(self)).connect)


class Wires:
    """Stands for the network between nodes: counts what is asked, and cuts nodes off."""

    def __init__(self, nodes: HeldNodes) -> None:
        self.nodes = nodes
        self.asked: list[tuple[str, str, int]] = []  # node, role, bytes
        self.cut: set[str] = set()
        self.cut_after: dict[str, int] = {}  # node -> reads until it dies

    def connect(self, held: Held) -> Peer:
        return _Wire(self, held.node)

    def read(self, node: str) -> None:
        """Raise if the node is cut off, or after this many reads from now on."""
        left = self.cut_after.get(node)
        if left is not None:
            self.cut_after[node] = left - 1
            if left <= 0:
                self.cut.add(node)
        if node in self.cut:
            raise CheckpointError(f"snapshot process of {node} did not answer 'read' within 1 s")


class _Wire:
    def __init__(self, wires: Wires, node: str) -> None:
        self.wires = wires
        self._there = Reach(NodeFolder(wires.nodes.base, JOB, node), None, wires.connect)

    def header_of(self, held: Held) -> SlotHeader:
        if held.node in self.wires.cut:
            raise CheckpointError(f"snapshot process of {held.node} is not there")
        return self._there.open(held).header

    def read_from(self, held: Held, offset: int, into: memoryview) -> None:
        self.wires.read(held.node)
        self.wires.asked.append((held.node, held.role, len(into)))
        slot, _ = self._there._own_slot(held)
        np.frombuffer(into, np.uint8)[:] = slot.data[offset : offset + len(into)]

    def close(self) -> None:
        self._there.close()
