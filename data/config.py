"""Where training samples come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DataConfig:
    """Token folders written by `windlass data prepare`."""

    path: str | None = field(default=None, metadata={"help": "one prepared token folder"})
    mixture: list[dict[str, Any]] = field(
        default_factory=list, metadata={"help": "several token folders: a list of {path, weight}; instead of path"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the document order", "ge": 0})
    shuffle_window: int = field(
        default=16,
        metadata={
            "help": "row groups whose documents are shuffled together; each holds about 256K tokens",
            "unit": "row groups",
            "ge": 1,
        },
    )
    prefetch: int = field(default=2, metadata={"help": "micro-batches prepared ahead", "unit": "batches", "ge": 0})
