"""Several Ray nodes on this machine, to try recovery out: each one a raylet with its own name and failure domain.

The head runs no workers, so any of the others may be lost. Health checks are quick, memory for objects small, and
every node has an own loopback address. The nodes end with this process. Must not know what runs on the nodes.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

from ray._private.authentication.authentication_token_setup import (
    enable_token_auth_by_default,
    ensure_token_if_auth_enabled,
)
from ray.cluster_utils import Cluster

from windlass.launch.ray.places import DOMAIN_LABEL

NETWORK = (127, 0, 1)  # not 127.0.0.1, which Ray replaces by the address of the host
OBJECT_STORE_BYTES = 80 << 20
HEALTH_CHECKS = {  # a killed raylet is noticed after 2 s, not 14
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 3,
}


@final
class EmulatedNodes:
    """A Ray head and `node-0`, `node-1`, .. with room for so many workers each.

    One starts after the other, a second each: Ray gives up a node whose helpers take too long to start.
    """

    def __init__(self, num_nodes: int, workers_per_node: int) -> None:
        self._room = workers_per_node
        self._hosts = itertools.count(1)
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH_CHECKS, **self._node("head")}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        for number in range(num_nodes):
            self.add(f"node-{number}")

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self, name: str) -> None:
        """Start one more node, and wait until Ray knows it."""
        self._cluster.add_node(num_cpus=self._room, labels={DOMAIN_LABEL: name}, **self._node(name))

    def _node(self, name: str) -> dict[str, Any]:
        address = ".".join(map(str, (*NETWORK, next(self._hosts))))
        return {"node_name": name, "node_ip_address": address, "object_store_memory": OBJECT_STORE_BYTES}

    def shutdown(self) -> None:
        """End every node and what Ray runs on it."""
        self._cluster.shutdown()


@contextmanager
def emulated(num_nodes: int, workers_per_node: int) -> Iterator[EmulatedNodes]:
    """Run so many emulated nodes while the block runs."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    enable_token_auth_by_default()  # as `ray.init` does for a Ray it starts: parts of Ray listen on every interface
    ensure_token_if_auth_enabled({}, create_token_if_missing=True)
    nodes = EmulatedNodes(num_nodes, workers_per_node)
    try:
        yield nodes
    finally:
        nodes.shutdown()
