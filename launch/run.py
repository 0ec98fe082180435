"""The composition root: builds the machine of one rank from a job, owns all lifetimes, and runs it.

The only place that constructs objects of two layers. Whatever a user can get wrong is looked at before the ranks meet.
Must not know: how anything it builds works.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, final

import psutil

from windlass.checkpoint.save import SaveReport, save
from windlass.data.loader import Loader
from windlass.dist.comm import Comm, Group
from windlass.dist.device import Device, pick_device
from windlass.dist.env import ProcessEnv, read_process_env
from windlass.dist.errors import CommError, PlanError
from windlass.dist.mesh import plan_mesh
from windlass.dist.trace import Tracer
from windlass.launch.check_recovery import needs_process
from windlass.launch.config import to_yaml
from windlass.launch.control_log import Phase, PhaseLog
from windlass.launch.events import Ended, EventStream, Resumed, Started
from windlass.launch.generation import Start, begin_generation, is_restart
from windlass.launch.inputs import Inputs, Validation, open_inputs
from windlass.launch.job import JobConfig
from windlass.launch.metrics import build_sinks
from windlass.launch.origin import Origin, find_origin
from windlass.launch.plan import Plan, make_plan
from windlass.launch.profiler import StepProfiler
from windlass.launch.resume import Progress, check_order, checkpoint_extra, versions
from windlass.launch.run_folder import RunFolder, alone_in, at_work
from windlass.launch.signals import StopSignals
from windlass.launch.snapshots import Snapshots
from windlass.launch.spikes import RollBack, SpikeWatch, note_spike
from windlass.launch.start import check_same, go_on_from_drives, start_values, to_be_restored
from windlass.launch.tiers import adopt_newest, begin_timeline, build_machine, read_timeline, tier_limits
from windlass.launch.trainer import Trainer
from windlass.model.build import build_model
from windlass.offload.ledger import TIERS, TierLedger
from windlass.offload.machine import TIMELINE, OffloadMachine
from windlass.parallel.engine import Engine


@final
@dataclass
class Run:
    """The built machine of one rank. Leaving its `with` block takes it down in the reverse order of its building."""

    config: JobConfig
    env: ProcessEnv
    device: Device
    inputs: Inputs
    folder: RunFolder
    events: EventStream
    tracer: Tracer
    ledger: TierLedger
    comm: Comm
    plan: Plan
    engine: Engine
    offload: OffloadMachine | None
    snapshots: Snapshots | None
    start: Start
    phases: PhaseLog
    timeline: str
    progress: Progress
    spikes: SpikeWatch
    loader: Loader
    profiler: StepProfiler
    flops_per_token: float
    peak_flops: float
    began: float  # time.perf_counter() when building began
    lifetimes: ExitStack
    tiers: tuple[str, ...] = TIERS

    @property
    def rank(self) -> int:
        return self.env.rank

    @property
    def num_ranks(self) -> int:
        return self.env.world_size

    @property
    def world(self) -> Group:
        return self.comm.world

    @property
    def validation(self) -> Validation | None:
        return self.inputs.validation

    @property
    def bytes_per_token(self) -> float:
        return self.inputs.train.bytes_per_token

    def comm_bytes(self) -> int:
        """Return the bytes received from other ranks so far."""
        return self.comm.ledger.total().wire_bytes

    def facts(self, step: int, tokens: int) -> dict[str, Any]:
        """Return what is kept with the state after a step."""
        return checkpoint_extra(
            self.config,
            self.inputs.identity,
            self.num_ranks,
            step=step,
            consumed=self.loader.consumed,
            tokens=tokens,
            optimizer_steps=self.engine.optimizer_steps,
            generation=self.start.generation,
            rollback=self.spikes.facts(),
        )

    def reached(self, phase: Phase) -> None:
        """Note how far this start has come, for whoever measures recoveries."""
        self.phases.mark(phase)

    def commit_step(self, step: int, tokens: int) -> None:
        """Make a step durable where the drives hold all of the state and always have one whole step.

        Blocks:     host
        Invariant:  no rank overwrites anything of the step before until every rank has done this, because the first
                    thing in the next step is a sum over all ranks
        """
        if self.offload is not None and self.offload.durable:
            self.offload.store.make_durable(step, {**self.facts(step, tokens), TIMELINE: self.timeline})

    def note_spike(self, spike: RollBack) -> None:
        """Note where the next start is to go on.

        Collective: every rank
        """
        note_spike(spike, self.config, self.start.generation, self.world)

    def save(self, step: int, tokens: int) -> SaveReport:
        """Save a checkpoint.

        Collective: every rank
        """
        extra, keep = self.facts(step, tokens), self.config.checkpoint.keep
        if self.snapshots is not None and self.config.checkpoint.mode != "sync":
            return self.snapshots.persist(step, extra)
        return save(self.folder.checkpoints, step, self.engine, extra, self.world, keep=keep, tracer=self.tracer)

    def ended(
        self, step: int, reason: str, *, ok: bool, tokens: int, productive_s: float, collective: bool = True
    ) -> Ended:
        """Sum up the run; byte counts are those of the worst rank, or of this one when peers may be gone.

        Collective: every rank, unless told otherwise
        """
        peaks = {tier: self.ledger.peak(tier) for tier in self.tiers} | {"process": self.device.peak_bytes()}
        measured = {"total": peaks["process"]}
        for tier in self.tiers:
            for state, num_bytes in self.ledger.peak_by_class(tier).items():
                measured[state] = measured.get(state, 0) + num_bytes
        told = self.world.gather_objects([peaks, measured]) if collective else [[peaks, measured]]
        elapsed = time.perf_counter() - self.began
        plan = self._whole_plan() if ok and self.rank == 0 else self.plan
        places = (self.folder.metrics, self.folder.log, self.folder.tensorboard, self.folder.checkpoints)
        return Ended(
            step,
            reason,
            ok,
            tokens,
            elapsed,
            productive_s / elapsed,
            peak_bytes=_worst([peaks for peaks, _ in told]),
            predicted_bytes=_predicted(plan),
            measured_bytes=_worst([measured for _, measured in told]),
            warnings=list(self.events.warnings),
            files=[str(path) for path in places if path.exists()],
        )

    def _whole_plan(self) -> Plan:
        """Complete the plan with activations, in the run folder too, to stand beside what was measured."""
        plan = make_plan(self.config, self.num_ranks, self.config.cluster, self.device.kind)
        try:
            self.folder.write_plan(json.dumps(plan.as_json(), indent=1))
        except OSError as error:
            self.events.warn(0, f"plan.json is without activations in '{self.folder.root}': {error.strerror}")
        return plan

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lifetimes.close()


@dataclass
class _Clock:
    """Seconds of each phase of building."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began


def run_worker(config: JobConfig, env: ProcessEnv | None = None) -> int:
    """Train a job as one rank and return its exit code, 0 also when it was asked to stop.

    Collective: every rank of the job, once
    Raises: WindlassError for whatever stops the run
    """
    env = env if env is not None else read_process_env()

    # Asked now: once this start is counted, it would look like one before it.
    holds = needs_process(config.snapshot.every, config.checkpoint.mode) and is_restart(config, env)

    def leave(signum: int) -> None:
        """End this process, asked to stop before it has trained, unless memory holds what it should save first."""
        if not holds:
            os._exit(0 if signum == signal.SIGTERM else 128 + signum)

    with StopSignals(announce=False, at_once=leave) as signals:
        run = build_run(config, env)
        with run:
            trainer = Trainer(run, signals)
            try:
                trainer.train()
            except CommError:
                if signals.requested != signal.SIGTERM or trainer.has_news:
                    raise  # else the others left a moment earlier, and nothing is lost
    return 0


def build_run(config: JobConfig, env: ProcessEnv) -> Run:
    """Build everything one rank needs, in the order in which it can fail.

    Collective: every rank of the job, once
    """
    began, imported, clock = time.perf_counter(), time.time(), _Clock()
    with ExitStack() as stack:
        with clock.phase("data"):
            device = pick_device(config.train.device, env.local_rank)
            model = build_model(config.model, loss=config.loss)
            mesh = plan_mesh(config.parallelism, env.world_size)
            # All ranks of a pipeline read the same rows.
            inputs = open_inputs(config, mesh.index_along("dp", env.rank), mesh.size("dp"), config.model.vocab_size)
        with clock.phase("plan"):
            # Activations are measured when the run has ended: that imports torch's compiler, seconds of every start.
            plan = make_plan(config, env.world_size, config.cluster, device.kind, activations=False)
            folder, events = _open_folder(config, env, stack)
            phases = PhaseLog(folder.root, env.generation, env.rank)
            phases.mark("began", psutil.Process().create_time())
            phases.mark("imported", imported)
        with clock.phase("ranks"):
            tracer, ledger = Tracer(), TierLedger(tier_limits(config))
            parallelism = config.parallelism
            comm = stack.enter_context(
                Comm.start(env, device, transport=parallelism.transport, timeout_s=parallelism.timeout_s, tracer=tracer)
            )
            if plan.offload is not None and plan.offload.refusal:
                raise PlanError(plan.offload.refusal)
            # Actions come before what follows from them, so that the first difference names one.
            actions = plan.pipeline.schedule.to_json() if plan.pipeline else None
            check_same(
                comm.world,
                {"config": asdict(config), "pipeline": actions, "plan": plan.as_json(), "versions": versions()},
            )
        phases.mark("met")
        with clock.phase("checkpoint"):
            start = begin_generation(config, env, comm.world)
            snapshots = None
            if needs_process(config.snapshot.every, config.checkpoint.mode):
                snapshots = Snapshots(config, env, comm.world, start.generation)
                stack.callback(snapshots.close)
            origin = find_origin(config, comm.world, snapshots, start)
            timeline = read_timeline(folder, comm.world)
        phases.mark("found")
        with clock.phase("tiers"):
            offload = build_machine(
                config,
                plan.offload_of(mesh.index_along("pp", env.rank)),
                env=env,
                device=device,
                ledger=ledger,
                tracer=tracer,
                warn=lambda message: events.warn(0, message),
                timeline=timeline,
                checkpoint_step=origin.step,
                restarted=start.restarted,
            )
            if offload is not None:
                stack.enter_context(offload)
            on_drives = adopt_newest(offload, comm.world, origin.step, start.admits)
            if on_drives is None and (timeline or plan.offload is not None):
                timeline = begin_timeline(folder, comm.world)
            elif on_drives is not None:
                check_order(on_drives.extra, inputs.identity, "state on nvme")
                origin = Origin(base_at=origin.base_at)
        with clock.phase("engine"):
            engine = Engine(
                model,
                comm=comm,
                mesh=mesh,
                device=device,
                zero=config.zero,
                precision=config.precision,
                activation=config.activation,
                optimizer=config.optimizer,
                fill=to_be_restored if origin.found else start_values(config, model, stack),
                tracer=tracer,
                account=lambda state, num_bytes: ledger.add("device", state, num_bytes),
                pipeline=plan.pipeline,
                offload=offload,
                tile=config.offload.tile,
            )
        with clock.phase("restore"):
            if on_drives is None:
                progress = origin.restore(config, inputs.identity, engine, comm.world)
            else:
                progress = go_on_from_drives(config, engine, comm.world, on_drives.extra)
            phases.mark("loaded", step=progress.step, source=progress.folder)
        with clock.phase("loader"):
            loader = stack.enter_context(inputs.loader(progress.consumed, start.skips))
            profiler = StepProfiler(config.profiler, folder.traces, env.rank, tracer)
        run = Run(
            config=config,
            env=env,
            device=device,
            inputs=inputs,
            folder=folder,
            events=events,
            tracer=tracer,
            ledger=ledger,
            comm=comm,
            plan=plan,
            engine=engine,
            offload=offload,
            snapshots=snapshots,
            start=start,
            phases=phases,
            timeline=timeline,
            progress=progress,
            spikes=SpikeWatch.resumed(config.recovery, progress, start),
            loader=loader,
            profiler=profiler,
            flops_per_token=plan.flops_per_step * plan.world_size / plan.tokens_per_step,
            peak_flops=device.peak_flops(config.precision.param_dtype) if env.rank == 0 else 0.0,
            began=began,
            lifetimes=stack.pop_all(),
        )
    _protect(run, origin)
    _announce(run, clock.seconds)
    return run


def _protect(run: Run, origin: Origin) -> None:
    """Begin to take snapshots: first of the state as it was restored, so that from now on it is protected again."""
    snapshots = run.snapshots
    if snapshots is None:
        return
    base = origin.base_at(run.progress.step)
    unprotected = snapshots.protect(
        run.engine, run.device, run.tracer, restored=origin.in_memory, anchor=origin.anchor, base=base
    )
    run.engine.gate = snapshots.gate
    if run.progress.folder:
        snapshots.seed(run.progress.step, run.facts(run.progress.step, run.progress.tokens))
    for weakness in unprotected if run.rank == 0 else ():
        run.events.warn(run.progress.step, weakness)


def _open_folder(config: JobConfig, env: ProcessEnv, stack: ExitStack) -> tuple[RunFolder, EventStream]:
    """Lock the run folder on rank 0, unless our launcher has, and open the event stream of this rank."""
    folder, rank = RunFolder(Path(config.train.run_dir)), env.rank
    if rank == 0 or env.generation:
        folder.create(controlled=bool(env.generation))
    if env.generation:
        stack.enter_context(at_work(folder))
    elif rank == 0:
        stack.enter_context(alone_in(folder))
    sinks = build_sinks(config.metrics, rank, metrics=folder.metrics, log=folder.log, tensorboard=folder.tensorboard)
    events = EventStream(sinks)
    stack.callback(events.close)
    return folder, events


def _announce(run: Run, seconds: dict[str, float]) -> None:
    """Say what begins now, in the run folder and in the event stream."""
    p = run.progress
    if run.rank == 0:
        try:
            run.folder.write_config(to_yaml(run.config))
            run.folder.write_plan(json.dumps(run.plan.as_json(), indent=1))
        except OSError as error:
            run.events.warn(
                p.step, f"config.yaml and plan.json are not up to date in '{run.folder.root}': {error.strerror}"
            )
    if run.validation is None and run.rank == 0:
        run.events.warn(
            p.step,
            "the data has no validation documents, so there is no validation loss (windlass data prepare --validation)",
        )
    for note in p.passed_over if run.rank == 0 and not p.folder else ():
        run.events.warn(p.step, f"not gone on from: {note}")
    if p.folder:
        run.events.emit(Resumed(p.step, p.folder, p.consumed, p.seconds, p.passed_over, p.changes))
    run.events.emit(
        Started(
            p.step,
            run.config.train.steps,
            run.engine.num_parameters,
            run.num_ranks,
            run.device.name,
            run.inputs.identity.global_batch,
            run.config.train.seq_len,
            seconds,
            versions(),
        )
    )


def _worst(by_rank: list[dict[str, int]]) -> dict[str, int]:
    """Return the largest value of each key over all ranks."""
    return {key: max(counts.get(key, 0) for counts in by_rank) for key in dict.fromkeys(k for c in by_rank for k in c)}


def _predicted(plan: Plan) -> dict[str, int]:
    """Return the bytes the plan foresaw by class of state, each of the rank with most of it, and in total."""
    tiers = [classes for tier, classes in plan.bytes.items() if tier != "device"]
    predicted = _worst([rank.bytes for rank in plan.ranks])
    for classes in tiers:
        for state, num_bytes in classes.items():
            predicted[state] = predicted.get(state, 0) + num_bytes
    # On a CPU the device's memory is the host's: a process holds both.
    host = sum(plan.bytes["host"].values()) if plan.device == "cpu" else 0
    return {"total": plan.device_bytes + host, **predicted}
