"""What a checkpoint says about the run that wrote it, and whether the present run may go on from there.

A resumed run must see exactly the samples that the uninterrupted one would have seen; anything else that differs is
either harmless, and said, or an error before the first step. Must not know: tensors, files.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

import windlass
from windlass.dist.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from windlass.launch.job import JobConfig

# Settings of the model that change neither a tensor nor what is computed from it.
HARMLESS_MODEL_KEYS = {"preset", "hf_folder", "init_std", "loss_chunk_tokens"}
REQUIRED = ("step", "consumed", "tokens", "optimizer_steps", "order", "model")


@dataclass(frozen=True)
class Progress:
    """Where a run stands when its loop begins."""

    step: int = 0
    consumed: int = 0  # samples, over all ranks
    tokens: int = 0  # with a label, over all ranks
    folder: str = ""  # the checkpoint it came from
    seconds: float = 0.0
    passed_over: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    on_drives: bool = False  # found whole on the drives, and in no checkpoint
    in_memory: bool = False  # found in the memory of the nodes or on their local drives, and in no checkpoint
    own: bool = True  # this run has made it; else the user has named it
    generation: int = 0  # that made it
    rollback: Mapping[str, Any] = field(default_factory=dict)  # what a verdict on the next loss rests on

    @staticmethod
    def of(extra: Mapping[str, Any], folder: str, seconds: float = 0.0, **facts: Any) -> Progress:
        """Return where a run stands that goes on from state saved with these facts."""
        return Progress(
            extra["step"],
            extra["consumed"],
            extra["tokens"],
            folder,
            seconds,
            generation=int(extra.get("generation", 0)),
            rollback=extra.get("rollback", {}),
            **facts,
        )


@dataclass(frozen=True)
class Identity:
    """What decides the order of samples, and where tokens come from."""

    global_batch: int
    seq_len: int
    data_seed: int
    shuffle_window: int
    data_digest: str
    tokenizer_digest: str
    tokenizer_folder: str

    @property
    def order(self) -> dict[str, Any]:
        return {
            "train.global_batch": self.global_batch,
            "train.seq_len": self.seq_len,
            "data.seed": self.data_seed,
            "data.shuffle_window": self.shuffle_window,
            "data digest": self.data_digest,
        }


def versions() -> dict[str, str]:
    """Return the versions that a bug report needs."""
    return {"windlass": windlass.__version__, "torch": str(torch.__version__), "python": platform.python_version()}


def layout_of(config: JobConfig, world_size: int) -> dict[str, Any]:
    """Return how state was cut and what was computed with it; free to differ on resume."""
    return {
        "world size": world_size,
        "zero.stage": config.zero.stage,
        "parallelism.pp": config.parallelism.pp,
        "parallelism.dp_replicate": config.parallelism.dp_replicate,
        "precision.param": config.precision.param,
        "train.micro_batch": config.train.micro_batch,
        "train.steps": config.train.steps,
        "optimizer.name": config.optimizer.name,
        "optimizer.lr": config.optimizer.lr,
        "lr_scheduler.kind": config.lr_scheduler.kind,
        **{f"loss.{key}": value for key, value in asdict(config.loss).items()},
    }


def checkpoint_extra(
    config: JobConfig,
    identity: Identity,
    world_size: int,
    *,
    step: int,
    consumed: int,
    tokens: int,
    optimizer_steps: int,
    generation: int = 0,
    rollback: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what a checkpoint carries beside tensors; JSON-able."""
    return {
        "step": step,
        "consumed": consumed,
        "tokens": tokens,
        "optimizer_steps": optimizer_steps,
        "generation": generation,
        "order": identity.order,
        "tokenizer": {"digest": identity.tokenizer_digest, "folder": identity.tokenizer_folder},
        "model": asdict(config.model),
        "layout": layout_of(config, world_size),
        "versions": versions(),
        **({"rollback": dict(rollback)} if rollback else {}),
    }


def check_order(extra: Mapping[str, Any], identity: Identity, folder: str) -> None:
    """Refuse a checkpoint after which this job would see other samples than the run that saved it.

    Raises: ConfigError naming the key; CheckpointError if the checkpoint was not written by a training run
    """
    missing = [key for key in REQUIRED if key not in extra]
    if missing:
        raise CheckpointError(
            f"checkpoint '{folder}' has no {', '.join(missing)}: it was not written by a training run, so there is no "
            "step to go on from. Give another folder as checkpoint.resume."
        )
    for key, now in identity.order.items():
        saved = extra["order"].get(key)
        if saved != now:
            raise ConfigError(_order_message(key, saved, now, folder))


def check_model_settings(extra: Mapping[str, Any], config: JobConfig, folder: str) -> None:
    """Refuse a checkpoint whose tensors fit but mean another model.

    Raises: ConfigError naming the key
    """
    for key, now in asdict(config.model).items():
        saved = extra["model"].get(key, now)
        if key not in HARMLESS_MODEL_KEYS and saved != now:
            raise ConfigError(
                f"model.{key} = {now!r}: checkpoint '{folder}' was written with {saved!r}, which is another model. "
                f"Set model.{key}={saved}, or train the new model in another train.run_dir."
            )


def changes(extra: Mapping[str, Any], config: JobConfig, world_size: int) -> list[str]:
    """Return what differs from the run that saved and may."""
    before = extra.get("layout", {})
    return [
        f"{key} was {before[key]}, is {now}"
        for key, now in layout_of(config, world_size).items()
        if key in before and before[key] != now
    ]


def _order_message(key: str, saved: Any, now: Any, folder: str) -> str:
    message = f"{key} = {now}: checkpoint '{folder}' was written with {saved}"
    if key == "train.global_batch":
        return (
            f"{message}, and the position in the data and the learning-rate schedule count steps of that size. Set "
            f"train.global_batch={saved} (any number of ranks that divides it will do; gradients accumulate), or start "
            "in another train.run_dir."
        )
    if key == "data digest":
        return f"{message}: these are other tokens. Give the same data as data.path, or start in another train.run_dir."
    return f"{message}, and samples would differ from there on. Set {key}={saved}, or start in another train.run_dir."
