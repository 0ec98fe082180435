"""Connects to a Ray cluster or starts one on this machine, and reserves room in it.

A Ray that we start listens on loopback only: Ray asks for token authentication on other addresses.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from windlass.dist.errors import ConfigError, PlanError
from windlass.launch.local import LaunchConfig
from windlass.launch.ray.emulated import emulated
from windlass.launch.ray.placement import Placement, check_fits

OBJECT_STORE_BYTES = 96 << 20  # only lines and reports pass through Ray
RESERVE_S = 60.0
CONNECT_S = 5.0


@contextmanager
def connected(address: str, num_workers: int, *, namespace: str | None = None) -> Iterator[None]:
    """Connect to `auto` or HOST:PORT, or start `local`; leave an existing cluster alone, stop one that we started.

    Raises:      PlanError if there is no cluster or it refuses us
    """
    _check_address(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": namespace}
    try:
        if address == "local":
            ray.init(
                address="local",
                num_cpus=num_workers,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _node_ip_address="127.0.0.1",
                **quiet,
            )
        else:
            ray.init(address=address, **quiet)
    except ray.exceptions.AuthenticationError as exc:
        raise PlanError(
            f"--ray {address}: the cluster asks for a token ({_first_line(exc)}). "
            "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the file with the cluster's token on every machine"
        ) from exc
    except (ConnectionError, RuntimeError, ValueError) as exc:
        raise _no_cluster(address, _first_line(exc)) from exc
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def cluster_for(
    address: str, config: LaunchConfig, num_nodes: int, *, emulate: bool = False, namespace: str | None = None
) -> Iterator[str]:
    """Connect to a cluster and yield its address. `local` with several nodes, or with `emulate`, is emulated here."""
    with ExitStack() as stack:
        if address == "local" and (emulate or num_nodes > 1):
            nodes = max(num_nodes, 1)
            spares = config.spares if emulate else 0
            address = stack.enter_context(emulated(nodes + spares, -(-config.workers // nodes))).address
        stack.enter_context(connected(address, config.workers, namespace=namespace))
        yield address


def _check_address(address: str) -> None:
    """Refuse an address that nobody listens at now: Ray would try for a minute."""
    if address in ("local", "auto"):
        return
    if address.startswith("ray://"):
        raise ConfigError(
            f"--ray {address}: the Ray client protocol is not supported. Run the command on a node of the cluster "
            "with --ray auto or --ray HOST:6379"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--ray {address}: must be local, auto or HOST:PORT, for example 10.0.0.5:6379")
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except OSError as exc:
        raise _no_cluster(address, str(exc)) from exc


def _first_line(exc: BaseException) -> str:
    return str(exc).partition("\n")[0]


def _no_cluster(address: str, why: str) -> PlanError:
    if address == "local":
        return PlanError(
            f"--ray local: Ray does not start on this machine ({why}). `windlass doctor` looks for the reason"
        )
    return PlanError(
        f"--ray {address}: cannot connect ({why}). Start a cluster with `ray start --head`, or use --ray local"
    )


def wants_gpu(device: str, num_workers: int) -> bool:
    """Return whether workers shall have a GPU each: `cuda`, or `auto` and the cluster has enough of them."""
    return device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU", 0) >= num_workers)


@contextmanager
def reserved(placement: Placement) -> Iterator[Any]:
    """Hold a placement group while the block runs.

    Raises:      PlanError if the cluster is too small or does not become free within RESERVE_S
    """
    nodes = {node["NodeManagerHostname"] + "/" + node["NodeID"][:6]: node["Resources"] for node in alive_nodes()}
    check_fits(placement, nodes)
    group = placement_group([dict(bundle) for bundle in placement.bundles], strategy=placement.strategy)
    try:
        if not group.wait(RESERVE_S):
            free = " ".join(f"{kind}={ray.available_resources().get(kind, 0):g}" for kind in placement.worker)
            raise PlanError(
                f"the Ray cluster had no room within {RESERVE_S:g} s: {len(placement.bundles)} x "
                f"{placement.bundles[0]} ({placement.strategy}) needed, free now: {free}. "
                "Wait for other jobs to end, or lower launch.workers"
            )
        yield group
    finally:
        remove_placement_group(group)


def alive_nodes() -> list[dict[str, Any]]:
    """Return Ray's description of every living node."""
    return [node for node in ray.nodes() if node["Alive"]]
