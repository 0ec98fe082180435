"""The one stream in which a run tells what happens; log lines, JSON lines and TensorBoard are views of it.

Must not know: files, terminals, how an event comes about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol


@dataclass(frozen=True)
class Event:
    """Something that happened after `step` finished steps (0: before the first)."""

    kind: ClassVar[str]
    step: int


@dataclass(frozen=True)
class Started(Event):
    """The machine is built and training begins."""

    kind = "start"
    total_steps: int
    num_parameters: int
    world_size: int
    devices: str
    global_batch: int  # sequences per step
    seq_len: int
    seconds: dict[str, float]  # start-up phases
    versions: dict[str, str]


@dataclass(frozen=True)
class Resumed(Event):
    """State came back from a checkpoint; steps after `step` in the same metrics file are void."""

    kind = "resume"
    folder: str
    consumed: int  # samples
    seconds: float
    passed_over: list[str] = field(default_factory=list)  # newer checkpoints that could not be used, and why
    changes: list[str] = field(default_factory=list)  # what differs from the run that saved, and is harmless


@dataclass(frozen=True)
class Stepped(Event):
    """One optimizer step.

    Units:      loss in nats per token with a label; tokens_per_s counts all positions of all ranks; tflops and mfu are
                of the model's floating-point operations, per rank
    """

    kind = "step"
    loss: float
    bits_per_byte: float | None
    grad_norm: float
    lr: float
    tokens: int  # with a label, over all ranks
    samples: tuple[int, int]  # [first, last) of the global order
    skipped: bool
    step_s: float
    data_s: float  # waiting for input
    stall_s: float  # waiting for peers
    seconds: dict[str, float]  # phases
    tokens_per_s: float
    tflops: float
    mfu: float
    memory_peak_bytes: int  # of the process so far, rank 0
    memory_share: float
    bytes_by_tier: dict[str, int]
    comm_bytes: int  # received by this rank in this step
    eta_s: float
    lanes: dict[str, dict[str, float]] = field(default_factory=dict)  # busy_s, stalled_s, bytes of each lane of tiers
    # newest step held by each level (ram, peers, local, storage), snapshots skipped, seconds that training waited
    snapshot: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluated(Event):
    """The loss on the validation split."""

    kind = "eval"
    loss: float
    bits_per_byte: float | None
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Saved(Event):
    """A checkpoint was written."""

    kind = "checkpoint"
    folder: str
    num_bytes: int
    seconds: float


@dataclass(frozen=True)
class Profiled(Event):
    """The profiler window closed."""

    kind = "profile"
    files: list[str]


@dataclass(frozen=True)
class Warned(Event):
    """Something went wrong and training goes on."""

    kind = "warning"
    message: str
    rank: int = 0


@dataclass(frozen=True)
class Ended(Event):
    """The last event of a start, whether it finished, was stopped or failed."""

    kind = "exit"
    reason: str  # "done", "SIGTERM", or the error
    ok: bool
    tokens: int
    seconds: float
    goodput: float  # share of the seconds spent in steps that changed the weights
    peak_bytes: dict[str, int] = field(default_factory=dict)  # by tier, worst rank
    predicted_bytes: dict[str, int] = field(default_factory=dict)  # by class of state, worst rank
    measured_bytes: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


class Sink(Protocol):
    """A view of the stream."""

    def write(self, event: Event) -> None:
        """Show or store one event.

        Raises: OSError if it cannot be stored now; the sink keeps what it can and is offered the next event too.
        """

    def close(self) -> None:
        """Store what is left."""


class EventStream:
    """Hands every event to every sink; one that fails (disk full) is reported once and never stops a run."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = list(sinks)
        self.warnings: list[str] = []
        self._failed: set[int] = set()

    def emit(self, event: Event) -> None:
        if isinstance(event, Warned):
            self.warnings.append(f"step {event.step}: {event.message}")
        news = []
        for index, sink in enumerate(self.sinks):
            try:
                sink.write(event)
                self._failed.discard(index)
            except OSError as error:
                if index not in self._failed:
                    news.append(
                        f"{type(sink).__name__} cannot write '{error.filename}': {error.strerror}. Free some space."
                    )
                self._failed.add(index)
        for message in news:
            self.emit(Warned(event.step, message))

    def warn(self, step: int, message: str) -> None:
        self.emit(Warned(step, message))

    def close(self) -> None:
        for sink in self.sinks:
            try:
                sink.close()
            except OSError as error:
                self.warnings.append(f"{type(sink).__name__}: {error.strerror}; its last events are lost")
