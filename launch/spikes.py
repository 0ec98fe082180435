"""Jumps of the loss: when a run goes back to an earlier step, and which samples it then leaves out.

Every rank sees the same losses and comes to the same verdict. What the verdict rests on is kept with the state, so that
a run that was started again decides as if it had not been. Must not know: how state is restored, who restarts.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from windlass.checkpoint.agree import Peers, on_all_ranks
from windlass.dist.errors import NumericsError
from windlass.launch.control_log import ControlLog
from windlass.launch.recovery import RecoveryConfig

if TYPE_CHECKING:
    from windlass.launch.generation import Start
    from windlass.launch.job import JobConfig
    from windlass.launch.resume import Progress


@dataclass(frozen=True)
class RollBack:
    """Go back to step `at_most` or before, and leave out the samples [first, stop) from then on."""

    at_most: int
    first: int
    stop: int
    why: str


def note_spike(back: RollBack, config: JobConfig, generation: int, world: Peers) -> None:
    """Note in the control log what the next start is to leave out, and from which step it may go on at most.

    Collective: every rank of the world
    Invariant:  no rank returns before the note is durable: once one has ended, a launcher may kill the others
    Raises:     NumericsError on every rank if it has happened too often
    """

    def note() -> str:
        if world.rank != 0:
            return ""
        log, attempts = ControlLog(Path(config.train.run_dir), generation), config.recovery.spike_attempts
        if log.num_rollbacks() >= attempts:
            return (
                f"{back.why}. The run went back {attempts} times already (recovery.spike_attempts): lower "
                f"optimizer.lr, look at samples {back.first} to {back.stop - 1}, or raise recovery.spike_factor"
            )
        # One record: a crash between two would leave the samples out and keep the step that they spoiled.
        log.append("rollback", step=back.at_most, first=back.first, last=back.stop, why=back.why)
        return ""

    refusal = on_all_ranks(world, note).check()[0]
    if refusal:
        raise NumericsError(refusal)


class SpikeWatch:
    """Compares each loss with the median of those before it.

    A loss that is not finite is a jump too. The samples left out are those of the last `spike_back` steps up to the
    jump: the update that did the harm came from one of them.
    """

    def __init__(self, config: RecoveryConfig, began: int = 0) -> None:
        self._config, self._began = config, began
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._samples: deque[tuple[int, int]] = deque(maxlen=config.spike_back + 1)

    @classmethod
    def resumed(cls, config: RecoveryConfig, progress: Progress, start: Start) -> SpikeWatch:
        """Go on where the run stands. State that was saved without these facts has an empty window."""
        watch = cls(config, progress.step)
        watch._losses.extend(progress.rollback.get("losses", ()))
        # Right after a rollback, and at state of another run, there need be nothing older to go back to.
        if progress.own and progress.generation > max(start.left, default=-1):
            watch._samples.extend((first, stop) for first, stop in progress.rollback.get("samples", ()))
        return watch

    def facts(self) -> dict[str, Any]:
        """Return what is kept with the state of the last step that was observed; JSON-able.

        `back` and `began` are for retention: how far this run may go back, and at which step its generation began.
        """
        if not self._config.spike_factor:
            return {}
        return {
            "back": self._config.spike_back,
            "began": self._began,
            "losses": list(self._losses),
            "samples": [list(samples) for samples in self._samples],
        }

    def observe(self, step: int, loss: float, samples: tuple[int, int]) -> RollBack | None:
        """Look at the loss of the step that made `step` finished steps out of these samples."""
        config = self._config
        if not config.spike_factor:
            return None
        self._samples.append(samples)
        full = len(self._losses) == config.spike_window
        usual = median(self._losses) if self._losses else math.inf
        if not math.isfinite(loss) or (full and loss > config.spike_factor * usual):
            first = self._samples[0][0]
            # The state before the first of these samples was used.
            at_most = max(step - len(self._samples), 0)
            why = f"loss {loss:.4g} at step {step}, the median of {len(self._losses)} steps before is {usual:.4g}"
            return RollBack(at_most, first, samples[1], why)
        self._losses.append(loss)
        return None
