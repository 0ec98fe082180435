"""When and where training state is kept: in memory of this node and its peers, on local drives, on shared storage."""

from __future__ import annotations

from dataclasses import dataclass, field

MIB = 1 << 20


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of a run live in `RUN/checkpoints/step-XXXXXXXX/`, or at `url`."""

    every: int = field(default=0, metadata={"help": "save every n steps; 0: only at the end", "unit": "steps", "ge": 0})
    keep: int = field(default=3, metadata={"help": "newest checkpoints kept (0: all)", "ge": 0})
    at_end: bool = field(default=True, metadata={"help": "save when training ends or is asked to stop"})
    resume: str = field(
        default="auto",
        metadata={
            "help": "auto: newest step of the run that is whole in memory, on drives or in a checkpoint, if any; "
            "never; or a checkpoint's folder or URL"
        },
    )
    mode: str = field(
        default="sync",
        metadata={
            "help": "sync: training waits until the checkpoint is durable; async: until it is copied to host memory; "
            "lazy: it is copied during the next forward and backward. With async and lazy the snapshot process writes",
            "choices": ("sync", "async", "lazy"),
        },
    )
    url: str = field(
        default="",
        metadata={"help": "where checkpoints go instead of the run folder, as fsspec writes it (s3://bucket/run)"},
    )
    local_every: int = field(
        default=0,
        metadata={
            "help": "the snapshot process of every node keeps its snapshots in checkpoint.local_dir every n steps "
            "(0: never)",
            "unit": "steps",
            "ge": 0,
        },
    )
    local_dir: str = field(default="", metadata={"help": "folder on a drive of each node, for checkpoint.local_every"})
    bandwidth_bytes_per_s: float = field(
        default=0.0,
        metadata={
            "help": "what a node may write to storage while training goes on (0: no limit)",
            "unit": "bytes/s",
            "ge": 0,
        },
    )


@dataclass(frozen=True)
class SnapshotConfig:
    """Copies of the training state in the memory of the nodes, held by a process beside training.

    Source: Lian et al. 2024, arXiv:2406.10707 (lazy copies); arXiv:2310.12670 (snapshot process, parity).
    """

    every: int = field(
        default=0, metadata={"help": "take a snapshot into memory every n steps (0: none)", "unit": "steps", "ge": 0}
    )
    slots: int = field(
        default=2,
        metadata={
            "help": "snapshots that a node has room for; one is filled while another is kept. With 2 none is taken "
            "while a checkpoint is written from one of them, with 3 they go on",
            "ge": 2,
            "le": 4,
        },
    )
    redundancy: str = field(
        default="none",
        metadata={
            "help": "what survives the loss of a node: none; replica: whole copies in other nodes; xor: parity, one "
            "node of a group may go; reed_solomon: snapshot.parity nodes of a group may go",
            "choices": ("none", "replica", "xor", "reed_solomon"),
        },
    )
    group: int = field(
        default=0, metadata={"help": "nodes that protect each other (0: as many as fit, at most 8)", "ge": 0}
    )
    parity: int = field(
        default=1,
        metadata={"help": "further copies (replica) or parity blocks (reed_solomon) of a group", "ge": 1, "le": 8},
    )
    folder: str = field(default="/dev/shm", metadata={"help": "file system in memory that holds snapshots"})
    bucket_bytes: int = field(
        default=16 * MIB, metadata={"help": "copied from the device at a time", "unit": "bytes", "ge": 64 << 10}
    )
    chunk_bytes: int = field(
        default=MIB, metadata={"help": "bytes under one checksum", "unit": "bytes", "ge": 4 << 10, "le": 32 * MIB}
    )
    link_bytes_per_s: float = field(
        default=0.0,
        metadata={"help": "pace of copies and of parity between nodes (0: no limit)", "unit": "bytes/s", "ge": 0},
    )
    lease_s: float = field(
        default=1800.0,
        metadata={"help": "snapshots outlive a run that ended badly by this long", "unit": "s", "gt": 0},
    )
    peer_timeout_s: float = field(
        default=10.0, metadata={"help": "how long a snapshot process waits for another", "unit": "s", "gt": 0}
    )
