"""The nodes of a Ray cluster as a job sees them: stable names, failure domains, room, who is lost, who is drained.

Must not know: workers, agents, generations.
"""

from __future__ import annotations

import contextlib
import errno
import math
import re
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import ray
from ray._private.state import available_resources_per_node
from ray._private.state import state as ray_state

DOMAIN_LABEL = "windlass/domain"  # of a Ray node (`ray start --labels`): what fails together
PROBE_S = 1.0
REFUSE_S = 0.05


@dataclass
class Place:
    """One node under its name. `labelled`: its label names its domain; `lost`: somebody found out before Ray did, and
    said why.
    """

    name: str
    domain: str
    node_id: str
    host: str
    port: int
    resources: dict[str, float]
    alive: bool = True
    lost: str = ""
    labelled: bool = False

    @property
    def usable(self) -> bool:
        return self.alive and not self.lost

    def told(self, domain: str) -> None:
        """Take the domain that the node's own environment names (empty: none), unless its label names one."""
        if domain and not self.labelled:
            self.domain = domain

    def answers(self) -> bool:
        """Ask whether Ray's process on this node still listens. No is certain; yes may be a node that hangs."""
        try:
            socket.create_connection((self.host, self.port), PROBE_S).close()
        except OSError:
            return False
        return True


def refusing(places: Sequence[Place]) -> list[Place]:
    """Return those whose host says at once that Ray's process no longer listens: certain, while silence is not.

    Blocks:      host, at most REFUSE_S, all at once
    """
    refused = []
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        for place in places:
            family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
            probe = stack.enter_context(socket.socket(family))
            probe.setblocking(False)
            if probe.connect_ex((place.host, place.port)) == errno.ECONNREFUSED:
                refused.append(place)
            else:
                selector.register(probe, selectors.EVENT_WRITE, (probe, place))
        until = time.monotonic() + REFUSE_S
        while selector.get_map() and (ready := selector.select(until - time.monotonic())):
            for probe, place in [key.data for key, _ in ready]:
                selector.unregister(probe)
                if probe.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED:
                    refused.append(place)
    return refused


@final
class Places:
    """Every node that was ever seen, by name, in a fixed order."""

    def __init__(self, worker: dict[str, float]) -> None:
        self._worker = worker
        self._places: dict[str, Place] = {}
        self._names: dict[str, str] = {}  # by Ray's id of the node

    def __getitem__(self, name: str) -> Place:
        return self._places[name]

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def all(self) -> list[Place]:
        return list(self._places.values())

    def remember(self, name: str) -> None:
        """Know a node of an earlier controller that Ray no longer shows: it is lost."""
        if name not in self._places:
            self._places[name] = Place(name, name, "", "", 0, {}, alive=False, lost="Ray no longer knows it")

    def refresh(self) -> None:
        """Look at Ray's table of nodes. A node that comes back under its name is a new one in the same place."""
        table = ray.nodes()
        living = {entry["NodeID"]: entry for entry in table if entry["Alive"]}
        for place in self._places.values():
            place.alive = place.node_id in living
        for entry in sorted(living.values(), key=lambda entry: natural(entry["NodeName"])):
            name = self._name(entry, living)
            known = self._places.get(name)
            if known is not None and known.node_id == entry["NodeID"]:
                continue
            if self._fits(entry["Resources"]):
                label = entry.get("Labels", {}).get(DOMAIN_LABEL)
                self._places[name] = Place(
                    name,
                    label or entry["NodeManagerHostname"],
                    entry["NodeID"],
                    entry["NodeManagerAddress"],
                    entry["NodeManagerPort"],
                    entry["Resources"],
                    labelled=bool(label),
                )

    def _fits(self, resources: dict[str, float]) -> bool:
        return all(resources.get(kind, 0.0) >= amount for kind, amount in self._worker.items())

    def _name(self, entry: dict[str, Any], living: dict[str, dict[str, Any]]) -> str:
        node_id = entry["NodeID"]
        if node_id not in self._names:
            name = re.sub(r"[^A-Za-z0-9._-]", "-", entry["NodeName"] or node_id)
            others = {self._names[other] for other in living if other in self._names}
            self._names[node_id] = f"{name}-{node_id[:6]}" if name in others else name
        return self._names[node_id]

    def room(self) -> dict[str, int]:
        """Return how many more workers every living node could hold now."""
        free = available_resources_per_node()
        return {
            place.name: max(int(min(free.get(place.node_id, {}).get(k, 0.0) // a for k, a in self._worker.items())), 0)
            for place in self._places.values()
            if place.alive
        }

    def draining(self) -> dict[str, float]:
        """Return when nodes will be taken away, in Unix seconds by name; infinite where nobody said."""
        deadlines = ray_state.get_draining_nodes()
        return {
            place.name: deadlines[place.node_id] / 1000 or math.inf
            for place in self._places.values()
            if place.node_id in deadlines
        }


def natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts node-2 before node-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]
