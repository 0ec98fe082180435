"""How the ranks of a job find each other: a store, and what every rank says about itself through it.

Must not know: groups, collectives, what is sent later.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

from windlass.dist import env as environment
from windlass.dist.env import ProcessEnv
from windlass.dist.errors import CommError

LOOK_S = 0.01
AGAIN_S = 0.5  # between looks whether rank 0 has named another attempt
CONNECT_S = 1.0
_INTERNET = (socket.AF_INET, socket.AF_INET6)


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
    return f"{network_key()}|{os.readlink('/proc/self/ns/pid')}"


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
            if env.rank:
                _wait_for_listener(str(env.master_addr), int(env.master_port or 0), timeout_s)
                timeout = timedelta(seconds=max(timeout_s - (time.monotonic() - start), 1.0))
            url = f"tcp://{env.master_addr}:{env.master_port}"
            store, _, _ = next(dist.rendezvous(url, env.rank, env.world_size, timeout=timeout))
    except (RuntimeError, OSError, ValueError) as error:
        raise CommError(
            f"rank {env.rank} of {env.world_size} could not meet the others at {env.meeting_point} (waited "
            f"{time.monotonic() - start:.0f} s): {str(error).splitlines()[0]}. Is rank 0 running there, and is the "
            "port free and open?"
        ) from error
    return dist.PrefixStore("windlass", store)


def _wait_for_listener(host: str, port: int, timeout_s: float) -> None:
    """Return once somebody listens at an address, or time is over: a store that comes too early waits half a second.

    Blocks: host, at most `timeout_s` and a little
    """
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        with contextlib.suppress(OSError):  # the store will say what is wrong
            socket.create_connection((host, port), CONNECT_S).close()
            return
        time.sleep(LOOK_S)


def meet(store: Any, env: ProcessEnv, mine: Facts, timeout_s: float) -> tuple[list[Facts], Any]:
    """Exchange facts with all ranks; return them, and the part of the store that is of these ranks alone.

    A store may outlive an attempt (torchrun's does), and then holds what the ranks of an earlier one have said. So rank
    0 names this attempt anew, and what it has gathered counts for a rank only if it holds what that has said itself.

    Collective: every rank of the job, once
    Raises: CommError naming the ranks that did not come, or that disagree on the transport or kind of device.
    """
    start = time.monotonic()
    end, token = start + timeout_s, secrets.token_hex(8)
    said = json.dumps([token, asdict(mine)])
    try:
        if env.rank == 0:
            here = dist.PrefixStore(token, store)
            here.set("facts/0", said)
            store.set("attempt", token)
            everybody = _gather(here, env.world_size, end)
        else:
            here, everybody = _join(store, env.rank, said, end)
    except (RuntimeError, OSError) as error:
        missing = _missing(store, env.world_size) or "unknown (rank 0 is gone, or has not come)"
        raise CommError(
            f"rank {env.rank}: the world of {env.world_size} ranks did not form at {env.meeting_point} within "
            f"{time.monotonic() - start:.0f} s: missing ranks {missing}"
        ) from error
    facts = [Facts(**json.loads(text)[1]) for text in everybody]
    for other in facts:
        for what in ("transport", "device"):
            if getattr(other, what) != getattr(mine, what):
                raise CommError(
                    f"ranks disagree on the {what}: rank {other.rank} uses {getattr(other, what)!r}, "
                    f"rank {mine.rank} uses {getattr(mine, what)!r}. Start all ranks with the same configuration"
                )
    return facts, here


def _gather(here: Any, num_ranks: int, end: float) -> list[str]:
    """Collect what every rank says, and say it to all."""
    everybody = []
    for rank in range(num_ranks):
        here.wait([f"facts/{rank}"], _until(end))
        everybody.append(here.get(f"facts/{rank}").decode())
    here.set("everybody", json.dumps(everybody))
    return everybody


def _join(store: Any, rank: int, said: str, end: float) -> tuple[Any, list[str]]:
    """Say something in the attempt that rank 0 has named last, until that has heard it."""
    while True:
        store.wait(["attempt"], _until(end))
        attempt = store.get("attempt").decode()
        here = dist.PrefixStore(attempt, store)
        here.set(f"facts/{rank}", said)
        while store.get("attempt").decode() == attempt:
            try:
                here.wait(["everybody"], min(_until(end), timedelta(seconds=AGAIN_S)))
            except RuntimeError:
                if time.monotonic() > end:
                    raise
                continue
            everybody: list[str] = json.loads(here.get("everybody"))
            if everybody[rank:] and everybody[rank] == said:
                return here, everybody
            if time.monotonic() > end:
                raise RuntimeError("rank 0 has not named a new attempt")
            time.sleep(LOOK_S)  # all were there once, before this rank began


def _until(end: float) -> timedelta:
    return timedelta(seconds=max(end - time.monotonic(), 0.001))


def _missing(store: Any, num_ranks: int) -> list[int]:
    try:
        if not store.check(["attempt"]):
            return [0]
        here = dist.PrefixStore(store.get("attempt").decode(), store)
        return [rank for rank in range(num_ranks) if not here.check([f"facts/{rank}"])]
    except RuntimeError:
        return []


def network_key() -> str:
    """Name what must be equal for two processes to reach each other at loopback addresses."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return f"{boot}|{os.readlink('/proc/self/ns/net')}"


def own_address(env: ProcessEnv, *, one_host: bool) -> str:
    """Return the address of this host under which the other ranks reach it, empty where nothing tells.

    Invariant: a loopback address only if all ranks are on one host, or rank 0's host knows itself by one
    """
    target = "127.0.0.1" if one_host else env.master_addr
    if not target:
        return ""  # ranks of several hosts that met in a shared folder: nothing tells us where they are
    return _address_towards(target, env.master_port or 1)


def _address_towards(target: str, port: int = 1) -> str:
    """Return the address that this host has on the way to another one."""
    family, _, _, _, address = socket.getaddrinfo(target, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing: asks the routing table for our own address
        return str(probe.getsockname()[0])


def address_for_peers(env: ProcessEnv, gather: Callable[[Any], list[Any]]) -> str:
    """Return the address of this host at which those of all ranks reach a server; empty where any address will do,
    because all ranks are on one host (several nodes may be emulated there).

    In this order: the interface that GLOO_SOCKET_IFNAME names, the one that leads to rank 0's host, and where that
    knows itself by a loopback address only, the one that leads to another rank's host.

    Collective: every rank of `gather`, which returns what all of them gave, by rank
    Raises: CommError on every rank, naming the hosts that no address was found for
    """
    told = gather([network_key(), *_outward(env)])
    if len({network for network, _, _ in told}) == 1:
        return ""
    _, own, problem = told[env.rank]
    if not own and not problem:
        problem = f"{socket.gethostname()} knows itself as {env.master_addr or 'nothing'} only"
        for _, other, _ in told:
            if other:
                with contextlib.suppress(OSError):
                    own = _reachable(_address_towards(other))
                break
    problems = dict.fromkeys(text for text in gather("" if own else problem) if text)
    if problems:
        raise CommError(
            f"the ranks are on several hosts, and some of these have no address that the others could reach: "
            f"{'; '.join(problems)}. Set GLOO_SOCKET_IFNAME to the network interface between the hosts, e.g. eth0"
        )
    return own


def _outward(env: ProcessEnv) -> tuple[str, str]:
    """Return this host's address as it can be known here, empty if none can, and what is wrong with what was set."""
    found = ""
    with contextlib.suppress(OSError):  # a name that only the other hosts know
        found = _reachable(own_address(env, one_host=False))
    names = environment.get("GLOO_SOCKET_IFNAME").split(",")
    if names == [""]:
        return found, ""
    interfaces = psutil.net_if_addrs()
    addresses = [a for name in names for a in interfaces.get(name.strip(), []) if a.family in _INTERNET]
    here = [address for a in sorted(addresses, key=lambda a: a.family) if (address := _reachable(a.address))]
    if not here:
        known = ", ".join(sorted(interfaces))
        said = (
            f"GLOO_SOCKET_IFNAME={','.join(names)} on {socket.gethostname()} is no interface with an address to reach"
        )
        return "", f"{said} (there are {known})"
    return (found if found in here else here[0]), ""


def _reachable(address: str) -> str:
    """Return an address if it means one host wherever it is used, else nothing."""
    if not address or "%" in address:  # of one link only
        return ""
    parsed = ipaddress.ip_address(address)
    return "" if parsed.is_loopback or parsed.is_unspecified or parsed.is_link_local else address


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
