"""From the plan of a run to the tiers of one rank, and whether the drives already hold a step to go on from.

Must not know: how anything is moved, what state means.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from windlass.checkpoint.agree import Peers
from windlass.dist.device import Device
from windlass.dist.env import ProcessEnv
from windlass.dist.trace import Tracer
from windlass.launch.run_folder import RunFolder
from windlass.offload.ledger import Limit, TierLedger
from windlass.offload.machine import Drives, OffloadMachine
from windlass.offload.placement import OffloadPlan

if TYPE_CHECKING:
    from windlass.launch.job import JobConfig


@dataclass(frozen=True)
class WholeStep:
    """A step that all ranks hold whole on their drives, with what was noted with it."""

    step: int
    extra: Mapping[str, Any]


def tier_limits(config: JobConfig) -> dict[str, Limit]:
    """Return the budgets of one rank by tier."""
    offload = config.offload
    budgets = {"device": offload.device_bytes, "host": offload.host_bytes, "nvme": offload.nvme_bytes}
    return {tier: Limit(num_bytes, f"offload.{tier}_bytes") for tier, num_bytes in budgets.items() if num_bytes}


def build_machine(
    config: JobConfig,
    plan: OffloadPlan | None,
    *,
    env: ProcessEnv,
    device: Device,
    ledger: TierLedger,
    tracer: Tracer,
    warn: Callable[[str], None],
    timeline: str,
    checkpoint_step: int,
    restarted: bool = False,
) -> OffloadMachine | None:
    """Build what holds the state of this rank that is not on its device; None if all of it is.

    `timeline` is that of the run folder; -1 as `checkpoint_step`: there is no checkpoint.
    Raises:  TierOutOfMemory if a budget is too small; OffloadError if a drive cannot be used
    """
    if plan is None:
        return None
    cluster, offload = config.cluster, config.offload
    # Another run folder or number of ranks has other state; the layout of the file is compared besides.
    place = f"{Path(config.train.run_dir).resolve()} {env.world_size}"
    drives = Drives(
        paths=cluster.nvme_paths,
        weights=cluster.nvme_weights,
        identity=hashlib.sha256(place.encode()).hexdigest()[:16],
        rank=env.rank,
        resume=restarted or config.checkpoint.resume == "auto",
        timeline=timeline,
        after=checkpoint_step,
    )
    adam = offload.adam if offload.adam != "auto" else cluster.cpu_adam
    return OffloadMachine(
        plan,
        replace(offload, adam=adam),
        device=device,
        ledger=ledger,
        tracer=tracer,
        drives=drives,
        warn=warn,
    )


def read_timeline(folder: RunFolder, world: Peers) -> str:
    """Return the name of the succession of starts that this run folder is at; empty if there is none yet.

    A start that does not go on from the drives begins a new one (`begin_timeline`): what they hold from before is of a
    past that this run has left, however high its steps.
    Collective: every rank of the world
    """
    found = folder.timeline.read_text().strip() if world.rank == 0 and folder.timeline.is_file() else ""
    return str(world.gather_objects(found)[0])


def begin_timeline(folder: RunFolder, world: Peers) -> str:
    """Name a new succession of starts and note it in the run folder.

    Collective: every rank of the world
    """
    name = secrets.token_hex(8) if world.rank == 0 else ""
    if world.rank == 0:
        partial = folder.timeline.with_name(f"{folder.timeline.name}.tmp-{os.getpid()}")
        partial.write_text(name + "\n")
        partial.replace(folder.timeline)
    return str(world.gather_objects(name)[0])


def adopt_newest(
    machine: OffloadMachine | None, world: Peers, checkpoint_step: int, admits: Callable[[int, int], bool]
) -> WholeStep | None:
    """Go on from what is on the drives if all ranks hold one step whole that is newer than the latest checkpoint.

    `admits(generation, step)`: whether it belongs to the history that goes on.

    Collective: every rank of the world
    """
    mine = {} if machine is None else machine.whole_steps()
    told = world.gather_objects(sorted(s for s, extra in mine.items() if admits(extra.get("generation", 0), s)))
    common = set.intersection(*(set(steps) for steps in told))
    step = max(common, default=-1)
    chosen = step if step > checkpoint_step else None
    if machine is not None:
        machine.adopt(chosen)
    return None if chosen is None else WholeStep(chosen, mine[chosen])
