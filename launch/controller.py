"""Keeps a job running: begin a generation, fence the one before, decide, start workers, watch them, and again.

Every step is in the control log before it is done, so a controller that is started anew goes on where the last one
was. Must not know: what a node or a worker is (the fleet does), what is decided why (`decide` does).
"""

from __future__ import annotations

import secrets
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from windlass.dist.errors import CheckpointError, ConfigError, PlanError, SpikeError, WorkerError
from windlass.launch import lines
from windlass.launch.blame import blame
from windlass.launch.control_log import ControlLog, Kind
from windlass.launch.decide import Failed, History, Limits, Restart, Stop, Wait, decide
from windlass.launch.drill import Strike, pending
from windlass.launch.failure import Exit, Failure, format_failures, order_failures
from windlass.launch.fleet import Fleet, Seating
from windlass.launch.history import (
    Recovery,
    StepWatch,
    describe,
    last_reached,
    measure,
    restored_step,
    write_history,
)
from windlass.launch.recovery import RecoveryConfig
from windlass.launch.supervisor import (
    StopCount,
    Stopped,
    WorkerGroup,
    check_stop,
    conclude,
    interruptible,
    supervise,
)

REPORT_S = 0.5  # a lost peer is noticed within milliseconds; recovery does not wait for the slowest report
LOOK_S = 0.25  # between looks at nodes that are waited for, and at reports of a start
SOON_S = 0.05  # the same once a worker has ended: the node of another may be why
AIM_S = 0.01  # between looks at the step while a drill waits for one


@dataclass(frozen=True)
class Patience:
    """How long the controller waits for what. Units: seconds."""

    grace_s: float = 30.0  # from the first SIGTERM to the end
    grow_s: float = 0.0  # between looks for room to grow
    flush_s: float = 0.0  # of the grace, kept for making the newest snapshot durable


def limits_of(config: RecoveryConfig, workers: int, sizes: Sequence[int]) -> Limits:
    """Return the limits of recovery for a job that works with these numbers of workers."""
    return Limits(
        workers,
        tuple(sizes),
        config.max_restarts,
        config.crash_loops,
        config.node_failures,
        config.replace_s,
        config.window_s,
    )


@final
class Controller:
    """Runs the workers of one job on a fleet until they are done or recovery gives up.

    `launch` names one start by a user: a controller that finds it in the log takes over from one that died, with its
    budgets and what is left of its drill; any other begins anew.
    """

    def __init__(
        self,
        fleet: Fleet,
        log: ControlLog,
        limits: Limits,
        patience: Patience,
        run: Path,
        *,
        variables: Mapping[str, str] | None = None,
        strikes: Sequence[Strike] = (),
        launch: str = "",
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._fleet, self._log, self._limits, self._patience, self._run = fleet, log, limits, patience, run
        self._variables = dict(variables or {})
        self._strikes = list(strikes)
        self._launch = launch or secrets.token_hex(8)
        self._say = say or lines.say
        self._steps = StepWatch(run)
        self._seating: Seating | None = None
        self._generation = 0
        self._recovery: Recovery | None = None  # under way, until its first step is done
        self._planned = ""
        self._looked = self._grew = 0.0
        self._unread = ""  # why the log cannot be read

    def run(self, stop: StopCount) -> int:
        """Run the job and return its exit code.

        Blocks:      host, until the job has ended
        Raises:      CheckpointError if the log cannot be written; WorkerError if another controller took over
        """
        code = 1
        ended: list[int] = []
        try:
            code = self._take_over(ended, stop) if self._known() else self._begin(stop)
            return code
        finally:
            if not ended:
                self._end(code)

    def _known(self) -> bool:
        return any(r["kind"] == "launch" and r["launch"] == self._launch for r in self._log.records)

    def _begin(self, stop: StopCount) -> int:
        self._log.append("launch", launch=self._launch, workers=self._limits.workers)
        return self._keep_running([], stop)

    def _take_over(self, ended: list[int], stop: StopCount) -> int:
        """Go on where a controller of the same launch died; `ended`: with what it had ended, if it had."""
        records = self._log.since_launch()
        ended += [record["code"] for record in records if record["kind"] == "end"]
        if ended:
            return ended[-1]
        self._strikes = pending(self._strikes, records)
        self._generation, self._seating = self._log.generation, self._history().seating
        exits: list[Exit] = []
        running = bool(records) and records[-1]["kind"] not in ("failure", "lost", "planned", "generation", "decision")
        group = self._fleet.attach(self._generation, self._seating) if running and self._seating else None
        if group is not None:
            begun = [record for record in records if record["kind"] == "decision"][-1]
            self._steps.begin(begun.get("metrics", 0))
            self._say(f"windlass: a new controller takes over generation {self._generation}")
            self._log.adopt()
            exits = self._watch(group, stop)
            code = self._judge(exits, stop)
            if code >= 0:
                return code
        return self._keep_running(exits, stop)

    def _keep_running(self, exits: list[Exit], stop: StopCount) -> int:
        """Start the workers as often as needed; `exits`: how those before ended."""
        while True:
            started = self._start(exits, stop)
            if isinstance(started, int):
                return started
            exits = started
            code = self._judge(exits, stop)
            if code >= 0:
                return code

    def _start(self, exits: list[Exit], stop: StopCount) -> list[Exit] | int:
        """Begin a generation and return how its workers ended, or the exit code of the job if it does not begin."""
        try:
            with interruptible(stop):
                check_stop()  # what is in memory can be made durable until a new generation begins
                begun = self._begin_generation(exits)
        except Stopped:
            return self._stopped([], stop)
        return begun if isinstance(begun, int | list) else self._watch(begun, stop)

    def _begin_generation(self, exits: list[Exit]) -> WorkerGroup | list[Exit] | int:
        """Fence, decide and start workers; return them, or how they failed to start, or the exit code of the job."""
        generation = self._log.bump(by="controller")
        failed = self._record_end(exits)
        self._fleet.fence(generation)
        fenced = time.time()
        if failed is not None and failed.kind != "planned":
            failed = self._look_for_lost_nodes(failed)
        decision = self._decide()
        if isinstance(decision, Stop):
            return self._give_up(decision, exits)
        nodes, at = list(decision.seating.nodes), self._steps.begin()
        self._log.append("decision", action="restart", nodes=nodes, why=decision.why, metrics=at)
        self._pause(decision.pause_s)
        if failed is not None:
            reached = last_reached(self._log.since_launch())
            self._recovery = Recovery(generation, failed, decision.why, fenced, time.time(), reached)
        self._generation, self._seating = generation, decision.seating
        try:
            group = self._fleet.start(generation, decision.seating, self._variables)
        except WorkerError as error:
            fault = Failure(0, time.time(), f"the workers do not start: {error}", "", error.exit_code, False, "start")
            return [Exit(0, error.exit_code, time.time(), fault, stopped=False)]
        self._log.append("start", workers=decision.seating.world_size)
        return group

    def _watch(self, group: WorkerGroup, stop: StopCount) -> list[Exit]:
        """Watch workers until all have ended."""
        self._planned = ""
        self._grew = time.monotonic()
        try:
            return supervise(
                group,
                0.0,
                stop,
                report_s=REPORT_S,
                deadline_s=self._patience.grace_s - self._patience.flush_s,
                tend=self._tend,
                look_s=AIM_S if self._strikes else 0.1,
            )
        finally:
            group.send(range(group.num_workers), signal.SIGKILL)
            self._look_at_start(last=True)

    def _judge(self, exits: list[Exit], stop: StopCount) -> int:
        """Return the exit code of the job, or -1 if it goes on."""
        self._log.refresh()
        if stop.count:
            return self._stopped(exits, stop)
        back = [r for r in self._log.records if r["kind"] == "rollback" and r["generation"] == self._generation]
        failures = order_failures(exits)
        if back and all(failure.secondary or failure.exit_code == SpikeError.exit_code for failure in failures):
            self._planned = back[-1].get("why", "") or f"going back to step {back[-1]['step']}"
            self._say(f"windlass: {self._planned}")
        elif failures:
            self._planned = ""
        return -1 if failures or self._planned else 0

    # -- while workers run ------------------------------------------------------------------------------------------

    def _tend(self, whole: bool) -> bool:
        """Look after the fleet, and return whether workers shall end to go on elsewhere; `whole`: all of them run."""
        if whole:
            self._strike()
        now = time.monotonic()
        if now - self._looked >= (LOOK_S if whole else SOON_S):
            self._looked = now
            self._check_owner()
            for news in self._fleet.tend():
                self._note("notice", message=news)
                self._say(f"windlass: {news}")
            self._look_at_start()
            self._planned = self._planned or (self._wish() if whole else "")
        return bool(self._planned)

    def _check_owner(self) -> None:
        """End if another controller has taken over. A log that cannot be read for a while ends no healthy run."""
        try:
            self._log.check_owner()
            self._unread = ""
        except CheckpointError as error:
            if not self._unread:
                self._say(f"windlass: {error}; training goes on")
            self._unread = str(error)

    def _strike(self) -> None:
        """Do what the drill wants at this step."""
        while self._strikes and self._steps.last() >= self._strikes[0].step:
            strike = self._strikes.pop(0)
            # Written first: a strike may hit the controller itself, and is not to be repeated then.
            if not self._note("struck", what=strike.kind, target=strike.target, at=strike.step):
                continue
            try:
                message, done = self._fleet.strike(strike.kind, strike.target), True
            except ConfigError as error:
                message, done = str(error), False
            self._note("blow", message=message, done=done)
            self._say(f"windlass: drill {strike}: {message}")

    def _note(self, kind: Kind, **facts: Any) -> bool:
        """Add a record that no decision needs; return whether that worked. A full disk ends no healthy run."""
        try:
            self._log.append(kind, **facts)
        except CheckpointError as error:
            self._say(f"windlass: {kind} is not noted: {error}")
            return False
        return True

    def _wish(self) -> str:
        """Return why workers should move now, although none has failed."""
        assert self._seating is not None
        nodes = self._fleet.nodes()
        leaving = [n.name for n in nodes if n.alive and n.drain_deadline is not None and n.name in self._seating.used]
        short = self._seating.world_size < self._limits.workers
        look = self._patience.grow_s and short and time.monotonic() - self._grew >= self._patience.grow_s
        if not leaving and not look:
            return ""
        self._grew = time.monotonic()
        wish = decide(self._history(), nodes, self._limits, waited_s=self._limits.replace_s)
        if not isinstance(wish, Restart) or wish.seating == self._seating:
            return ""
        if not leaving and wish.seating.world_size <= self._seating.world_size:
            return ""
        why = f"{', '.join(leaving)} will be taken away" if leaving else "there is room again"
        self._say(f"windlass: {why}: workers finish their step and move ({wish.why})")
        return why

    def _look_at_start(self, *, last: bool = False) -> None:
        """Once the workers have done their first step, tell what the recovery took."""
        if self._recovery is None:
            return
        struck = [r["time"] for r in self._log.since_launch() if r["kind"] == "struck"]
        measured = measure(self._run, self._recovery, struck)
        if measured.done:
            self._note("recovered", **measured.as_record())
            self._say(describe(measured))
            self._write_history()
        if measured.done or last:
            self._recovery = None

    # -- between generations ----------------------------------------------------------------------------------------

    def _history(self) -> History:
        return History.of(self._log.records)

    def _record_end(self, exits: list[Exit]) -> Failed | None:
        """Write down why the workers ended, first of all; what is known of nodes follows after fencing."""
        if not exits:
            return None
        assert self._seating is not None
        # Without a step in this generation, what counts is how far the ones before it came.
        done = self._steps.last()
        step = done or last_reached(self._log.since_launch())
        when = min(ended.when for ended in exits)
        if self._planned:
            self._log.append("planned", why=self._planned, step=step)
            return Failed(self._generation, "planned", step, self._planned, time=when)
        self._say(format_failures(exits))
        restored = restored_step(self._run, self._generation) if done else step
        failed = blame(exits, self._seating, self._generation, step=step, restored=restored)
        facts: dict[str, Any] = {name: value for name, value in vars(failed).items() if name != "kind"}
        self._log.append("failure", what=failed.kind, **facts)
        return failed

    def _look_for_lost_nodes(self, failed: Failed) -> Failed:
        """Note the nodes that are gone: what their workers said is not the cause then."""
        assert self._seating is not None
        lost = [node.name for node in self._fleet.nodes() if not node.alive and node.name in self._seating.used]
        if not lost:
            return failed
        self._log.append("lost", nodes=lost)
        self._say(f"windlass: lost {', '.join(lost)}")
        return self._history().failures[-1]

    def _decide(self) -> Restart | Stop:
        """Decide, waiting for nodes as long as the limits allow. The wait counts from the failure, whoever waits."""
        began, told = time.time(), False
        while True:
            check_stop()
            history = self._history()
            since = history.failures[-1].time if history.failures and self._seating is not None else began
            decision = decide(history, self._fleet.nodes(), self._limits, waited_s=time.time() - since)
            if not isinstance(decision, Wait):
                return decision
            if not told:
                self._say(f"windlass: {decision.why}; waiting up to {decision.seconds:.0f} s for nodes")
                told = True
            for news in self._fleet.tend():
                self._say(f"windlass: {news}")
            time.sleep(min(LOOK_S, decision.seconds))

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        if seconds:
            self._say(f"windlass: no new step since the last failure; starting again in {seconds:.0f} s")
        while time.monotonic() < until:
            check_stop()
            time.sleep(0.05)

    # -- ends -------------------------------------------------------------------------------------------------------

    def _stopped(self, exits: list[Exit], stop: StopCount) -> int:
        """End after a request to stop: 0 if the work is safe.

        With snapshots, workers that end well say so too if their last state is durable; it may not be, on a full disk.
        """
        well = bool(exits) and all(ended.code == 0 for ended in exits)
        if well and (not self._patience.flush_s or self._complete()):
            return 0
        blameless = all(failure.secondary for failure in order_failures(exits))
        step = self._fleet.flush(self._patience.flush_s) if self._patience.flush_s else None
        if step is not None and blameless:
            self._say(f"windlass: stopped on request; step {step} was made durable from snapshots")
            return 0
        if blameless and not self._has_worked():
            self._say("windlass: stopped on request before the first step")
            return 0
        if not exits:
            self._say("windlass: stopped on request while no worker was running; snapshots stay for their lease")
        if well:
            self._say(
                "windlass: stopped on request, but the last step could not be made durable; snapshots stay for their "
                "lease, and the same command goes on from them"
            )
        return conclude(exits, stop) or 128 + signal.SIGTERM

    def _has_worked(self) -> bool:
        """Whether there may be steps in memory that are nowhere else: of this launch, or of one that was killed."""
        ended = any(r["kind"] in ("failure", "planned") for r in self._log.since_launch())
        return self._steps.last() > 0 or ended or (self._patience.flush_s > 0 and self._log.left_work())

    def _give_up(self, decision: Stop, exits: list[Exit]) -> int:
        self._log.append("decision", action="stop", why=decision.why)
        if self._limits.max_restarts or not exits:
            self._say("\n".join([f"windlass: not started again: {decision.why}", *(f"  {x}" for x in decision.report)]))
        # A controller that took over has only what the one before has noted.
        failures = order_failures(exits) if exits else self._history().failures[-1:]
        return failures[0].exit_code if failures else WorkerError.exit_code

    def _end(self, code: int) -> None:
        complete = False
        try:
            self._log.check_owner()
            complete = code == 0 and self._complete()
            self._log.append("end", code=code)  # first: a controller that follows one killed here starts nothing again
        except WorkerError:  # nodes, and workers that run there now, are of the newer generation
            return
        except CheckpointError as error:  # the run is over; its log must not hide what it came to
            self._say(f"windlass: {error}")
        try:
            self._fleet.release(complete)
        finally:
            self._write_history()

    def _complete(self) -> bool:
        """Whether the workers have said that the newest state is durable, or there is nothing to say."""
        self._log.refresh()
        return self._log.complete(self._generation)

    def _write_history(self) -> None:
        try:
            write_history(self._run, self._log.records)
        except OSError as error:
            self._say(f"windlass: history.md is not up to date in '{self._run}': {error.strerror}")


def allowed_sizes(workers: int, smallest: int, works: Callable[[int], object]) -> tuple[int, ...]:
    """Return the numbers of workers from `smallest` (0: only `workers`) to `workers` with which a job works.

    `works` raises ConfigError or PlanError for a number that does not.
    """
    found = []
    for size in range(smallest or workers, workers + 1):
        try:
            works(size)
        except (ConfigError, PlanError):
            continue
        found.append(size)
    return tuple(found)
