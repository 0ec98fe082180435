"""How the ranks of a job find each other: a store, and what every rank says about itself through it.

Must not know: groups, collectives, what is sent later.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

from windlass.dist import env as environment
from windlass.dist.env import ProcessEnv
from windlass.dist.errors import CommError


@dataclass(frozen=True)
class Facts:
    """What one rank tells all others before anything is sent."""

    rank: int
    host: str  # equal between ranks that can share memory
    host_name: str
    pid: int
    device: str
    transport: str
    shm_address: str  # abstract socket name, or empty
    shm_problem: str  # why there is none


def host_key() -> str:
    """Name what must be equal for two processes to share memory: the running kernel and its namespaces."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return f"{boot}|{os.readlink('/proc/self/ns/net')}|{os.readlink('/proc/self/ns/pid')}"


def open_store(env: ProcessEnv, timeout_s: float) -> Any:
    """Open the store in which the ranks of this job meet.

    Raises: CommError naming the address and the seconds waited.
    """
    start = time.monotonic()
    timeout = timedelta(seconds=timeout_s)
    try:
        if env.rendezvous is not None:
            store: Any = dist.FileStore(env.rendezvous.removeprefix("file://"), env.world_size)
            store.set_timeout(timeout)
        else:
            url = f"tcp://{env.master_addr}:{env.master_port}"
            store, _, _ = next(dist.rendezvous(url, env.rank, env.world_size, timeout=timeout))
    except (RuntimeError, OSError, ValueError) as error:
        raise CommError(
            f"rank {env.rank} of {env.world_size} could not meet the others at {env.meeting_point} (waited "
            f"{time.monotonic() - start:.0f} s): {str(error).splitlines()[0]}. Is rank 0 running there, and is the "
            "port free and open?"
        ) from error
    return dist.PrefixStore("windlass", store)


def meet(store: Any, env: ProcessEnv, mine: Facts, timeout_s: float) -> list[Facts]:
    """Exchange facts with all ranks.

    Collective: every rank of the job, once
    Raises: CommError naming the ranks that did not come, or that disagree on the transport or kind of device.
    """
    start = time.monotonic()
    out: list[Facts] = []
    try:
        store.set(f"facts/{env.rank}", json.dumps(asdict(mine)))
        for rank in range(env.world_size):
            left = max(timeout_s - (time.monotonic() - start), 0.001)
            store.wait([f"facts/{rank}"], timedelta(seconds=left))
            out.append(Facts(**json.loads(store.get(f"facts/{rank}"))))
    except (RuntimeError, OSError) as error:
        missing = [r for r in range(env.world_size) if r > len(out) - 1 and not _came(store, r)]
        raise CommError(
            f"rank {env.rank}: the world of {env.world_size} ranks did not form at {env.meeting_point} within "
            f"{time.monotonic() - start:.0f} s: missing ranks {missing or 'unknown (the store is gone)'}"
        ) from error
    for other in out:
        for what in ("transport", "device"):
            if getattr(other, what) != getattr(mine, what):
                raise CommError(
                    f"ranks disagree on the {what}: rank {other.rank} uses {getattr(other, what)!r}, "
                    f"rank {mine.rank} uses {getattr(mine, what)!r}. Start all ranks with the same configuration"
                )
    return out


def _came(store: Any, rank: int) -> bool:
    try:
        return bool(store.check([f"facts/{rank}"]))
    except RuntimeError:
        return False


def own_address(env: ProcessEnv, *, one_host: bool) -> str:
    """Return the address of this host under which the other ranks reach it, empty where nothing tells.

    Invariant: a loopback address only if all ranks are on one host, or rank 0's host knows itself by one
    """
    target = "127.0.0.1" if one_host else env.master_addr
    if not target:
        return ""  # ranks of several hosts that met in a shared folder: nothing tells us where they are
    family, _, _, _, address = socket.getaddrinfo(target, env.master_port or 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing: asks the routing table for our own address
        return str(probe.getsockname()[0])


def choose_interface(env: ProcessEnv, *, one_host: bool) -> None:
    """Tell gloo which network interface leads to the other ranks, unless the user did (GLOO_SOCKET_IFNAME).

    gloo otherwise takes the address of the host's own name, which is often a loopback address on clusters.
    """
    own = own_address(env, one_host=one_host)
    if not own or (not one_host and ipaddress.ip_address(own).is_loopback):
        return  # rank 0's host knows itself by a loopback name: its outward address is for gloo to find
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == own for a in addresses):
            environment.set_default("GLOO_SOCKET_IFNAME", name)
            return
