"""The job: one dataclass per group of keys, each from the layer it configures, and the table of all keys.

Nothing is read or checked here; `config.py` reads, `check.py` checks. Must not know: YAML, files, the command line.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from windlass.checkpoint.policy import CheckpointConfig, SnapshotConfig
from windlass.data.config import DataConfig
from windlass.dist.cluster import ClusterConfig
from windlass.dist.mesh import ParallelismConfig
from windlass.launch.local import LaunchConfig
from windlass.launch.metrics import MetricsConfig
from windlass.launch.profiler import ProfilerConfig
from windlass.launch.recovery import RecoveryConfig
from windlass.model.config import ModelConfig
from windlass.model.loss import LossConfig
from windlass.offload.policy import OffloadConfig
from windlass.parallel.activation import ActivationConfig
from windlass.parallel.optim import OptimizerConfig, ScheduleConfig
from windlass.parallel.pipeline.policy import PipelineConfig
from windlass.parallel.precision import PrecisionConfig
from windlass.parallel.zero import ZeroConfig

SIZE_PATTERN = r"(\d+(?:\.\d+)?) ?([kmgtKMGT])(i?)B"  # 80GB or 64 GiB, wherever a key counts bytes


@dataclass(frozen=True)
class TrainConfig:
    """How long, on how much data per step, and where the run is written."""

    steps: int = field(default=1000, metadata={"help": "optimizer steps of the run", "unit": "steps", "ge": 1})
    seed: int = field(default=0, metadata={"help": "seed of the initial weights", "ge": 0})
    seq_len: int = field(default=1024, metadata={"help": "tokens of one sequence", "unit": "tokens", "ge": 2})
    micro_batch: int = field(
        default=1, metadata={"help": "sequences per rank in one forward and backward", "unit": "sequences", "ge": 1}
    )
    global_batch: int = field(
        default=0,
        metadata={
            "help": "sequences per step over all ranks; more than micro_batch x data-parallel ranks accumulates "
            "gradients (0: exactly that product)",
            "unit": "sequences",
            "ge": 0,
        },
    )
    eval_every: int = field(
        default=0, metadata={"help": "validate every n steps (0: only before and after)", "unit": "steps", "ge": 0}
    )
    eval_batches: int = field(
        default=8,
        metadata={
            "help": "size of one validation in batches of train.micro_batch sequences, shared out over all ranks",
            "unit": "batches",
            "ge": 1,
        },
    )
    run_dir: str = field(
        default="runs/default", metadata={"help": "folder of the run; an earlier run in it is resumed"}
    )
    device: str = field(
        default="auto",
        metadata={"help": "where to compute (auto: cuda if there is one)", "choices": ("auto", "cpu", "cuda")},
    )

    def num_micro_batches(self, data_ranks: int) -> int:
        """Return how many micro-batches each of `data_ranks` ranks accumulates per step."""
        return self.global_batch // (self.micro_batch * data_ranks) if self.global_batch else 1


@dataclass(frozen=True)
class JobConfig:
    """Everything a user can say about a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: ScheduleConfig = field(default_factory=ScheduleConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    activation: ActivationConfig = field(default_factory=ActivationConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    snapshot: SnapshotConfig = field(default_factory=SnapshotConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    profiler: ProfilerConfig = field(default_factory=ProfilerConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


@dataclass(frozen=True)
class Key:
    """One key of a job: its dotted path, type, default and metadata (help, unit, choices, gt, ge, lt, le)."""

    path: str
    type: Any  # the annotation without `| None`
    optional: bool
    default: Any
    metadata: Mapping[str, Any]

    @property
    def group(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def choices(self) -> tuple[Any, ...]:
        return tuple(self.metadata.get("choices", ()))

    @property
    def is_dict(self) -> bool:
        return get_origin(self.type) is dict


@dataclass(frozen=True)
class Loaded:
    """A job as it was read.

    `origins` says for every key where its value comes from: "default", "preset FILE:LINE", "FILE:LINE" or "override".
    `given` holds the keys to which the user gave a value that differs from what default and preset say already: asking
    for what is the case anyway is never an unused setting, so a resolved configuration loads again.
    """

    config: JobConfig
    origins: Mapping[str, str]
    given: frozenset[str]
    source: str

    def value(self, path: str) -> Any:
        return value_at(self.config, path)

    def at(self, path: str) -> str:
        """Return "key = value (where)", the way every message about a key begins."""
        origin = self.origins[path]
        where = "" if origin in ("default", "override") else f" ({origin})"
        return f"{path} = {show_value(self.value(path))}{where}"


@cache
def job_keys() -> Mapping[str, Key]:
    """Return every key of a job by path, in the order of the dataclasses."""
    return {key.path: key for key in _keys(JobConfig, "")}


@cache
def job_groups() -> Mapping[str, type]:
    """Return the dataclass of every group of keys by path."""
    return dict(_groups(JobConfig, ""))


def _keys(kind: type, prefix: str) -> list[Key]:
    hints = get_type_hints(kind)
    keys: list[Key] = []
    for f in fields(kind):
        path, hint = prefix + f.name, hints[f.name]
        if is_dataclass(hint):
            keys += _keys(hint, path + ".")  # type: ignore[arg-type]  # is_dataclass also accepts instances
        else:
            inner, optional = _without_none(hint)
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            keys.append(Key(path, inner, optional, default, f.metadata))
    return keys


def _groups(kind: type, prefix: str) -> list[tuple[str, type]]:
    hints = get_type_hints(kind)
    groups: list[tuple[str, type]] = []
    for f in fields(kind):
        if is_dataclass(hints[f.name]):
            groups.append((prefix + f.name, hints[f.name]))
            groups += _groups(hints[f.name], f"{prefix}{f.name}.")
    return groups


def _without_none(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) in (Union, types.UnionType):
        members = [m for m in get_args(hint) if m is not type(None)]
        return members[0], len(members) < len(get_args(hint))
    return hint, False


def value_at(config: JobConfig, path: str) -> Any:
    """Return the value of a key by its dotted path."""
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def show_value(value: Any) -> str:
    """Write a value the way it is written in YAML on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(show_value(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {show_value(v)}" for k, v in value.items()) + "}"
    return f"'{value}'" if isinstance(value, str) else str(value)
