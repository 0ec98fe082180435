"""The training loop over small doubles of its parts."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from windlass.checkpoint.policy import CheckpointConfig
from windlass.checkpoint.save import SaveReport
from windlass.dist.errors import NumericsError, SpikeError, WorkerError
from windlass.dist.trace import Tracer
from windlass.launch.events import Ended, Evaluated, Event, EventStream, Profiled, Saved, Stepped, Warned
from windlass.launch.profiler import ProfilerConfig, StepProfiler
from windlass.launch.recovery import RecoveryConfig
from windlass.launch.resume import Progress
from windlass.launch.spikes import RollBack, SpikeWatch
from windlass.launch.trainer import Trainer, bits_per_byte
from windlass.offload.ledger import TierLedger
from windlass.parallel.engine import StepReport
from windlass.parallel.optim import OptimizerConfig, ScheduleConfig, learning_rate

ENDLESS = 1 << 30  # steps: a signal is heard by a thread, which may be late


class Recorder:
    """A sink that keeps what it gets and may react to it."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.react: Callable[[Event], None] = lambda event: None

    def write(self, event: Event) -> None:
        self.events.append(event)
        self.react(event)

    def close(self) -> None:
        """Nothing to store."""

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


class Loader:
    """Counts samples, four a step."""

    def __init__(self, consumed: int) -> None:
        self.consumed = consumed

    def next_step(self) -> list[Any]:
        self.consumed += 4
        return []


class Engine:
    """Reports a loss of 1 / step; the steps in `broken` are skipped."""

    def __init__(self, broken: Sequence[int] = (), done: int = 0) -> None:
        self.broken, self.calls = set(broken), done
        self.rates: list[float] = []

    def train_step(self, batches: Sequence[Any], lr: float) -> StepReport:
        self.calls += 1
        self.rates.append(lr)
        skipped = self.calls in self.broken
        loss = float("nan") if skipped else 1 / self.calls
        return StepReport(loss, 100, 0.5, skipped, {"forward_backward": 0.01}, 0.002)


class Alone:
    """A world of one; `heard` is what another rank would add to a maximum."""

    def __init__(self) -> None:
        self.heard = 0

    def all_reduce(self, tensor: torch.Tensor, *, op: str, tag: str, label: str) -> Any:
        assert op == "max"
        tensor.clamp_(min=self.heard)
        return SimpleNamespace(wait=lambda: None)


class FakeRun:
    """The parts of a run that the loop sees."""

    def __init__(self, tmp_path: Path, *, steps: int = 4, start: int = 0, **changes: Any) -> None:
        parts = {
            "broken": (),
            "eval_every": 0,
            "optimizer": OptimizerConfig(),
            "checkpoint": CheckpointConfig(),
        } | changes
        self.config = SimpleNamespace(
            train=SimpleNamespace(steps=steps, seq_len=8, eval_every=parts["eval_every"]),
            optimizer=parts["optimizer"],
            lr_scheduler=ScheduleConfig(),
            checkpoint=parts["checkpoint"],
            recovery=parts.get("recovery", RecoveryConfig()),
        )
        self.spikes, self.noted = SpikeWatch(self.config.recovery), list[RollBack]()
        self.snapshots = parts.get("snapshots")
        self.inputs = SimpleNamespace(identity=SimpleNamespace(global_batch=4))
        self.phases: list[str] = []
        self.recorder = Recorder()
        self.events = EventStream([self.recorder])
        self.rank, self.num_ranks, self.world = 0, 1, Alone()
        self.progress = Progress(start, 4 * start, 100 * start, "step" if start else "")
        self.loader, self.engine = Loader(4 * start), Engine(parts["broken"], start)
        self.validation = SimpleNamespace(evaluate=lambda engine: (20.0, 10), bytes_per_token=2.0)
        self.tracer, self.ledger, self.tiers = Tracer(), TierLedger(), ("device",)
        self.ledger.add("device", "param", 7)
        self.profiler = StepProfiler(parts.get("profiler", ProfilerConfig()), tmp_path, 0, self.tracer)
        self.device = SimpleNamespace(peak_bytes=lambda: 50, total_bytes=lambda: 100)
        self.flops_per_token, self.peak_flops, self.bytes_per_token = 6.0, 0.0, 2.0
        self.saves: list[tuple[int, int]] = []
        self.commits: list[int] = []
        self.seen: list[int] = []  # losses that are kept with each committed step
        self.offload = SimpleNamespace(finished=False)
        self.disk_full = False
        self.traffic = 0

    def reached(self, phase: str) -> None:
        self.phases.append(phase)

    def facts(self, step: int, tokens: int) -> dict[str, int]:
        return {"step": step, "tokens": tokens}

    def comm_bytes(self) -> int:
        self.traffic += 10
        return self.traffic

    def commit_step(self, step: int, tokens: int) -> None:
        self.commits.append(step)
        self.seen.append(len(self.spikes.facts().get("losses", ())))

    def note_spike(self, spike: RollBack) -> None:
        self.noted.append(spike)

    def save(self, step: int, tokens: int) -> SaveReport:
        self.saves.append((step, tokens))
        ok = not self.disk_full
        return SaveReport(ok, step, Path(f"step-{step}") if ok else None, 5, 0.1, {}, "" if ok else "disk full")

    def ended(
        self, step: int, reason: str, *, ok: bool, tokens: int, productive_s: float, collective: bool = True
    ) -> Ended:
        return Ended(step, reason, ok, tokens, 1.0, 0.5, warnings=list(self.events.warnings))

    def train(self) -> Ended:
        return Trainer(self).train()  # type: ignore[arg-type]  # a double of Run


def test_a_run_validates_before_and_after_saves_at_the_end_and_ends_with_done(tmp_path: Path) -> None:
    run = FakeRun(tmp_path)
    ended = run.train()
    assert (ended.reason, ended.ok, ended.step, ended.tokens) == ("done", True, 4, 400)
    assert [event.kind for event in run.recorder.events] == ["eval", *["step"] * 4, "eval", "checkpoint", "exit"]
    assert run.saves == [(4, 400)]
    steps = run.recorder.of(Stepped)
    assert [event.samples for event in steps] == [(0, 4), (4, 8), (8, 12), (12, 16)]
    assert [event.lr for event in steps] == [
        learning_rate(run.config.optimizer, run.config.lr_scheduler, step, 4) for step in range(4)
    ]
    assert steps[0].bits_per_byte == pytest.approx(bits_per_byte(1.0, 2.0))
    assert steps[0].bytes_by_tier == {"device": 7}
    assert (steps[0].mfu, steps[0].memory_share, steps[0].comm_bytes) == (0.0, 0.5, 10)
    assert steps[0].tokens_per_s == pytest.approx(4 * 8 / steps[0].step_s)
    assert [event.loss for event in run.recorder.of(Evaluated)] == [2.0, 2.0]


def test_a_resumed_run_goes_on_where_it_was_and_does_not_validate_first(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, steps=6, start=4)
    ended = run.train()
    assert [event.step for event in run.recorder.of(Stepped)] == [5, 6]
    assert run.recorder.of(Stepped)[0].samples == (16, 20)
    assert [event.step for event in run.recorder.of(Evaluated)] == [6]
    assert ended.tokens == 600


def test_a_run_that_is_complete_already_does_nothing(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, steps=4, start=4)
    assert run.train().reason == "done"
    assert run.saves == []
    assert not run.recorder.of(Stepped)


def test_validation_and_checkpoints_happen_every_n_steps_and_once_at_the_end(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, steps=6, eval_every=3, checkpoint=CheckpointConfig(every=2))
    run.train()
    assert [event.step for event in run.recorder.of(Evaluated)] == [0, 3, 6]
    assert [event.step for event in run.recorder.of(Saved)] == [2, 4, 6]
    off = FakeRun(tmp_path, steps=6, checkpoint=CheckpointConfig(every=4, at_end=False))
    off.train()
    assert [event.step for event in off.recorder.of(Saved)] == [4]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_ends_well(tmp_path: Path, signum: signal.Signals) -> None:
    run = FakeRun(tmp_path, steps=ENDLESS)
    before = signal.getsignal(signum)

    def raise_once(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 2:
            signal.raise_signal(signum)

    run.recorder.react = raise_once
    ended = run.train()
    assert ended.ok
    assert ended.reason == signum.name
    assert 2 <= ended.step < ENDLESS
    assert run.saves == [(ended.step, 100 * ended.step)]
    assert [event.step for event in run.recorder.of(Evaluated)] == [0]
    assert signal.getsignal(signum) is before


def test_the_wish_of_another_rank_to_stop_is_heard(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, steps=9)
    run.world.heard = signal.SIGTERM
    assert (run.train().reason, run.saves) == ("SIGTERM", [(1, 100)])


def test_a_full_disk_while_saving_is_a_loud_warning_and_training_goes_on(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, steps=4, checkpoint=CheckpointConfig(every=1))
    run.disk_full = True

    def free_space(event: Event) -> None:
        run.disk_full = not (isinstance(event, Stepped) and event.step == 4) and run.disk_full

    run.recorder.react = free_space
    ended = run.train()
    assert ended.ok
    assert ended.step == 4
    assert [event.step for event in run.recorder.of(Saved)] == [4]
    told = run.recorder.of(Warned)
    assert [event.step for event in told] == [1, 2, 3]
    assert told[0].message == "CHECKPOINT NOT SAVED, training goes on: disk full"
    assert len(ended.warnings) == 3  # and the summary says it again


def test_skipped_steps_are_counted_in_a_row_and_end_the_run_at_the_limit(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, steps=9, broken=(2, 4, 5, 6), optimizer=OptimizerConfig(max_skips=3))
    with pytest.raises(
        NumericsError, match=r"step 6: loss nan.*3 steps in a row were skipped \(optimizer.max_skips = 3\)"
    ):
        run.train()
    (ended,) = run.recorder.of(Ended)
    assert not ended.ok
    assert "3 steps in a row" in ended.reason
    assert [event.step for event in run.recorder.of(Stepped) if event.skipped] == [2, 4, 5, 6]
    assert run.saves == []


def test_the_policy_stop_ends_the_run_at_the_first_skipped_step(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, broken=(2,), optimizer=OptimizerConfig(nonfinite="stop"))
    with pytest.raises(NumericsError, match=r"optimizer.nonfinite = 'stop'"):
        run.train()
    assert [event.step for event in run.recorder.of(Stepped)] == [1, 2]


def test_a_skipped_step_is_not_goodput(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, broken=(2,))
    trainer = Trainer(run)  # type: ignore[arg-type]  # a double of Run
    trainer.train()
    good = sum(event.step_s for event in run.recorder.of(Stepped) if not event.skipped)
    assert trainer.productive_s == pytest.approx(good)


def test_an_injected_fault_strikes_before_its_step_and_is_the_last_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WINDLASS_FAULT", "raise:rank=0:step=3")
    run = FakeRun(tmp_path)
    with pytest.raises(WorkerError):
        run.train()
    assert [event.step for event in run.recorder.of(Stepped)] == [1, 2]
    assert isinstance(run.recorder.events[-1], Ended)


def test_a_profiler_window_reports_its_files(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, profiler=ProfilerConfig(start_step=2, num_steps=2, operators=False))
    run.train()
    (event,) = run.recorder.of(Profiled)
    assert event.step == 3
    assert [Path(file).name for file in event.files] == ["timeline_rank0_step3.json.gz"]


def test_a_window_that_the_run_ends_in_is_written(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, profiler=ProfilerConfig(start_step=3, num_steps=9, operators=False))
    run.train()
    (event,) = run.recorder.of(Profiled)
    assert [Path(file).name for file in event.files] == ["timeline_rank0_step4.json.gz"]


def test_what_every_rank_sees_is_told_by_rank_0_only(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, broken=(2,))
    run.rank = 1
    run.disk_full = True
    run.train()
    assert run.recorder.of(Warned) == []


def test_bits_per_byte_is_unknown_without_text() -> None:
    assert bits_per_byte(1.0, 0.0) is None
    assert bits_per_byte(2 * 0.6931471805599453, 2.0) == pytest.approx(1.0)


def test_a_run_whose_last_step_was_found_on_the_drives_only_is_saved_and_then_they_may_forget_it(
    tmp_path: Path,
) -> None:
    run = FakeRun(tmp_path, steps=4, start=4)
    run.progress = Progress(4, 16, 400, "state on nvme", on_drives=True)
    Trainer(run).train()  # type: ignore[arg-type]
    assert run.saves == [(4, 400)] and run.commits == [] and run.offload.finished


def test_every_step_is_committed_and_what_was_not_saved_stays_on_the_drives(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, checkpoint=CheckpointConfig(at_end=False))
    Trainer(run).train()  # type: ignore[arg-type]
    assert run.commits == [1, 2, 3, 4] and run.saves == [] and not run.offload.finished


class Memory:
    """Snapshots that note what they are asked; `full` are the steps at which this rank has no room."""

    def __init__(self, *, every: int = 1, full: Sequence[int] = ()) -> None:
        self.every, self.full = every, set(full)
        self.taken: list[tuple[int, bool]] = []
        self.beats: list[tuple[str, int]] = []
        self.asked = 0
        self.finished = 0
        self.step = 0

    def finish(self) -> None:
        self.finished += 1

    def ready(self) -> bool:
        self.step += 1
        return self.step not in self.full

    def due(self, step: int) -> bool:
        return step % self.every == 0

    def take(self, step: int, facts: dict[str, int], *, all_ready: bool) -> None:
        assert facts["step"] == step
        self.taken.append((step, all_ready))

    def beat(self, phase: str, step: int) -> None:
        self.beats.append((phase, step))

    def levels(self) -> dict[str, float]:
        return {"ram": 1.0}

    def problems(self) -> list[str]:
        return ["the drive is full"] if self.step == 2 else []

    def flush(self, signum: int) -> None:
        self.asked += 1


@pytest.mark.parametrize("full", [False, True])
def test_snapshots_are_let_go_only_when_the_last_step_is_in_a_checkpoint(full: bool, tmp_path: Path) -> None:
    memory = Memory()
    run = FakeRun(tmp_path, snapshots=memory)
    run.disk_full = full
    run.train()
    assert memory.finished == (not full)


def test_snapshots_are_taken_when_due_and_left_out_where_a_rank_has_no_room(tmp_path: Path) -> None:
    memory = Memory(every=2, full=[4])
    run = FakeRun(tmp_path, steps=6, snapshots=memory)
    run.train()
    assert memory.taken == [(2, True), (4, False), (6, True)]
    assert [beat for beat in memory.beats if beat[0] == "step"] == [("step", n) for n in range(1, 7)]
    assert [w.message for w in run.recorder.of(Warned)] == ["the drive is full"]
    assert run.recorder.of(Stepped)[0].snapshot == {"ram": 1.0}
    assert run.phases == ["first_step"]


def test_another_rank_without_room_makes_all_leave_a_snapshot_out(tmp_path: Path) -> None:
    memory = Memory()
    run = FakeRun(tmp_path, steps=1, snapshots=memory)
    run.world.heard = 1
    run.train()
    assert memory.taken == [(1, False)]


def test_a_signal_has_the_newest_snapshot_made_durable_at_once(tmp_path: Path) -> None:
    memory = Memory()
    run = FakeRun(tmp_path, steps=ENDLESS, snapshots=memory)
    run.recorder.react = lambda event: (
        signal.raise_signal(signal.SIGTERM) if isinstance(event, Stepped) and event.step == 2 else None
    )
    ended = run.train()
    assert ended.reason == "SIGTERM"
    assert memory.asked == 1


def test_a_jump_of_the_loss_ends_the_run_with_where_to_go_back_to(tmp_path: Path) -> None:
    memory = Memory()
    recovery = RecoveryConfig(spike_factor=2.0, spike_window=3)
    run = FakeRun(tmp_path, steps=9, snapshots=memory, recovery=recovery)
    train_step = run.engine.train_step

    def jumps(batches: Sequence[Any], lr: float) -> StepReport:
        report = train_step(batches, lr)
        return replace(report, loss=100.0) if run.engine.calls == 5 else report

    run.engine.train_step = jumps  # type: ignore[method-assign]
    with pytest.raises(SpikeError, match="loss 100 at step 5"):
        run.train()
    assert run.noted == [RollBack(3, 12, 20, run.noted[0].why)]
    assert [step for step, _ in memory.taken] == [1, 2, 3, 4]
    assert run.commits == [1, 2, 3, 4, 5] and run.seen == [1, 2, 3, 3, 3], "a step is kept with what its loss adds"


def test_a_loss_that_is_not_finite_goes_back_where_jumps_do(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, steps=9, broken=(2,), recovery=RecoveryConfig(spike_factor=2.0, spike_window=3))
    with pytest.raises(SpikeError, match="loss nan at step 2"):
        run.train()
    assert [(back.at_most, back.first, back.stop) for back in run.noted] == [(0, 0, 8)]


def test_a_step_skipped_for_its_gradients_alone_is_no_jump_but_counts_as_a_step(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, steps=4, recovery=RecoveryConfig(spike_factor=2.0, spike_window=3))
    train_step = run.engine.train_step

    def overflows(batches: Sequence[Any], lr: float) -> StepReport:
        report = train_step(batches, lr)
        return replace(report, grad_norm=float("inf"), skipped=True) if run.engine.calls == 2 else report

    run.engine.train_step = overflows  # type: ignore[method-assign]
    run.train()
    assert run.noted == [] and run.seen == [1, 2, 3, 3]
