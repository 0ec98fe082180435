"""Where a generation goes on: the step it was restored at, and what of its history need not be written again.

Must not know: who found it, cadences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Base:
    """`step`: where training goes on, 0 at the beginning. `durable`: by level its newest step at or before that which
    belongs to the history that goes on; a level that has none is left out.
    """

    step: int = 0
    durable: Mapping[str, int] = field(default_factory=dict)

    def dump(self) -> dict[str, Any]:
        """Write it as JSON."""
        return asdict(self)

    @staticmethod
    def parse(values: Mapping[str, Any]) -> Base:
        """Read what came as JSON.

        Raises: KeyError, TypeError or ValueError when it is something else
        """
        return Base(int(values["step"]), {str(level): int(step) for level, step in dict(values["durable"]).items()})
