"""Which of the exits of a generation's workers is the one to decide about, as a failure of the job.

Must not know: what is decided, what is written down.
"""

from __future__ import annotations

from collections.abc import Sequence

from windlass.dist.errors import ConfigError, DataError, ModelError, NumericsError, PlanError
from windlass.launch.decide import Failed
from windlass.launch.failure import Exit, order_failures
from windlass.launch.fleet import Seating

MISTAKES = tuple(kind.exit_code for kind in (ConfigError, PlanError, DataError, ModelError, NumericsError))


def blame(exits: Sequence[Exit], seating: Seating, generation: int, *, step: int, restored: int | None) -> Failed:
    """Return what failed first in a generation whose workers did not all end well; `step`, `restored`: see Failed."""
    cause = order_failures(exits)[0]
    known = not cause.secondary and cause.kind != "start"
    return Failed(
        generation=generation,
        kind=cause.kind or "worker",
        step=step,
        message=cause.message,
        node=seating.nodes[cause.rank] if known else "",
        rank=cause.rank,
        exit_code=cause.exit_code,
        repeats=cause.exit_code in MISTAKES and not cause.kind,
        time=min(ended.when for ended in exits if ended.code != 0),
        restored=restored,
    )
