"""Real runs on emulated nodes that lose something, compared with the same run undisturbed.

A `Lab` runs small jobs in this process: controller, fleet of this machine, snapshot processes, and workers forked from
one server that all runs of a session share. What a run comes to is a `Told`, whose `check` is the oracle (oracle.py).

What goes wrong is said in one of four ways:
    fault="kill:train.forward:rank=1:step=5:generation=1"   at a named moment inside a process (dist/env.py)
    strikes=["node=1@step=5"]                                from outside, once a step is done (launch/drill.py)
    strikes=[Act(5, function)]                               anything else then; gets the `Live` run
    between={2: function}                                    when generation 1 is over, before 2 is fenced off

`hold(step)` is a fault that stops rank 0 before the step after it, so that strikes meet a run that stands still there.
The workers of such runs are those of tests/fault/paced.py: training stands still until an `Act` is over.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.fault.oracle import BATCH, Told
from tests.leftovers import end_all, processes_of
from tests.waiting import until
from windlass.checkpoint.memory.client import SnapshotClient
from windlass.checkpoint.memory.folder import NodeFolder, list_jobs
from windlass.checkpoint.memory.header import SlotHeader
from windlass.checkpoint.memory.membership import Membership
from windlass.checkpoint.memory.segment import Segment, Slot
from windlass.checkpoint.memory.status import Status
from windlass.data.prepare import prepare
from windlass.dist.errors import CheckpointError
from windlass.launch.config import load_job
from windlass.launch.control_log import ControlLog, job_of, job_token
from windlass.launch.controller import Controller
from windlass.launch.drill import Strike
from windlass.launch.forkserver import PRELOADED, ForkServer
from windlass.launch.job import Loaded
from windlass.launch.local import WorkerCommand, WorkerProcess
from windlass.launch.local_fleet import LocalFleet, node_names
from windlass.launch.local_run import patience_of, prepared
from windlass.launch.metrics import read_metrics
from windlass.launch.node_memory import NodeMemory
from windlass.launch.worker import worker_command

STEPS = 12
GONE_S = 20.0
LOOK_S = 0.01
ANSWER_S = 60.0
RUN_S = 150.0  # a run that takes longer is ended, and its test fails with what was said
JOB = f"""
model: {{vocab_size: 257, hidden_size: 32, num_layers: 2, num_heads: 2, max_seq_len: 32, tie_embeddings: true}}
train: {{steps: {STEPS}, seq_len: 32, micro_batch: 2, global_batch: {BATCH}, eval_batches: 1}}
optimizer: {{lr: 1e-2, clip_norm: 2.0}}
zero: {{stage: 2}}
launch: {{threads: 1}}
metrics: {{tensorboard: false}}
"""
PROTECTED = ("snapshot.every=1", "snapshot.slots=3", "snapshot.chunk_bytes=16384", "snapshot.bucket_bytes=65536")
PROTECTED += ("snapshot.peer_timeout_s=20", "checkpoint.mode=lazy", "recovery.max_restarts=8", "recovery.replace_s=0")
PROTECTED += ("recovery.node_failures=99",)


def hold(step: int, *, generation: int = 1, rank: int = 0) -> str:
    """Return the fault that keeps a rank from beginning the step after `step` until it is killed."""
    return f"hang:step:rank={rank}:step={step + 1}:generation={generation}"


@dataclass(frozen=True)
class Act:
    """Do something once a step is done, from the controller's thread. Rank 0 begins no later step before that is over:
    what an act meets does not depend on how busy the controller is.
    """

    step: int
    do: Callable[[Live], object]


def protected(step: int) -> Act:
    """Wait until a step is protected on all nodes; with `hold(step)`, strikes that follow meet a run at rest."""
    return Act(step, lambda live: live.until_at("peers", step))


@dataclass
class Stop:
    """Asks a run to stop when a test wants it, or when it takes too long, and then kills it."""

    at: float
    asked: int = 0

    @property
    def count(self) -> int:
        late = time.monotonic() - self.at
        return self.asked if late < 0 else 1 + (late > 2)


@dataclass
class Live:
    """A run under way, as a fault sees it."""

    loaded: Loaded
    fleet: LocalFleet
    memories: Mapping[str, NodeMemory]
    stop: Stop

    @property
    def run(self) -> Path:
        return Path(self.loaded.config.train.run_dir)

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    def done(self) -> int:
        """Return the last step that is finished by now."""
        return int(read_metrics(self.run / "metrics.jsonl")[-1]["step"])

    def memory(self, node: int) -> NodeFolder:
        """Return the folder in memory of a node."""
        return self.memories[f"node-{node}"].folder

    def status(self, node: int | None = None) -> Status:
        """Ask the snapshot process of a node, of that of rank 0 if none is given, how it is."""
        folder = self.memory(self.node_of(0) if node is None else node)
        with SnapshotClient.of(folder, timeout_s=ANSWER_S) as client:
            return client.status()

    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Return which ranks protect each other now."""
        return self._membership().groups

    def _membership(self) -> Membership:
        folder = next(m.folder for m in self.memories.values() if m.folder.memberships())
        path = folder.membership_path(folder.read_generation())
        return Membership.parse(path.read_bytes(), str(path))

    def until_at(self, level: str, step: int, node: int | None = None) -> None:
        """Wait until a level ("ram", "peers", "local", "storage") holds a step, as a node sees it (that of rank 0)."""

        seen: object = None

        def there() -> bool:
            nonlocal seen
            threading.Event().wait(LOOK_S)  # asking costs the process that is asked
            try:
                seen = status = self.status(node)
                return status.newest.get(level, -1) >= step
            except CheckpointError as error:  # its snapshot process is being replaced
                seen = error
                return False

        try:
            until(there)
        except AssertionError:
            raise AssertionError(f"{level} does not come to step {step}: {seen}") from None

    def segment(self, node: int, role: str, rank: int) -> Segment:
        """Open the newest segment of a rank for writing."""
        found = [f for f in self.memory(node).segments() if (f.role, f.rank) == (role, rank)]
        return Segment.open(max(found, key=lambda f: f.path.stat().st_mtime_ns).path, writable=True)

    def headers(self, node: int, role: str, rank: int) -> list[SlotHeader]:
        """Return what the slots of a rank hold."""
        segment = self.segment(node, role, rank)
        found = [header for slot in segment.slots if (header := slot.header()) is not None]
        segment.close()
        return found

    def slot(self, segment: Segment, step: int) -> Slot:
        """Return the slot of a segment that holds a step."""
        for slot in segment.slots:
            header = slot.header()
            if header is not None and header.step == step:
                return slot
        raise AssertionError(f"{segment.path} does not hold step {step}")

    def flip(self, node: int, role: str, rank: int, step: int, at: int = 1000) -> None:
        """Change one byte of a snapshot, as a broken memory would."""
        segment = self.segment(node, role, rank)
        self.slot(segment, step).data[at] ^= 0x40
        segment.close()

    def wipe(self, node: int, role: str, rank: int, step: int) -> None:
        """Destroy what says what a slot holds: both copies of its header."""
        segment = self.segment(node, role, rank)
        for copy in self.slot(segment, step)._copies:
            copy[:] = 0
        segment.close()

    @contextlib.contextmanager
    def unserved(self, node: int) -> Iterator[Path]:
        """Give the folder of a node, which no snapshot process has open, until the next generation begins one."""
        self.memories[f"node-{node}"].leave()
        self.memories[f"node-{node}"].kill()
        yield self.memory(node).path

    def forget(self) -> None:
        """Empty the memory of all nodes, as when all of them are switched off and on; local folders stay."""
        for memory in self.memories.values():
            memory.lose()

    def node_of(self, rank: int) -> int:
        """Return the number of the node on which a rank is."""
        return int(self._membership().members[rank].node.removeprefix("node-"))

    def lose(self, *nodes: int) -> None:
        """Let nodes vanish now: processes, memory, local folders."""
        for node in nodes:
            self.fleet.strike("node", f"node-{node}")


class Watched:
    """A fleet with acts of a test between its own."""

    def __init__(
        self, live: Live, acts: Sequence[Callable[[Live], object]], between: Mapping[int, Callable[[Live], object]]
    ) -> None:
        self._live, self._acts, self._between = live, acts, between
        for number in range(len(acts)):  # of an earlier start in this folder
            acted(live.run, number).unlink(missing_ok=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._live.fleet, name)

    def fence(self, generation: int) -> None:
        if generation in self._between:
            self._between[generation](self._live)
        self._live.fleet.fence(generation)

    def strike(self, kind: str, target: str) -> str:
        if kind != "act":
            return self._live.fleet.strike(kind, target)
        act = self._acts[int(target)]
        act(self._live)
        acted(self._live.run, int(target)).touch()
        return getattr(act, "__name__", "act")


class Lab:
    """Runs jobs, each with a run folder and a folder in memory of its own. For one thread, that of the session."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._server = ForkServer((*PRELOADED, "torch._dynamo"))  # the latter for the plan that a run ends with
        self._undisturbed: dict[tuple[str, ...], Told] = {}
        self._workers: list[WorkerProcess] = []  # of the run under way
        self._runs = 0
        self.job = root / "job.yaml"
        self._memory = Path(tempfile.mkdtemp(prefix="windlass-test-", dir="/dev/shm"))

    def __enter__(self) -> Lab:
        self._server.warm_up()
        texts = self.root / "texts"
        texts.mkdir()
        for number in range(12):
            (texts / f"{number}.txt").write_text(f"document {number}: " + "the quick brown fox " * (20 + number))
        prepare([texts], self.root / "tokens", validation=0.3, workers=1)
        self.job.write_text(JOB + f"data: {{path: {self.root / 'tokens'}}}\n")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        shutil.rmtree(self._memory, ignore_errors=True)

    def new_memory(self) -> Path:
        """Make a folder in memory for the snapshots of one run; it goes with the lab."""
        return Path(tempfile.mkdtemp(dir=self._memory))

    def undisturbed(self, workers: int = 2, **settings: object) -> Told:
        """Return the run that all others must equal: without snapshots, nodes or faults. Made once per shape."""
        key = (f"launch.workers={workers}", *(f"{name}={value}" for name, value in sorted(settings.items())))
        if key not in self._undisturbed:
            told = self._run(key, (), "", {}, None)
            assert told.code == 0 and told.leftovers == [], told.said
            self._undisturbed[key] = told
        return self._undisturbed[key]

    def run(
        self,
        *,
        workers: int = 2,
        nodes: int = 2,
        spares: int = 0,
        strikes: Sequence[str | Act] = (),
        fault: str = "",
        between: Mapping[int, Callable[[Live], object]] | None = None,
        settings: Sequence[str] = (),
        pace: Sequence[str] = ("peers",),
        memory: Path | None = None,
        after: Told | None = None,
        keep: bool = False,
    ) -> Told:
        """Run a job that takes snapshots while something goes wrong; `settings` are overrides such as "zero.stage=3".

        `pace`: the levels that keep up with training ("peers", "storage", "local"), see tests/fault/paced.py.
        `memory`: where its snapshots are kept, instead of a folder of its own. `after`: start again in the folders of
        a run that was told to `keep` what it leaves in memory.
        """
        given = [f"launch.workers={workers}", f"launch.nodes={nodes}", f"launch.spares={spares}"]
        given += [*PROTECTED, "snapshot.redundancy=xor", *settings]
        return self._run(given, strikes, fault, between or {}, pace, memory, after, keep)

    def _run(
        self,
        given: Sequence[str],
        strikes: Sequence[str | Act],
        fault: str,
        between: Mapping[int, Callable[[Live], object]],
        pace: Sequence[str] | None,
        memory: Path | None = None,
        after: Told | None = None,
        keep: bool = False,
    ) -> Told:
        self._runs += 1
        self._workers.clear()
        run, memory = self.root / f"run-{self._runs}", memory or self.new_memory()
        if after is not None:
            run, memory = after.run, after.memory
        overrides = [f"train.run_dir={run}", f"snapshot.folder={memory}", *given]
        if any(text.startswith("checkpoint.local_every") for text in given):
            overrides.append(f"checkpoint.local_dir={self.root / f'local-{self._runs}'}")
        loaded, limits = prepared(load_job(self.job, overrides))
        config = loaded.config
        run.mkdir(exist_ok=after is not None)
        command = worker_command(loaded)
        acts = [strike for strike in strikes if isinstance(strike, Act)]
        if pace is not None:
            waits = [f"{act.step}@{acted(run, number)}" for number, act in enumerate(acts)]
            command = replace(command, arguments=("-m", "tests.fault.paced", *pace, *waits))
        token, said, began = job_token(run), list[str](), time.monotonic()
        before = os.environ.get("WINDLASS_FAULT")
        try:
            if fault:
                os.environ["WINDLASS_FAULT"] = fault
            memories = {
                name: NodeMemory(NodeFolder(memory, job_of(run), name), token)
                for name in (node_names(config.launch) if pace is not None else ())
            }
            fleet = LocalFleet(
                command,
                config.launch,
                memories=memories,
                local_dir=config.checkpoint.local_dir,
                start_process=self._spawn,
            )
            stop = Stop(began + RUN_S)
            controller = Controller(
                Watched(Live(loaded, fleet, memories, stop), [act.do for act in acts], between),
                ControlLog(run),
                limits,
                patience_of(loaded),
                run,
                strikes=_strikes(strikes),
                say=lambda text: said.append(text) or print(text, flush=True),
            )
            code = controller.run(stop)
            seconds = time.monotonic() - began
            left = [] if keep else self.left(memory)
            return Told(run, code, "\n".join(said), config.train.steps, left, seconds, memory)
        finally:
            if fault:
                os.environ.pop("WINDLASS_FAULT") if before is None else os.environ.update(WINDLASS_FAULT=before)
            if not keep:
                end_all(memory)

    def _spawn(
        self, command: WorkerCommand, variables: Mapping[str, str], *, stdout: int | None, stderr: int | None
    ) -> WorkerProcess:
        worker = self._server.spawn(command, variables, stdout=stdout, stderr=stderr)
        self._workers.append(worker)
        return worker

    def left(self, memory: Path) -> list[str]:
        """Return what a run has left a moment after its end: folders in memory, its snapshot processes, workers."""

        def left() -> list[str]:
            found = [str(folder.path) for folder in list_jobs(memory)]
            found += [f"process {pid}: {words}" for pid, words in processes_of(str(memory)).items()]
            return found + [f"worker {worker.pid}" for worker in self._workers if worker.poll() is None]

        with contextlib.suppress(AssertionError):  # told by the caller
            until(lambda: not left(), GONE_S)
        return left()


def acted(run: Path, number: int) -> Path:
    """Return the file that is there once an act of a run is over."""
    return run / f"acted-{number}"


def _strikes(strikes: Sequence[str | Act]) -> list[Strike]:
    """Return strikes in the order of their steps; acts by their number."""
    found, acts = [], 0
    for strike in strikes:
        if isinstance(strike, Act):
            found.append(Strike("act", str(acts), strike.step))
            acts += 1
        else:
            found.append(Strike.parse(strike))
    return sorted(found, key=lambda strike: strike.step)
