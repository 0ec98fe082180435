"""How a run goes on after a failure: restarts, fewer or other nodes, hangs, jumps of the loss. Only the keys."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RecoveryConfig:
    """What is tried before a run is given up."""

    max_restarts: int = field(
        default=0,
        metadata={
            "help": "how often workers are started again after a failure (0: the run ends with it); torchrun and Slurm "
            "start theirs themselves, whatever this and the other keys for it say",
            "ge": 0,
        },
    )
    min_workers: int = field(
        default=0,
        metadata={"help": "go on with as few workers as this when nodes are lost (0: never with fewer)", "ge": 0},
    )
    replace_s: float = field(
        default=30.0,
        metadata={
            "help": "with Ray: how long to wait for another node before shrinking (a node of one machine never comes "
            "back)",
            "unit": "s",
            "ge": 0,
        },
    )
    grow_s: float = field(
        default=0.0,
        metadata={
            "help": "with Ray: how often a run on fewer workers looks for nodes to grow again (0: only after a "
            "failure)",
            "unit": "s",
            "ge": 0,
        },
    )
    hang_s: float = field(
        default=60.0,
        metadata={
            "help": "a step that takes this long, and 5 times the usual, is a hang: stacks are written and workers "
            "killed",
            "unit": "s",
            "gt": 0,
        },
    )
    start_s: float = field(
        default=600.0, metadata={"help": "the same for start, validation and saving", "unit": "s", "gt": 0}
    )
    grace_s: float = field(
        default=30.0,
        metadata={
            "help": "with a controller or snapshots, from SIGTERM to the end: what is not durable by then is dropped",
            "unit": "s",
            "gt": 0,
        },
    )
    crash_loops: int = field(
        default=2,
        metadata={"help": "failures in a row without a new step that end the run: data or code is suspect", "ge": 1},
    )
    node_failures: int = field(default=3, metadata={"help": "failures of one node that exclude it", "ge": 1})
    window_s: float = field(
        default=86400.0,
        metadata={
            "help": "failures this long before the newest one count no more for max_restarts, node_failures and "
            "crash_loops (0: all count for ever)",
            "unit": "s",
            "ge": 0,
        },
    )
    fork_server: bool = field(
        default=True,
        metadata={"help": "fork workers from a process that has imported everything, for quicker restarts"},
    )
    spike_factor: float = field(
        default=0.0,
        metadata={
            "help": "a loss of this many times the median, or one that is not finite, goes back and skips the batches "
            "(0: never)",
            "ge": 0,
        },
    )
    spike_window: int = field(
        default=20,
        metadata={"help": "steps whose median the loss is compared with", "unit": "steps", "ge": 3, "le": 2000},
    )
    spike_back: int = field(
        default=1, metadata={"help": "go back at least this far before the jump", "unit": "steps", "ge": 1, "le": 1000}
    )
    spike_attempts: int = field(default=2, metadata={"help": "jumps after which the run ends", "ge": 1})
