"""What somebody who sees all nodes at once knows: which snapshots can be restored, and what must survive.

Written independently of the runtime's choice (inventory.py), which is compared with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations

from tests.protocol_parts import Key, Node, Shape, Violation
from windlass.checkpoint.memory.groups import num_parity
from windlass.checkpoint.memory.header import State
from windlass.checkpoint.memory.membership import Membership

Copies = dict[Key, dict[tuple[str, int], set[str]]]  # snapshot -> role and rank -> nodes with a good copy


class Truth:
    """Follows what was committed and what faults have taken of it, and asserts the invariants."""

    def __init__(self, shape: Shape, nodes: Mapping[str, Node]) -> None:
        self.shape, self.nodes = shape, nodes
        self.worlds: dict[int, Membership] = {}
        self.history: dict[Key, tuple[Key | None, int]] = {}  # update -> the one before it, its sample
        self.protected: Key | None = None
        self.gone: set[int] = set()  # ranks of `protected` of which a fault took something since the commit
        self.spoils: list[tuple[Key, int]] = []  # damaged copies: snapshot and rank
        self.losses: list[tuple[str, int]] = []  # nodes that went, and how many generations there were by then
        self.before: Key | None = None  # the commit before `protected`
        self.floor: Key | None = None  # what may not be lost: `protected`, or what a later generation keeps of it
        self.num_commits = 0
        self.left: dict[int, int] = {}  # generation -> the step to which it went back

    def void(self, key: Key) -> bool:
        """Whether a snapshot belongs to a history that was left on purpose."""
        return any(key[0] <= generation and key[1] > step for generation, step in self.left.items())

    def go_back(self, generation: int, step: int) -> None:
        """Take note that a generation ends by going back to a step.

        What it has in memory may go until the next one begins: only storage keeps a step that is gone back to.
        """
        self.left[generation] = step
        self.protected = self.floor = self.before = None

    def k(self, group: tuple[int, ...]) -> int:
        return num_parity(self.shape.scheme, self.shape.k, len(group))

    def copies(self) -> Copies:
        """Return who holds verified copies of what, on nodes that can be reached."""
        out: Copies = {}
        for node in self.nodes.values():
            if node.there:
                for (role, rank, _), segment in node.segments.items():
                    usable = State.FILLED if role == "data" else State.ENCODED
                    for slot in segment.slots:
                        if slot.key is not None and slot.state >= usable and slot.good:
                            out.setdefault(slot.key, {}).setdefault((role, rank), set()).add(node.name)
        return out

    def restorable(self, without: Iterable[str] = (), copies: Copies | None = None) -> set[Key]:
        """Return all snapshots in memory that can be restored when these nodes are gone too."""
        gone = set(without)
        copies = self.copies() if copies is None else copies
        return {
            key
            for key, held in copies.items()
            if key[0] in self.worlds
            and not self.void(key)
            and all(self._whole(g, held, gone) for g in self.worlds[key[0]].groups)
        }

    def _whole(self, group: tuple[int, ...], held: Mapping[tuple[str, int], set[str]], gone: set[str]) -> bool:
        n, k = len(group), self.k(group)
        data = [bool(held.get(("data", r), set()) - gone) for r in group]
        if all(data):
            return True
        parity = [bool(held.get(("parity", r), set()) - gone) for r in group]
        for stripe in range(n):
            holders = {(stripe + i) % n for i in range(k)}
            missing = [m for m in range(n) if not (parity if m in holders else data)[m]]
            if len(missing) > k and not holders.issuperset(missing):
                return False
        return True

    def content(self, key: Key) -> Key | None:
        """Return of which update all copies of a snapshot are.

        Raises: Violation if they disagree
        """
        found = set()
        for node in self.nodes.values():
            for (role, _, _), segment in node.segments.items():
                slot = segment.holding(key)
                if slot is not None and slot.good and slot.state >= (State.FILLED if role == "data" else State.ENCODED):
                    found |= {slot.bytes_of} if role == "data" else set(slot.bytes_of)
        if len(found) != 1:
            raise Violation(f"I1: the copies of {key} are of the updates {found}")
        return found.pop()

    def committed(self, key: Key) -> None:
        """Take note that a leader has licensed the freeing of what is older: this much must survive from now on."""
        if key[0] <= max(self.left, default=0) or (self.protected is not None and key <= self.protected):
            return
        self.before, self.protected, self.floor = self.protected or key, key, key
        self.num_commits += 1
        # Who was hit while that generation ran. Whoever lacks the step for another reason is no excuse for its loss. A
        # damaged copy of the commit before counts too: a recovery may have to choose which of the two it keeps.
        world = self.worlds[key[0]]
        nodes = {name for name, generation in self.losses if generation >= key[0]}
        self.gone = {m.rank for m in world.members if m.node in nodes or not self.nodes[m.node].there}
        self.gone |= {rank for spoiled, rank in self.spoils if spoiled >= self.before}
        self.check("committed")

    def spoiled(self, key: Key | None, rank: int) -> None:
        """Take note of a fault that took one copy. What is newer than a commit may be all that is kept of it."""
        if key is not None:
            self.spoils.append((key, rank))
            if self.before is not None and key >= self.before:
                self.gone.add(rank)

    def lost(self, node: Node) -> None:
        """Take note of a fault that took all copies on a node, or the way to them."""
        self.losses.append((node.name, max(self.worlds, default=0)))
        if self.protected is not None:
            self.gone |= {m.rank for m in self.worlds[self.protected[0]].members if m.node == node.name}

    def tolerable(self, more: Iterable[str] = ()) -> bool:
        """Whether what the protected snapshot has suffered, and the loss of more nodes, is what the scheme is for."""
        if self.protected is None:
            return False
        world, nodes = self.worlds[self.protected[0]], set(more)
        lost = self.gone | {m.rank for m in world.members if m.node in nodes}
        return all(len(lost & set(group)) <= self.k(group) for group in world.groups)

    def keep(self, anchor: Key | None) -> None:
        """Take note of what a new generation, going on from another snapshot, has promised to keep."""
        if self.floor is not None and anchor is not None:
            self.floor = min(self.floor, anchor)

    def check(self, what: str) -> None:
        """Assert I2 and I3: what was committed survives every further loss of nodes that the scheme tolerates."""
        if self.protected is None:
            return
        copies = self.copies()
        names = [n.name for n in self.nodes.values() if n.there and n.segments]
        for count in range(len(names)):
            losses = [lost for lost in combinations(names, count) if self.tolerable(lost)]
            for lost in losses:
                newest = max(self.restorable(lost, copies), default=None)
                if newest is None or newest < self.floor:
                    raise Violation(
                        f"I2, I3: {what}: without {lost or 'anything more'} the newest is {newest}, but "
                        f"{self.protected} was committed and {self.floor} was to be kept (lost before: ranks "
                        f"{sorted(self.gone)})"
                    )
            if not losses:
                return

    def check_samples(self, content: Key | None, skipped: Iterable[tuple[int, int]] = ()) -> None:
        """Assert I10: the updates that led to a state took each sample once, in order, but for those skipped."""
        samples = []
        while content is not None:
            content, sample = self.history[content]
            samples.append(sample)
        left_out = {sample for first, stop in skipped for sample in range(first, stop)}
        if samples[::-1] != [i for i in range(max(samples, default=-1) + 1) if i not in left_out]:
            raise Violation(f"I10: samples {samples[::-1]}, left out {sorted(left_out)}")

    def hit(self, key: Key, node: str) -> bool:
        """Whether a fault is to blame for what a node lacks of a snapshot."""
        ranks = {m.rank for m in self.worlds[key[0]].members if m.node == node}
        return any(n == node and g >= key[0] for n, g in self.losses) or any(
            spoiled == key and rank in ranks for spoiled, rank in self.spoils
        )
