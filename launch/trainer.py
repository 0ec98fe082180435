"""The training loop: data in, steps, events out, checkpoints now and then, until the last step or a wish to stop.

It sees the parts of a `Run` through their public methods only; numerics are the engine's, order is the loader's, and
what a number looks like is the sinks'. Must not know: ZeRO, transports, files.
"""

from __future__ import annotations

import math
import signal
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from windlass.dist.env import fault
from windlass.dist.errors import CheckpointError, NumericsError, SpikeError
from windlass.launch.events import Ended, Evaluated, Profiled, Saved, Stepped
from windlass.launch.profiler import Window
from windlass.launch.signals import StopSignals
from windlass.parallel.optim import learning_rate

if TYPE_CHECKING:
    from windlass.launch.run import Run
    from windlass.parallel.engine import StepReport


class Trainer:
    """Drives one run from the step it is at to its last one. `signals`: they are being handled already.

    Collective:  every rank of the run calls `train` once
    """

    def __init__(self, run: Run, signals: StopSignals | None = None) -> None:
        self.run = run
        self._signals = signals
        self.step = run.progress.step
        self.tokens = run.progress.tokens
        self.productive_s = 0.0
        self._skips = 0  # consecutive
        elsewhere = run.progress.on_drives or run.progress.in_memory
        self._saved_at = self.step if run.progress.folder and not elsewhere else -1
        self._comm_bytes = run.comm_bytes()

    @property
    def has_news(self) -> bool:
        """Whether there is state that is in no checkpoint yet."""
        return self._saved_at != self.step and self.step > 0

    def train(self) -> Ended:
        """Train and return what came of it; the same event is emitted as the last one.

        Raises: NumericsError if the non-finite policy stops the run; SpikeError if it is to go back to an earlier step,
            which is noted by then; whatever the parts raise. Checkpoints stay.
        """
        run = self.run
        try:
            with StopSignals() if self._signals is None else nullcontext(self._signals) as signals:
                signals.announce = run.rank == 0
                signals.at_once = None if run.snapshots is None else run.snapshots.flush
                reason = self._loop(signals)
            ended = run.ended(self.step, reason, ok=True, tokens=self.tokens, productive_s=self.productive_s)
        except BaseException as error:
            text = str(error) or type(error).__name__
            run.events.emit(
                run.ended(
                    self.step, text, ok=False, tokens=self.tokens, productive_s=self.productive_s, collective=False
                )
            )
            raise
        run.events.emit(ended)
        self._let_snapshots_go(reason)
        if run.offload is not None:  # whoever goes on from here goes on from the checkpoint
            run.offload.finished = self._saved_at == self.step
        return ended

    def _loop(self, signals: StopSignals) -> str:
        run, train = self.run, self.run.config.train
        if self.step == 0:
            self._evaluate()
        self._began, self._first = time.perf_counter(), self.step
        stop, checkpoint = 0, run.config.checkpoint
        while self.step < train.steps and not stop:
            fault("step", rank=run.rank, step=self.step + 1)
            self._beat("step", self.step + 1)
            with run.profiler.step(self.step + 1) as window:
                self._one_step()
            if self.step == self._first + 1:
                run.reached("first_step")
            self._profiled(window)
            stop, all_ready = self._agree(signals.requested)
            self._snapshot(all_ready)
            last = self.step == train.steps
            if not stop and (last or (train.eval_every and self.step % train.eval_every == 0)):
                self._evaluate()
            if checkpoint.mode == "sync" and checkpoint.every and self.step % checkpoint.every == 0:
                self._save()
        if checkpoint.at_end:  # also when the last step was found on the drives, and nowhere else
            self._save()
        self._profiled(run.profiler.close(self.step))
        return signal.Signals(stop).name if stop else "done"

    def _one_step(self) -> None:
        run = self.run
        began = time.perf_counter()
        with run.tracer.span("data", "data"):
            first = run.loader.consumed
            batches = run.loader.next_step()
        data_s = time.perf_counter() - began
        rate = learning_rate(run.config.optimizer, run.config.lr_scheduler, self.step, run.config.train.steps)
        report = run.engine.train_step(batches, rate)
        self.step += 1
        self.tokens += report.tokens
        samples = (first, first + run.inputs.identity.global_batch)
        spike = run.spikes.observe(self.step, report.loss, samples)  # first: what it has seen is kept with the step
        run.commit_step(self.step, self.tokens)
        step_s = time.perf_counter() - began
        self.productive_s += 0.0 if report.skipped else step_s
        run.events.emit(self._stepped(report, rate, samples, step_s, data_s))
        if spike is not None:
            run.note_spike(spike)
            raise SpikeError(f"{spike.why}: going back to step {spike.at_most} or before")
        self._check_finite(report)

    def _stepped(
        self, report: StepReport, rate: float, samples: tuple[int, int], step_s: float, data_s: float
    ) -> Stepped:
        run = self.run
        positions = (samples[1] - samples[0]) * run.config.train.seq_len
        tokens_per_s = positions / step_s
        flops = run.flops_per_token * tokens_per_s / run.num_ranks
        memory = run.device.peak_bytes()
        comm_bytes = run.comm_bytes()
        spent, self._comm_bytes = comm_bytes - self._comm_bytes, comm_bytes
        per_step = (time.perf_counter() - self._began) / (self.step - self._first)
        return Stepped(
            step=self.step,
            loss=report.loss,
            bits_per_byte=bits_per_byte(report.loss, run.bytes_per_token),
            grad_norm=report.grad_norm,
            lr=rate,
            tokens=report.tokens,
            samples=samples,
            skipped=report.skipped,
            step_s=step_s,
            data_s=data_s,
            stall_s=report.stall_s,
            seconds=report.seconds,
            tokens_per_s=tokens_per_s,
            tflops=flops / 1e12,
            mfu=flops / run.peak_flops if run.peak_flops else 0.0,
            memory_peak_bytes=memory,
            memory_share=memory / run.device.total_bytes(),
            bytes_by_tier={tier: num_bytes for tier in run.tiers if (num_bytes := run.ledger.current(tier))},
            comm_bytes=spent,
            eta_s=per_step * (run.config.train.steps - self.step),
            lanes={
                lane: {"busy_s": c.busy_s, "stalled_s": c.stalled_s, "bytes": c.num_bytes}
                for lane, c in sorted(report.lanes.items())
            },
            snapshot={} if run.snapshots is None else run.snapshots.levels(),
        )

    def _check_finite(self, report: StepReport) -> None:
        optimizer = self.run.config.optimizer
        if not report.skipped:
            self._skips = 0
            return
        self._skips += 1
        what = f"loss {report.loss}, gradient norm {report.grad_norm}"
        if optimizer.nonfinite == "stop":
            raise NumericsError(
                f"step {self.step}: {what} and optimizer.nonfinite = 'stop'. The weights are those of the step before. "
                "Lower optimizer.lr, lengthen lr_scheduler.warmup_steps, or set optimizer.nonfinite=skip."
            )
        self._warn(f"{what}: step skipped, weights unchanged ({self._skips} in a row)")
        if self._skips >= optimizer.max_skips:
            raise NumericsError(
                f"step {self.step}: {what}; {self._skips} steps in a row were skipped (optimizer.max_skips = "
                f"{optimizer.max_skips}). The last checkpoint is intact. Lower optimizer.lr, or look at these samples."
            )

    def _profiled(self, window: Window) -> None:
        if window.files:
            self.run.events.emit(Profiled(self.step, window.files))
        if window.problem:
            self.run.events.warn(self.step, window.problem)

    def _warn(self, message: str) -> None:
        """Warn of something that every rank sees: once."""
        if self.run.rank == 0:
            self.run.events.warn(self.step, message)

    def _agree(self, requested: int) -> tuple[int, bool]:
        """Return the signal that any rank got, and whether every rank has room for a snapshot. Collective.

        Every rank then stops after the same step, and all take a snapshot or none: one that some lack protects nothing.
        """
        snapshots = self.run.snapshots
        busy = snapshots is not None and not snapshots.ready()
        flags = torch.tensor([requested, busy], dtype=torch.int64)
        self.run.world.all_reduce(flags, op="max", tag="control", label="stop? ready?").wait()
        return int(flags[0].item()), not flags[1].item()

    def _snapshot(self, all_ready: bool) -> None:
        run = self.run
        if run.snapshots is not None and run.snapshots.due(self.step):
            with run.tracer.span("snapshot", "phase"):
                run.snapshots.take(self.step, run.facts(self.step, self.tokens), all_ready=all_ready)
            self._tell_problems()

    def _tell_problems(self) -> None:
        """Warn of what went wrong beside training."""
        for problem in [] if self.run.snapshots is None else self.run.snapshots.problems():
            self.run.events.warn(self.step, problem)

    def _beat(self, phase: str, step: int) -> None:
        if self.run.snapshots is not None:
            self.run.snapshots.beat(phase, step)

    def _let_snapshots_go(self, reason: str) -> None:
        """Give snapshots up, unless they hold what is nowhere else and somebody may go on from."""
        run = self.run
        done = reason == "done" and not run.config.checkpoint.at_end
        if run.snapshots is None or not (done or self._saved_at == self.step):
            return
        try:
            run.snapshots.finish()
        except CheckpointError as error:
            run.events.warn(self.step, f"snapshots stay in memory for snapshot.lease_s: {error}")

    def _evaluate(self) -> None:
        run = self.run
        if run.validation is None:
            return
        self._beat("eval", self.step)
        began = time.perf_counter()
        with run.tracer.span("validation", "phase"):
            loss_sum, tokens = run.validation.evaluate(run.engine)
        if tokens:
            loss = loss_sum / tokens
            bits = bits_per_byte(loss, run.validation.bytes_per_token)
            run.events.emit(Evaluated(self.step, loss, bits, tokens, time.perf_counter() - began))

    def _save(self) -> None:
        run = self.run
        if self.step == self._saved_at:
            return
        self._beat("save", self.step)
        with run.tracer.span("checkpoint", "phase"):
            report = run.save(self.step, self.tokens)
        if report.ok:
            self._saved_at = self.step
            run.events.emit(Saved(self.step, str(report.folder), report.num_bytes, report.seconds))
        else:
            self._warn(f"CHECKPOINT NOT SAVED, training goes on: {report.reason}")
        for message in report.warnings:
            self._warn(message)
        self._tell_problems()


def bits_per_byte(loss: float, bytes_per_token: float) -> float | None:
    """Turn nats per token into bits per byte of text; None where the text is unknown.

    Invariant: comparable between tokenizers, which nats per token are not.
    """
    return loss / math.log(2) / bytes_per_token if bytes_per_token else None
