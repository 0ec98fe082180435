"""When and where training state is saved."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of a run live in `RUN/checkpoints/step-XXXXXXXX/`."""

    every: int = field(default=0, metadata={"help": "save every n steps; 0: only at the end", "unit": "steps", "ge": 0})
    keep: int = field(default=3, metadata={"help": "newest checkpoints kept (0: all)", "ge": 0})
    at_end: bool = field(default=True, metadata={"help": "save when training ends or is asked to stop"})
    resume: str = field(
        default="auto",
        metadata={"help": "auto: newest valid checkpoint of the run folder if any; never; or a checkpoint folder"},
    )
