"""What one rank has to do with the memory of its node: join, take snapshots, wait at the gate, make steps durable.

The snapshot process of the node does everything else. Must not know: segments, parity, how state is cut.
"""

from __future__ import annotations

import faulthandler
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from windlass.checkpoint.agree import Peers, on_all_ranks
from windlass.checkpoint.memory.base import Base
from windlass.checkpoint.memory.capture import Capturer, LocalParity, Source
from windlass.checkpoint.memory.client import SnapshotClient
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.generators import freeze_rng
from windlass.checkpoint.memory.groups import groups_of_replicas, num_parity, weaknesses
from windlass.checkpoint.memory.heartbeat import Heartbeat, Phase
from windlass.checkpoint.memory.membership import Member, Membership
from windlass.checkpoint.memory.settings import Settings
from windlass.checkpoint.memory.stripes import Stripes
from windlass.checkpoint.memory.supervise import ensure_snapshot_process
from windlass.checkpoint.save import SaveReport
from windlass.dist.device import Device
from windlass.dist.env import ProcessEnv
from windlass.dist.errors import CheckpointError, PlanError, WorkerError
from windlass.dist.rendezvous import address_for_peers
from windlass.dist.trace import Tracer
from windlass.launch.control_log import ControlLog, job_of, job_token
from windlass.launch.failure import format_ranks
from windlass.launch.generation import node_of
from windlass.launch.node_memory import forget_another_run, remove
from windlass.launch.snapshot_watch import SnapshotWatch

if TYPE_CHECKING:
    from windlass.launch.job import JobConfig

START_S = 30.0


@dataclass(frozen=True)
class Seats:
    """Where every rank of this generation is, by rank."""

    nodes: tuple[str, ...]
    domains: tuple[str, ...]
    addresses: tuple[tuple[str, int], ...]  # of the snapshot process of its node

    def speaks(self, rank: int) -> bool:
        """Tell whether a rank is the first of its node, which looks after what the node has once."""
        return self.nodes.index(self.nodes[rank]) == rank


class Snapshots:
    """The snapshots of one run, as one rank sees them.

    Collective:  construction and `protect`, every rank of the world
    """

    def __init__(self, config: JobConfig, env: ProcessEnv, world: Peers, generation: int) -> None:
        self._config, self._env, self._world = config, env, world
        self.generation, self.job, self.node = generation, job_of(config.train.run_dir), node_of(env)
        self.folder = NodeFolder(Path(config.snapshot.folder), self.job, self.node)
        self._alone = env.launcher not in ("local", "ray")  # those look after the process and its memory themselves
        self.seats = self._meet()
        self._check_generation()  # before the heartbeat: one that comes late must not hide the one that beats there
        self.beats = Heartbeat(self.folder.beat_path(env.rank), generation)
        self._stacks = self._show_stacks_when_asked()
        self._check_generation()  # after it: whoever fences us meanwhile finds our process
        self.client = SnapshotClient.of(self.folder, generation)
        self._capturer: Capturer | None = None
        self._watch = SnapshotWatch(self.folder, self.client, supervise=self._alone, first=self.speaks)
        self._watch.start()
        self._blocked_s = 0.0

    # -- joining -----------------------------------------------------------------------------------------------------

    def _check_generation(self) -> None:
        newest = self.folder.read_generation()
        if newest > self.generation:
            raise WorkerError(
                f"rank {self._env.rank} of generation {self.generation}: node {self.node} is at generation {newest}, "
                "so this process belongs to a start that was given up. It ends"
            )
        self.folder.raise_generation(self.generation)

    def _show_stacks_when_asked(self) -> IO[str]:
        """Let SIGUSR1 write the stacks of all threads, also while the interpreter waits in a library."""
        folder = Path(self._config.train.run_dir) / "stacks"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"gen-{self.generation}-rank-{self._env.rank}.txt"
        file = path.open("w")  # open as long as this process may be asked
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        return file

    def _meet(self) -> Seats:
        """Start the snapshot process of every node and tell all ranks where everybody is."""
        domain = self._env.domain or self.node
        told = self._world.gather_objects([self.node, domain])
        nodes = [node for node, _ in told]
        first = nodes.index(self.node) == self._env.rank
        # A launcher of ours has started the process already, at an address that it knows better.
        host = address_for_peers(self._env, self._world.gather_objects) if self._alone else ""

        def start() -> list[Any]:
            if not first:
                return []
            token = job_token(Path(self._config.train.run_dir))
            forget_another_run(self.folder, token)
            self.folder.create(token)
            self._settings().keep_in(self.folder)  # a process that starts now finds the local level by them
            running = ensure_snapshot_process(self.folder, timeout_s=START_S, host=host)
            if self._alone:
                with SnapshotClient.of(self.folder, timeout_s=START_S) as client:
                    client.fence(self.generation)
            return [running.host, running.port]

        found = on_all_ranks(self._world, start).check()
        addresses = [found[nodes.index(node)] for node in nodes]
        return Seats(tuple(nodes), tuple(d for _, d in told), tuple((str(h), int(p)) for h, p in addresses))

    # -- taking snapshots --------------------------------------------------------------------------------------------

    def protect(
        self,
        engine: Source,
        device: Device,
        tracer: Tracer,
        *,
        restored: tuple[int, int] | None,
        anchor: tuple[int, int] | None,
        base: Base,
    ) -> list[str]:
        """Take room for snapshots and tell the snapshot processes who protects whom; return what is not protected.

        `restored`: generation and step that this one goes on from, `anchor`: the newest that is protected; both stay
        until a newer one is protected. `base`: where the run stands, and what is durable there.

        Collective:  every rank of the world
        Raises:      PlanError for groups, and if memory does not suffice, with the bytes needed
        """
        config, world = self._config, self._world
        nodes, snapshot = self.seats.nodes, config.snapshot
        domains = dict(zip(nodes, self.seats.domains, strict=True))
        replicas = sorted({tuple(r) for r in world.gather_objects(list(engine.replicas))})
        scheme, size, k = snapshot.redundancy, snapshot.group, snapshot.parity
        degraded = world.size < config.launch.workers
        groups, local = groups_of_replicas(nodes, domains, replicas, scheme, size, k, degraded=degraded)
        mine = next(group for group in groups if world.rank in group)
        self._capturer = Capturer(
            self.folder,
            job=self.job,
            generation=self.generation,
            rank=world.rank,
            world_size=world.size,
            source=engine,
            device=device,
            policy=snapshot,
            local_parity=LocalParity(mine) if local and len(mine) > 1 else None,
            tracer=tracer,
        )
        self._check_room(world, None if local else mine)
        layouts = on_all_ranks(world, self._open).check()
        membership = Membership(
            job=self.job,
            generation=self.generation,
            world_size=world.size,
            scheme=snapshot.redundancy,
            k=snapshot.parity,
            groups=groups,
            members=tuple(
                Member(rank, nodes[rank], self.seats.domains[rank], *self.seats.addresses[rank], digest, num_bytes)
                for rank, (digest, num_bytes) in enumerate(layouts)
            ),
            local_parity=local,
            chunk_bytes=snapshot.chunk_bytes,
        )
        on_all_ranks(world, lambda: self.client.adopt(membership, restored, self._settings(), anchor, base)).check()
        self._watch.problems += self.capturer.warnings
        return weaknesses(groups, nodes, domains, snapshot.redundancy, snapshot.parity)

    def _check_room(self, world: Peers, group: tuple[int, ...] | None) -> None:
        """Look once for all ranks of each node whether memory suffices, before anybody takes some.

        `group`: the members among which the snapshot processes make parity; None where the trainers do.

        Raises:      PlanError on every rank: it would be the same after a restart
        """
        snapshot = self._config.snapshot
        k = 0 if group is None else num_parity(snapshot.redundancy, snapshot.parity, len(group))
        sizes = world.gather_objects(self.capturer.layout.num_bytes)
        pulled = Stripes(group, tuple(sizes[r] for r in group), k, snapshot.chunk_bytes) if group and k else None
        wanted = world.gather_objects(self.capturer.wanted_bytes(pulled))
        mine = [rank for rank, node in enumerate(self.seats.nodes) if node == self.node]

        def look() -> str:
            what = f"{snapshot.slots} snapshots of {format_ranks(mine)}"
            return self.folder.shortage(sum(wanted[r] for r in mine), what, snapshot.slots) if self.speaks else ""

        if problems := [problem for problem in on_all_ranks(world, look).check() if problem]:
            raise PlanError("; ".join(problems))

    def _open(self) -> list[Any]:
        self.capturer.open()
        return [self.capturer.layout.digest, self.capturer.layout.num_bytes]

    def _settings(self) -> Settings:
        config = self._config
        snapshot, checkpoint, recovery = config.snapshot, config.checkpoint, config.recovery
        run = Path(config.train.run_dir).resolve()
        return Settings(
            mode=checkpoint.mode,
            every=checkpoint.every if checkpoint.mode != "sync" else 0,
            keep=checkpoint.keep,
            storage=checkpoint.url or str(run / "checkpoints"),
            local_every=checkpoint.local_every,
            local_dir=checkpoint.local_dir,
            bandwidth_bytes_per_s=checkpoint.bandwidth_bytes_per_s,
            link_bytes_per_s=snapshot.link_bytes_per_s,
            peer_timeout_s=snapshot.peer_timeout_s,
            lease_s=snapshot.lease_s,
            hang_s=recovery.hang_s,
            start_s=recovery.start_s,
            run_folder=str(run),
        )

    def due(self, step: int) -> bool:
        """Tell whether a snapshot is to be taken after a step: every level has its own cadence."""
        checkpoint = self._config.checkpoint
        levels = [self._config.snapshot.every]
        if checkpoint.mode != "sync":
            levels += [checkpoint.every, checkpoint.local_every]
        return any(every and step % every == 0 for every in levels)

    def ready(self) -> bool:
        """Tell whether this rank could take a snapshot now without waiting for anybody."""
        return self.capturer.ready()

    def take(self, step: int, facts: Mapping[str, Any], *, all_ready: bool) -> None:
        """Begin a snapshot, or count it as skipped where some rank has no room: training never waits for one."""
        if not all_ready:
            self.capturer.skip()
            return
        checkpoint = self._config.checkpoint
        eager = checkpoint.mode == "async" and checkpoint.every > 0 and step % checkpoint.every == 0
        self._snapshot(step, facts, eager=eager)

    def seed(self, step: int, facts: Mapping[str, Any]) -> None:
        """Take a snapshot of the state that was restored: where it came from is kept until this one is protected."""
        self._snapshot(step, facts, eager=True)

    def _snapshot(self, step: int, facts: Mapping[str, Any], *, eager: bool) -> None:
        began = time.perf_counter()
        rng = freeze_rng()
        self.capturer.snapshot(step, {"extra": dict(facts)}, eager=eager, later=lambda: {"rng": rng()})
        self._blocked_s += time.perf_counter() - began

    def gate(self) -> None:
        """Wait until the snapshot under way is copied; state may change afterwards."""
        self._blocked_s += self.capturer.gate()
        if self.folder.read_generation() > self.generation:
            self._check_generation()

    def beat(self, phase: str, step: int) -> None:
        """Show the watchdog of this node what this rank is doing."""
        self.beats.beat(Phase[phase.upper()], step)

    def levels(self) -> dict[str, float]:
        """Return the newest step of every level, snapshots skipped, and seconds waited since the last call."""
        blocked, self._blocked_s = self._blocked_s, 0.0
        return {**self._watch.levels, "skipped": float(self.capturer.counters.skipped), "blocked_s": blocked}

    # -- making steps durable ----------------------------------------------------------------------------------------

    def flush(self, signum: int = 0) -> None:
        """Ask for the newest protected step to be made durable now, whatever is due. Returns at once."""
        threading.Thread(target=self._flush_quietly, name="flush", daemon=True).start()

    def _flush_quietly(self) -> None:
        if self.speaks:
            try:
                self.client.flush(deadline_s=self._config.recovery.grace_s)
            except CheckpointError as error:
                self._watch.problems.append(str(error))

    def persist(self, step: int, facts: Mapping[str, Any]) -> SaveReport:
        """Make a step durable in storage and wait for it: at most as long as a watchdog has patience with saving, and
        the other ranks with the one that asks.

        Collective:  every rank of the world
        Blocks:      host, at most 0.9 of the smaller of recovery.start_s and parallelism.timeout_s, and a little
        """
        began = time.monotonic()
        until = began + 0.9 * min(self._config.recovery.start_s, self._config.parallelism.timeout_s)
        self.capturer.gate()
        if self.capturer.newest != step:
            while not self.capturer.ready() and time.monotonic() < until:
                time.sleep(0.01)
            self._snapshot(step, facts, eager=True)

        def wait() -> list[Any]:
            if self._world.rank != 0:
                return []
            done = self.client.flush(deadline_s=max(until - time.monotonic(), 1.0), at_least=step)
            return [done.place, done.num_bytes]

        outcome = on_all_ranks(self._world, wait)
        if self.speaks:
            self._watch.look()  # nobody may come back for what has gone wrong
        seconds = time.monotonic() - began
        if outcome.problem is not None:
            return SaveReport(False, step, None, 0, seconds, {}, outcome.problem)
        place, num_bytes = outcome.values[0]
        return SaveReport(True, step, place, num_bytes, seconds, {"persist": seconds})

    def finish(self) -> None:
        """Say that nobody needs the snapshots any more, and remove those of this node unless a launcher of ours does.

        Blocks:      host, milliseconds
        Raises:      CheckpointError if it cannot be said: then they stay for their lease
        """
        if self._world.rank == 0:
            ControlLog(Path(self._config.train.run_dir), self.generation).append(
                "complete", step=self.capturer.newest or 0
            )
        if self._alone and self.speaks:
            self._watch.stop()
            try:
                self.client.stop(remove=True)
            except CheckpointError:  # it is not there, and the next one would keep the folder for its lease
                remove(self.folder)

    def problems(self) -> list[str]:
        """Return what went wrong beside training since the last call, each once."""
        found, self._watch.problems = self._watch.problems, []
        return found

    @property
    def speaks(self) -> bool:
        """Whether this rank looks after what its node has once."""
        return self.seats.speaks(self._world.rank)

    @property
    def capturer(self) -> Capturer:
        assert self._capturer is not None, "snapshots are taken after `protect`"
        return self._capturer

    def close(self) -> None:
        """Let go of the memory; the snapshots stay where they are."""
        self._watch.stop()
        newest = None
        if self._capturer is not None:
            newest = self._capturer.newest
            self._capturer.close()
        self.beats.beat(Phase.DONE, newest or 0)
        self.client.close()
        faulthandler.unregister(signal.SIGUSR1)
        self._stacks.close()
        if not Path(self._stacks.name).stat().st_size:
            Path(self._stacks.name).unlink()
