"""Jumps of the loss: when a run goes back to an earlier step, and which samples it then leaves out.

Every rank sees the same losses and comes to the same verdict. Must not know: how state is restored, who restarts.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from windlass.dist.errors import NumericsError
from windlass.launch.control_log import ControlLog
from windlass.launch.recovery import RecoveryConfig

if TYPE_CHECKING:
    from windlass.launch.job import JobConfig


@dataclass(frozen=True)
class RollBack:
    """Go back to step `at_most` or before, and leave out the samples [first, stop) from then on."""

    at_most: int
    first: int
    stop: int
    why: str


def note_spike(back: RollBack, config: JobConfig, generation: int) -> None:
    """Note in the control log what the next start is to leave out, and from which step it may go on at most.

    Raises:  NumericsError if it has happened too often
    """
    log, attempts = ControlLog(Path(config.train.run_dir), generation), config.recovery.spike_attempts
    if log.num_rollbacks() >= attempts:
        raise NumericsError(
            f"{back.why}. The run went back {attempts} times already (recovery.spike_attempts): lower optimizer.lr, "
            f"look at samples {back.first} to {back.stop - 1}, or raise recovery.spike_factor"
        )
    log.append("skip", first=back.first, last=back.stop)
    log.append("rollback", step=back.at_most, why=back.why)


class SpikeWatch:
    """Compares each loss with the median of those before it.

    A loss that is not finite is a jump too. The samples left out are those of the last `spike_back` steps up to the
    jump: the update that did the harm came from one of them.
    """

    def __init__(self, config: RecoveryConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._samples: deque[tuple[int, int]] = deque(maxlen=config.spike_back + 1)

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
