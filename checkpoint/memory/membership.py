"""Who takes part in one generation of a job: ranks, their nodes and addresses, and the groups that protect them.

The document is written by the trainers at the start of a generation and kept by every snapshot process, so that
survivors know what a lost node held. Must not know: sockets, segments, torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, TypeVar

from windlass.checkpoint.memory.groups import num_parity
from windlass.checkpoint.memory.stripes import Stripes
from windlass.dist.errors import CheckpointError

Record = TypeVar("Record", "Member", "Membership")


@dataclass(frozen=True)
class Member:
    """One rank: where it runs, where the snapshot process of its node listens, and what it holds.

    Units: bytes
    """

    rank: int
    node: str
    domain: str
    host: str
    port: int
    layout: str  # digest of the Layout of its data segment
    num_bytes: int  # of its data


@dataclass(frozen=True)
class Membership:
    """The members of one generation, by rank, and their redundancy groups.

    Invariant: every rank is in exactly one group; a group of one is unprotected.
    """

    job: str
    generation: int
    world_size: int
    scheme: str  # none | replica | xor | reed_solomon
    k: int  # lost members that a group survives; see groups.num_parity for what a small group can hold
    groups: tuple[tuple[int, ...], ...]
    members: tuple[Member, ...]
    local_parity: bool  # parity is made by the trainers from replicated state, without network
    chunk_bytes: int

    def __post_init__(self) -> None:
        ranks = list(range(self.world_size))
        if [m.rank for m in self.members] != ranks:
            raise CheckpointError(
                f"membership of generation {self.generation}: members are ranks {[m.rank for m in self.members]}, "
                f"expected 0 to {self.world_size - 1} in order"
            )
        if sorted(rank for group in self.groups for rank in group) != ranks:
            raise CheckpointError(
                f"membership of generation {self.generation}: groups {list(self.groups)} do not hold each of "
                f"{self.world_size} ranks once"
            )

    @property
    def leader(self) -> Member:
        """Return the member on whose node commits are decided."""
        return self.members[0]

    @cached_property
    def by_node(self) -> dict[str, tuple[Member, ...]]:
        """Return the members of every node, in order of rank."""
        return {node: tuple(m for m in self.members if m.node == node) for node in self.nodes}

    @property
    def nodes(self) -> tuple[str, ...]:
        """Return the nodes in the order of their first rank."""
        return tuple(dict.fromkeys(m.node for m in self.members))

    def group_of(self, rank: int) -> tuple[int, ...]:
        """Return the redundancy group of a rank."""
        return next(group for group in self.groups if rank in group)

    def stripes_of(self, rank: int) -> Stripes | None:
        """Return how the group of a rank protects its members; None if it does not."""
        group = self.group_of(rank)
        k = num_parity(self.scheme, self.k, len(group))
        return Stripes(group, tuple(self.members[r].num_bytes for r in group), k, self.chunk_bytes) if k else None

    def address_of(self, node: str) -> tuple[str, int]:
        """Return where the snapshot process of a node listens."""
        member = self.by_node[node][0]
        return member.host, member.port

    def dump(self) -> str:
        """Return the document as JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def parse(text: str | bytes, where: str = "membership") -> Membership:
        """Read a document.

        Raises: CheckpointError if it is not one
        """
        try:
            record = json.loads(text)
            record["members"] = tuple(_build(Member, entry) for entry in record["members"])
            record["groups"] = tuple(tuple(int(rank) for rank in group) for group in record["groups"])
            return _build(Membership, record)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
            raise CheckpointError(f"{where}: not a membership document: {exc}") from exc


def _build(kind: type[Record], record: dict[str, Any]) -> Record:
    """Make a dataclass of JSON fields, of exactly the types it declares; unknown fields are left out."""
    names = {"int": int, "str": str, "bool": bool}
    values = {f.name: record[f.name] for f in fields(kind)}
    for f in fields(kind):
        wanted = names.get(str(f.type))
        if wanted is not None and type(values[f.name]) is not wanted:
            raise ValueError(f"{f.name} is {values[f.name]!r}, expected {f.type}")
    return kind(**values)
