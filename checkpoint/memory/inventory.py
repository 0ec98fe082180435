"""Which step can be restored from what the nodes still hold: a pure choice, the same wherever it is made.

Truth is what exists and verifies, not who voted: a step is restorable when, in every stripe of every group, no more
blocks are missing than the code makes up for. Copies of different generations are never combined, because two
generations may hold different states under one step number. Copies in memory and on local drives are, if they are of
one generation and step: they are the same bytes.
Must not know: sockets, files, tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from windlass.checkpoint.memory.groups import num_parity
from windlass.checkpoint.memory.header import State
from windlass.checkpoint.memory.membership import Membership
from windlass.checkpoint.memory.stripes import DATA, PARITY

RAM, LOCAL, STORAGE = "ram", "local", "storage"  # where a step can be
TIERS = (RAM, LOCAL)  # of what nodes hold, cheapest first


@dataclass(frozen=True, order=True)
class Held:
    """One copy of one rank's segment that a node says it has."""

    node: str
    host: str
    port: int
    tier: str  # "ram" | "local"
    rank: int
    role: str  # "data" | "parity"
    step: int
    generation: int
    ok: bool = True
    why: str = ""  # what is wrong when not ok
    state: int = State.COMMITTED

    def damaged(self, why: str) -> Held:
        """Return this copy as one that must not be read."""
        return replace(self, ok=False, why=why)


@dataclass(frozen=True)
class Saved:
    """One checkpoint in shared storage; generation 0 where it is not known."""

    step: int
    place: str
    generation: int = 0


@dataclass(frozen=True)
class Choice:
    """The step to restore, and from which copies: best first for each rank of the generation that took it.

    A rank without an entry in `data` is computed from the rest of its group. Tier "storage" has no copies.
    """

    step: int
    generation: int
    tier: str
    place: str = ""  # of a checkpoint in storage
    data: Mapping[int, tuple[Held, ...]] = field(default_factory=dict)
    parity: Mapping[int, tuple[Held, ...]] = field(default_factory=dict)
    decoded: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.tier == STORAGE:
            return f"step {self.step} of {self.place}"
        where = "memory" if self.tier == "ram" else "memory and local drives"
        how = f", ranks {_listed(self.decoded)} by decoding" if self.decoded else ""
        return f"step {self.step} of generation {self.generation} from {where}{how}"


def choose(
    holdings: Iterable[Held],
    worlds: Mapping[int, Membership],
    saved: Iterable[Saved] = (),
    *,
    left: Mapping[int, int] | None = None,
) -> tuple[Choice | None, list[str]]:
    """Return the newest step that can be restored, and why each newer one cannot.

    Newest is the highest step of the latest generation: a generation began at the newest step that could be restored
    then, so what older ones hold beyond it is a history that was left. A checkpoint of unknown generation counts by its
    step alone. Among equals memory wins. `worlds` are the memberships by generation. `left` says for generations that
    ended by going back to which step that was.

    Invariant: depends on the arguments alone and not on their order, so all ranks that hear the same choose the same
    """
    copies: dict[tuple[int, int], list[Held]] = {}
    for held in sorted(holdings):
        copies.setdefault((held.generation, held.step), []).append(held)
    stored = {(s.generation, s.step): s for s in sorted(saved, key=lambda s: (s.generation, s.step, s.place))}
    candidates = sorted([(*key, True) for key in copies] + [(*key, False) for key in stored], reverse=True)
    best: Choice | None = None
    passed_over: list[str] = []
    for generation, step, in_memory in candidates:
        if best is not None and (generation > 0 or step <= best.step):
            continue
        name = f"of generation {generation} in memory" if in_memory else f"of {stored[generation, step].place}"
        choice, why = None, void(generation, step, left or {})
        if not why and not in_memory:
            choice = Choice(step, generation, STORAGE, stored[generation, step].place)
        elif not why:
            choice, why = _restorable(step, generation, copies[generation, step], worlds.get(generation))
        if choice is not None:
            best = choice
        else:
            passed_over.append(f"step {step} {name}: {why}")
    return best, passed_over


def void(generation: int, step: int, left: Mapping[int, int]) -> str:
    """Return why a step does not belong to the history that goes on, or nothing if it does."""
    by = next((g for g, back in sorted(left.items()) if generation <= g and step > back), None)
    return "" if by is None else f"left behind when generation {by} went back to step {left[by]}"


def anchor(holdings: Iterable[Held], choice: Choice | None) -> tuple[int, int] | None:
    """Return (generation, step) of the snapshot that must be kept beside the chosen one until a newer is protected.

    It is the newest one, not newer than the choice, that survives whatever one that was committed survives: what some
    node shows as committed, or what is held in as many places. No node can tell alone, as it may not have heard of a
    commit. None: nothing in memory needs to be kept.
    """
    if choice is None or choice.tier == STORAGE:
        return None
    cover: dict[tuple[int, int], set[tuple[str, int]]] = {}
    committed: list[tuple[int, int]] = []
    for held in holdings:
        key = (held.generation, held.step)
        if held.tier == "ram" and held.ok and held.state >= State.ENCODED and key <= (choice.generation, choice.step):
            cover.setdefault(key, set()).add((held.role, held.rank))
            committed += [key] if held.state == State.COMMITTED else []
    if not cover:
        return None
    newest = max(committed) if committed else max(cover, key=lambda key: (len(cover[key]), key))
    safe = {key for key, places in cover.items() if key == newest or places >= cover[newest]}
    # What was committed last may have been freed in part already, when a start before this one was interrupted.
    return max(key for key in safe if not any(cover[key] < cover[other] for other in safe))


def erased(world: Membership, group: tuple[int, ...], data: Collection[int], parity: Collection[int]) -> set[int]:
    """Return the ranks of a group whose data can neither be read nor computed.

    `data` and `parity` are the ranks whose segments are there. Any n - k of the n blocks of a stripe give the others.
    """
    stripes = world.stripes_of(group[0])
    if stripes is None:
        return set(group) - set(data)
    lost: set[int] = set()
    for number in range(stripes.n):
        there = {DATA: data, PARITY: parity}
        missing = [b for b in stripes.stripe(number) if b.length and b.rank not in there[b.role]]
        if len(missing) > stripes.k:
            lost |= {block.rank for block in missing if block.role == DATA}
    return lost


def _restorable(
    step: int, generation: int, found: Sequence[Held], world: Membership | None
) -> tuple[Choice | None, str]:
    """Return what to read for a step, or why it cannot be restored."""
    if world is None:
        return None, "no node has the membership of that generation any more"
    usable = [held for held in found if held.ok]
    data, parity = (_by_rank(usable, role) for role in (DATA, PARITY))
    problems = [problem for group in world.groups if (problem := _shortage(group, world, found, data, parity))]
    if problems:
        return None, "; ".join(problems)
    in_ram = [{held.rank for held in usable if held.tier == "ram" and held.role == role} for role in (DATA, PARITY)]
    ram_alone = not any(erased(world, group, *in_ram) for group in world.groups)
    decoded = tuple(rank for rank in range(world.world_size) if rank not in data)
    return Choice(step, generation, "ram" if ram_alone else "local", "", data, parity, decoded), ""


def _shortage(
    group: tuple[int, ...],
    world: Membership,
    found: Sequence[Held],
    data: Collection[int],
    parity: Collection[int],
) -> str:
    lost = erased(world, group, data, parity)
    if not lost:
        return ""
    told = ", ".join(f"rank {rank} ({_reason(rank, world, found)})" for rank in sorted(lost))
    k = num_parity(world.scheme, world.k, len(group))
    if k == 0:
        return f"{told}, which nothing else in memory makes up for"
    short = sorted(rank for rank in group if rank not in data or rank not in parity)
    return f"{told}; ranks {_listed(short)} of the group {_listed(group)} lack data or parity, of which {k} may"


def _reason(rank: int, world: Membership, found: Sequence[Held]) -> str:
    node = world.members[rank].node
    bad = [held for held in found if held.rank == rank and held.role == DATA and not held.ok]
    if bad:
        return "; ".join(f"{held.node}: {held.why or 'damaged'}" for held in bad)
    return f"no copy is left of what was on {node}"


def _by_rank(copies: Iterable[Held], role: str) -> dict[int, tuple[Held, ...]]:
    out: dict[int, list[Held]] = {}
    for held in copies:
        if held.role == role:
            out.setdefault(held.rank, []).append(held)
    return {
        rank: tuple(sorted(found, key=lambda h: (TIERS.index(h.tier), h.node))) for rank, found in sorted(out.items())
    }


def _listed(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"
