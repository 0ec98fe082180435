"""Forms the world of a job and decides, once and equally on every rank, which channel carries which group.

Ranks of one host share memory; everything else goes through torch process groups, which are formed when first needed.
Must not know: what is sent.
"""

from __future__ import annotations

import os
import socket
import weakref
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist

from windlass.dist.device import Device
from windlass.dist.env import ProcessEnv
from windlass.dist.errors import CommError
from windlass.dist.group_transport import GlooChannel, Queue
from windlass.dist.hub import Hub
from windlass.dist.links import Links, Listener
from windlass.dist.mail import Mail
from windlass.dist.nccl import NcclChannel
from windlass.dist.rendezvous import Facts, choose_interface, host_key, meet, open_store
from windlass.dist.shm import ShmChannel
from windlass.dist.transport import Channel, Stall


class World:
    """The formed world: its store, the facts of every rank, and what carries bytes."""

    def __init__(self, env: ProcessEnv, device: Device, timeout_s: float) -> None:
        self.env, self.device, self.timeout_s = env, device, timeout_s
        self.stall = Stall()
        self.queue = Queue(self.stall)
        self.store: Any = None
        self.facts: list[Facts] = []
        self.hub: Hub | None = None
        self.mail: Mail | None = None
        self.process_groups: dict[tuple[int, ...], Any] = {}

    @staticmethod
    def form(env: ProcessEnv, device: Device, transport: str, timeout_s: float) -> World:
        """Meet all ranks and connect to those that share memory.

        Collective: every rank of the job
        Raises: CommError naming what is missing
        """
        world = World(env, device, timeout_s)
        if env.world_size == 1:
            return world
        listener, problem = _listen(env) if transport != "group" else (None, "not wanted")
        world.store = open_store(env, timeout_s)
        mine = Facts(
            rank=env.rank,
            host=host_key(),
            host_name=socket.gethostname(),
            pid=os.getpid(),
            device=device.kind,
            transport=transport,
            shm_address=listener.address if listener else "",
            shm_problem=problem,
        )
        world.facts, world.store = meet(world.store, env, mine, timeout_s)
        if transport == "shm":
            world._check_one_host()
        neighbours = [f for f in world.facts if f.host == mine.host]
        if listener and len(neighbours) > 1 and all(f.shm_address for f in neighbours):
            addresses = {f.rank: f.shm_address for f in neighbours if f.rank != env.rank}
            links = Links.connect(env.rank, addresses, listener, timeout_s)
            world.hub = Hub(links, timeout_s, world.stall)
            world.mail = Mail(world.hub)
            # A child that kept the sockets would hide the death of its parent from the peers.
            os.register_at_fork(after_in_child=partial(_abandon, weakref.ref(links)))
        elif listener:
            listener.sock.close()
        return world

    def _check_one_host(self) -> None:
        hosts = {f.host: f.host_name for f in self.facts}
        if len(hosts) > 1:
            names = ", ".join(sorted(hosts.values()))
            raise CommError(
                f"parallelism.transport = 'shm': the ranks are on {len(hosts)} hosts or containers ({names}), which "
                "share no memory. Use auto or group"
            )
        for fact in self.facts:
            if not fact.shm_address:
                raise CommError(
                    f"parallelism.transport = 'shm': rank {fact.rank} cannot share memory: {fact.shm_problem}"
                )

    def shares_memory(self, ranks: tuple[int, ...]) -> bool:
        """Return whether these ranks are on one host and can share memory (the same answer on every rank)."""
        members = [self.facts[r] for r in ranks]
        neighbours = [f for f in self.facts if f.host == members[0].host]
        return all(f.host == members[0].host for f in members) and all(f.shm_address for f in neighbours)

    def new_process_groups(self, wanted: list[tuple[int, ...]]) -> None:
        """Make torch process groups for these rank sets, where they need one and have none.

        Collective: every rank of the world, with the same list
        """
        for ranks in wanted:
            if len(ranks) > 1 and ranks not in self.process_groups and self._needs_process_group(ranks):
                self.process_groups[ranks] = self._new_group(ranks)

    def new_lanes(self, wanted: list[tuple[int, ...]]) -> tuple[Any, Any] | None:
        """Make two process groups for each of these rank sets, where messages need some; return this rank's.

        Collective: every rank of the world, with the same list
        """
        mine = None
        for ranks in wanted:
            if len(ranks) > 1 and self.device.kind == "cuda":
                lanes = self._new_group(ranks, "nccl"), self._new_group(ranks, "nccl")
                mine = lanes if self.env.rank in ranks else mine
        return mine

    def _new_group(self, ranks: tuple[int, ...], backend: str | None = None) -> Any:
        self._default_group()
        return dist.new_group(list(ranks), timeout=timedelta(seconds=self.timeout_s), backend=backend)

    def _needs_process_group(self, ranks: tuple[int, ...]) -> bool:
        return self.device.kind == "cuda" or not self.shares_memory(ranks)

    def channels(
        self, name: str, ranks: tuple[int, ...], number: int, lanes: tuple[Any, Any] | None
    ) -> tuple[Channel, Channel]:
        """Return the channels of a group for host memory and for device memory."""
        rank = ranks.index(self.env.rank)
        pg = None
        if self._needs_process_group(ranks):
            if ranks not in self.process_groups:
                self.process_groups[ranks] = self._default_group()
            pg = self.process_groups[ranks]
        host: Channel
        if self.hub is not None and self.mail is not None and self.shares_memory(ranks):
            host = ShmChannel(name, ranks, rank, number, self.hub, self.mail)
        else:
            host = GlooChannel(name, ranks, rank, number, pg, self.timeout_s, self.queue)
        if self.device.kind == "cuda":
            return host, NcclChannel(name, ranks, rank, pg, lanes, self.device.torch_device)
        return host, host

    def _default_group(self) -> Any:
        """Form torch's default process group on first use: gloo for host values, NCCL beside it with CUDA."""
        if not dist.is_initialized():
            choose_interface(self.env, one_host=len({f.host for f in self.facts}) == 1)
            backend = "cpu:gloo,cuda:nccl" if self.device.kind == "cuda" else "gloo"
            try:
                dist.init_process_group(
                    backend,
                    store=dist.PrefixStore("torch", self.store),
                    rank=self.env.rank,
                    world_size=self.env.world_size,
                    timeout=timedelta(seconds=self.timeout_s),
                )
            except RuntimeError as error:
                raise CommError(
                    f"rank {self.env.rank}: the process group of {self.env.world_size} ranks did not form at "
                    f"{self.env.meeting_point} within {self.timeout_s:.0f} s: {str(error).splitlines()[0]}"
                ) from error
        return dist.group.WORLD

    def close(self) -> None:
        """Say good-bye to the peers and release sockets and process groups."""
        if self.hub is not None and self.mail is not None:
            self.hub.close()
            self.mail.close()
            self.hub = self.mail = None
        self.queue.close()
        if self.process_groups and dist.is_initialized():
            dist.destroy_process_group()
        self.process_groups.clear()


def _abandon(links: weakref.ref[Links]) -> None:
    alive = links()
    if alive is not None:
        alive.abandon()


def _listen(env: ProcessEnv) -> tuple[Listener | None, str]:
    """Open an address for the peers of this host, or say why this process cannot share memory."""
    try:
        os.close(os.memfd_create("windlass probe", os.MFD_CLOEXEC))
        return Listener(env.local_world_size + env.world_size), ""
    except OSError as error:
        return None, str(error)
