"""What a snapshot process tells people: the newest step of every level, how far behind it is, what is not protected.

Must not know: how it is shown.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from windlass.checkpoint.memory.header import State
from windlass.checkpoint.memory.heartbeat import Phase, read_heartbeat
from windlass.checkpoint.memory.inventory import LOCAL, STORAGE
from windlass.checkpoint.memory.pids import resident_bytes
from windlass.checkpoint.memory.stripes import DATA
from windlass.checkpoint.memory.votes import NOTHING
from windlass.dist.errors import CheckpointError

if TYPE_CHECKING:
    from windlass.checkpoint.memory.service import Service


@dataclass(frozen=True)
class Status:
    """One node. `newest`: by level ("ram", "peers", "local", "storage") the newest step, -1 for none.

    ram: whole in this node's memory; peers: protected on all nodes; the others: durable. `lag`: finished steps that
    are not protected on all nodes. `skipped`: persists left out because one was under way. `dropped`: snapshots that
    not all ranks had. `degraded`: ranks that the loss of a node may take. `silent`: nodes that do not answer, and why.
    """

    node: str
    generation: int
    pid: int
    leader: str = ""
    newest: dict[str, int] = field(default_factory=dict)
    lag: int = 0
    skipped: int = 0
    dropped: int = 0
    degraded: list[int] = field(default_factory=list)
    silent: dict[str, str] = field(default_factory=dict)
    last_error: str = ""
    slots: list[dict[str, Any]] = field(default_factory=list)
    resident: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def parse(values: dict[str, Any]) -> Status:
        """Read what came from a socket; fields of a newer version are left out."""
        try:
            return Status(**{f.name: values[f.name] for f in fields(Status) if f.name in values})
        except TypeError as error:
            raise CheckpointError(f"a status is malformed: {error}") from error


@dataclass(frozen=True)
class Flushed:
    """A step that is durable. Units: bytes, seconds."""

    step: int
    place: str
    num_bytes: int
    seconds: float


def status_of(process: Service) -> dict[str, Any]:
    """Return the status of a process as JSON."""
    generation = process.folder.read_generation()
    held = list(process.slots.held())
    slots = [
        {"rank": h.rank, "role": h.role, "step": h.step, "generation": h.generation, "state": h.state.name}
        for _, h in held
    ]
    out = {
        "node": process.folder.node,
        "generation": generation,
        "pid": os.getpid(),
        "slots": sorted(slots, key=lambda s: (s["role"], s["rank"], s["generation"], s["step"])),
        "resident": resident_bytes(),
        "newest": {"ram": NOTHING, "peers": NOTHING, LOCAL: NOTHING, STORAGE: NOTHING},
    }
    duty = process.duty
    if duty is None:
        return out
    term, decree = duty.term, duty.term.decree
    whole: list[set[int]] = [
        {h.step for _, h in held if h.role == DATA and h.rank == rank and h.state >= State.FILLED}
        for rank in term.ranks
    ]
    # Without a commit yet, what was restored is what older generations hold; it counts as far as it is here.
    finished = [
        beat.step - (beat.phase == Phase.STEP)
        for path in process.folder.beating().values()
        if (beat := read_heartbeat(path)) is not None and beat.generation == term.generation
    ]
    newest = {
        "ram": max(set.intersection(*whole), default=NOTHING) if whole else NOTHING,
        "peers": decree.watermark,
        **{level: decree.saved.get(level, term.base.durable.get(level, NOTHING)) for level in (LOCAL, STORAGE)},
    }
    return out | {
        "leader": term.leader,
        "newest": newest,
        "lag": max(max(finished, default=NOTHING) - max(decree.watermark, term.base.step), 0),
        "skipped": decree.skipped,
        "dropped": term.ballot.num_dropped if term.ballot is not None else 0,
        "degraded": duty.degraded(),
        "silent": duty.peers.silent(),
        "last_error": decree.problem or duty.protector.problem,
    }
