"""How a run starts: that all ranks mean the same job, from which checkpoint or weights, and whether it may go on.

Must not know: how state is stored, cut or computed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

import torch

from windlass.checkpoint.agree import Peers
from windlass.checkpoint.reader import read_manifest
from windlass.checkpoint.restore import restore
from windlass.checkpoint.storage import Place
from windlass.dist.errors import PlanError
from windlass.dist.rng import fill_normal
from windlass.dist.state import StateSource
from windlass.launch.resume import Identity, Progress, changes, check_model_settings, check_order
from windlass.model.build import Fill
from windlass.model.protocol import BlockModel

if TYPE_CHECKING:
    from windlass.launch.job import JobConfig


class Restorable(StateSource, Protocol):
    """What resuming needs of an engine beside its tensors."""

    optimizer_steps: int


def check_same(world: Peers, facts: Mapping[str, Any]) -> None:
    """Raise PlanError on every rank unless all ranks have equal facts, naming the first path that differs.

    Collective: every rank of the world
    """
    text = json.dumps(facts, sort_keys=True, default=str)
    heard = world.gather_objects(text)
    for rank, other in enumerate(heard):
        if other != heard[0]:
            path, first, theirs = first_difference(json.loads(heard[0]), json.loads(other))
            raise PlanError(
                f"ranks 0 and {rank} were started with different jobs: {path} is {first!r} on rank 0 and {theirs!r} on "
                f"rank {rank}. Start every rank with the same command, files and versions."
            )


def first_difference(a: Any, b: Any, path: str = "") -> tuple[str, Any, Any]:
    """Return the first path at which two JSON values differ, and both values there."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            if a.get(key) != b.get(key):
                return first_difference(a.get(key), b.get(key), f"{path}.{key}" if path else key)
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            if x != y:
                return first_difference(x, y, f"{path}[{index}]")
    return path, a, b


def go_on(
    config: JobConfig,
    identity: Identity,
    engine: Restorable,
    world: Peers,
    folder: Place | None,
    passed_over: list[str],
    *,
    own: bool = True,
) -> Progress:
    """Restore the engine from a checkpoint and return where the run stands; without one, at step 0. `own`: of this run.

    Collective: every rank of the world
    """
    if folder is None:
        return Progress(passed_over=passed_over)
    began = time.perf_counter()
    check_order(read_manifest(folder).extra, identity, str(folder))
    extra = restore(folder, engine, world)
    check_model_settings(extra, config, str(folder))
    engine.optimizer_steps = extra["optimizer_steps"]
    return Progress.of(
        extra,
        str(folder),
        time.perf_counter() - began,
        passed_over=passed_over,
        changes=changes(extra, config, world.size),
        own=own,
    )


def go_on_from_drives(config: JobConfig, engine: Restorable, world: Peers, extra: Mapping[str, Any]) -> Progress:
    """Return where the run stands whose state was found whole on the drives."""
    check_model_settings(extra, config, "state on nvme")
    engine.optimizer_steps = extra["optimizer_steps"]
    changed = changes(extra, config, world.size)
    return Progress.of(extra, "state on nvme", changes=changed, on_drives=True)


def start_values(config: JobConfig, model: BlockModel, stack: ExitStack) -> Fill:
    """Return what gives parameters their first values: a Hugging Face folder, or streams keyed by parameter name."""
    if config.model.hf_folder:
        from windlass.model.hf_read import HfReader

        reader = HfReader(config.model.hf_folder, config.model)
        stack.callback(reader.close)
        return reader.fill
    return initial_values(model, config.train.seed)


def initial_values(model: BlockModel, seed: int) -> Fill:
    """Return what writes any range of any parameter's starting values, the same for every layout."""

    def fill(name: str, start: int, stop: int, out: torch.Tensor) -> None:
        init = model.init(name)
        if init.kind == "normal":
            fill_normal(out, seed=seed, name=name, start=start, std=init.std)
        else:
            out.fill_(1.0 if init.kind == "ones" else 0.0)

    return fill


def to_be_restored(name: str, start: int, stop: int, out: torch.Tensor) -> None:
    """Give a parameter no value worth computing: a checkpoint overwrites it."""
    out.zero_()
