"""What the snapshot memory of nodes holds, in words and tables: read here, asked for on other hosts. Reads only.

Must not know: torch, configurations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from typing import Any

from windlass.checkpoint.manifest import readable_bytes
from windlass.checkpoint.memory.client import SnapshotClient
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.header import SlotHeader, State
from windlass.checkpoint.memory.heartbeat import is_alive, read_heartbeat
from windlass.checkpoint.memory.membership import Member, Membership
from windlass.checkpoint.memory.peers import Moves, kept_moves
from windlass.checkpoint.memory.segment import Segment, Slot, verify
from windlass.dist.errors import CheckpointError

ANSWER_S = 3.0


@dataclass(frozen=True)
class SlotRow:
    """One slot. `problem`: why its segment cannot be read."""

    node: str
    rank: int
    role: str
    slot: int
    step: int | None = None
    generation: int | None = None
    state: str = "FREE"
    num_bytes: int = 0
    problem: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def slots_of(folder: NodeFolder) -> Iterator[tuple[SlotRow, Slot | None, SlotHeader | None]]:
    """Yield every slot of a node; it is mapped until the next one is asked for."""
    for file in folder.segments():
        empty = SlotRow(folder.node, file.rank, file.role, 0)
        try:
            segment = Segment.open(file.path)
        except (CheckpointError, FileNotFoundError) as error:
            yield SlotRow(**{**vars(empty), "problem": str(error), "state": "DAMAGED"}), None, None
            continue
        with closing(segment):
            for number, slot in enumerate(segment.slots):
                header = slot.header()
                row = SlotRow(folder.node, file.rank, file.role, number)
                if header is not None and header.state != State.FREE:
                    known = (header.step, header.generation, header.state.name, header.num_bytes)
                    row = SlotRow(folder.node, file.rank, file.role, number, *known)
                yield row, slot, header
                del slot


def list_slots(folder: NodeFolder) -> list[SlotRow]:
    return [row for row, _, _ in slots_of(folder)]


def slot_table(rows: Sequence[SlotRow]) -> list[str]:
    """Return a table of slots, the newest step first."""
    order = sorted(rows, key=lambda r: (-(r.generation or 0), -(r.step or 0), r.rank, r.role, r.slot))
    table = [("STEP", "GENERATION", "RANK", "ROLE", "STATE", "BYTES", "NODE")]
    for row in order:
        step = "" if row.step is None else str(row.step)
        generation = "" if row.generation is None else str(row.generation)
        size = readable_bytes(row.num_bytes) if row.step is not None else ""
        table.append((step, generation, str(row.rank), row.role, row.state, size, row.problem or row.node))
    widths = [max(len(line[column]) for line in table) for column in range(6)]
    return [
        "  ".join([*(cell.rjust(width) for cell, width in zip(line[:6], widths, strict=True)), line[6]])
        for line in table
    ]


def node_lines(folder: NodeFolder) -> list[str]:
    """Say who serves a node and how far its ranks are."""
    process = folder.read_smp()
    served = "no snapshot process" if process is None else f"snapshot process {process.pid}"
    if process is not None:
        served += f" at {process.host}:{process.port}" if process.alive else " (dead)"
    lines = [f"{folder.node}: generation {folder.read_generation()}, {served}, {folder.path}"]
    for rank, path in folder.beating().items():
        beat = read_heartbeat(path)
        if beat is not None:
            alive = f"{beat.silent_s:.1f} s ago" if is_alive(beat.pid, beat.started) else "its process has ended"
            lines.append(f"  rank {rank}: {beat.phase.name} {beat.step}, {alive}")
    return lines


def ask_others(folders: Sequence[NodeFolder]) -> list[tuple[str, list[SlotRow]]]:
    """Ask the nodes of a run that have no folder here: a line about each, and what it holds in memory.

    Blocks: host, at most about twice ANSWER_S
    """
    here = {folder.node for folder in folders}
    worlds = [world for folder in folders if (world := _newest_membership(folder)) is not None]
    newest = max(worlds, key=lambda world: world.generation, default=None)
    if newest is None or not (away := {m.node: m for m in newest.members if m.node not in here}):
        return []
    with ThreadPoolExecutor(min(len(away), 32), "snapshot-ls") as pool:
        return list(pool.map(lambda member: _asked(member, folders[0]), _where_now(away, folders, newest)))


def _where_now(members: Mapping[str, Member], folders: Sequence[NodeFolder], membership: Membership) -> list[Member]:
    """Return the members at the addresses to which their processes have moved, as far as a folder here knows."""
    moves: Moves = {}
    for folder in folders:
        for node, at in kept_moves(folder, membership).items():
            moves[node] = max(at, moves.get(node, at), key=itemgetter(2))
    return [replace(m, host=moves[n][0], port=moves[n][1]) if n in moves else m for n, m in members.items()]


def _newest_membership(folder: NodeFolder) -> Membership | None:
    for generation in reversed(folder.memberships()):
        path = folder.membership_path(generation)
        try:
            return Membership.parse(path.read_bytes(), str(path))
        except (OSError, CheckpointError):  # damaged or just removed: an older one may still tell
            continue
    return None


def _asked(member: Member, folder: NodeFolder) -> tuple[str, list[SlotRow]]:
    try:
        with SnapshotClient(member.host, member.port, folder.job, folder.read_token, ANSWER_S) as client:
            hello, found = client.hello(), client.inventory()
            rows = [
                SlotRow(
                    member.node,
                    int(held["rank"]),
                    str(held["role"]),
                    number,
                    int(held["step"]),
                    int(held["generation"]),
                    State(held["state"]).name,
                    int(held["num_bytes"]),
                )
                for number, held in enumerate(found.held)
                if held["tier"] == "ram"
            ]
        served = f"snapshot process {hello['pid']} at {member.host}:{member.port}, on another host"
        return f"{member.node}: generation {found.generation}, {served}", rows
    except (CheckpointError, KeyError, TypeError, ValueError) as error:
        return f"{member.node}: does not answer: {error}", []


def verify_slots(folder: NodeFolder) -> Iterator[tuple[str, str]]:
    """Read every byte of a node and yield for each slot that holds something its name and what is wrong with it."""
    for row, slot, header in slots_of(folder):
        name = f"{row.node}, {row.role} of rank {row.rank}, step {row.step}"
        if row.problem:
            yield f"{row.node}, {row.role} of rank {row.rank}", f"DAMAGED: {row.problem}"
        elif slot is not None and header is not None and header.state != State.FREE:
            if header.state < State.FILLED:
                yield name, "filling"
                continue
            try:
                chunks = verify(slot, header)
                yield name, f"DAMAGED: chunks {', '.join(map(str, chunks))}" if chunks else ""
            except CheckpointError as error:
                yield name, f"DAMAGED: {error}"
        del slot


def show_step(folders: Sequence[NodeFolder], step: int | None) -> list[dict[str, Any]]:
    """Return what is known of the snapshots of a step (None: the newest), one object for each segment."""
    found = [
        (folder, header)
        for folder in folders
        for _, _, header in slots_of(folder)
        if header is not None and header.state > State.FILLING
    ]
    if step is None and found:
        step = max((header.generation, header.step) for _, header in found)[1]
    return [_shown(folder, header) for folder, header in found if header.step == step]


def _shown(folder: NodeFolder, header: SlotHeader) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "node": folder.node,
        "rank": header.rank,
        "role": header.role,
        "step": header.step,
        "generation": header.generation,
        "state": header.state.name,
        "bytes": header.num_bytes,
        "world_size": header.world_size,
        "facts": header.facts,
    }
    layout = folder.read_layout(header.layout) if header.layout else None
    if layout is not None:
        shown["tensors"] = [
            {"key": f.key, "dtype": f.dtype, "shape": list(f.global_shape), "box": str(f.box), "bytes": f.num_bytes}
            for f in layout.fragments
        ]
    path = folder.membership_path(header.generation)
    if path.exists():
        membership = Membership.parse(path.read_bytes(), str(path))
        shown["redundancy"] = {
            "scheme": membership.scheme,
            "groups": [list(group) for group in membership.groups],
            "nodes": [member.node for member in membership.members],
        }
    return shown
