"""Where a start goes on: in the memory of the nodes, at a checkpoint, or at the beginning; and which start it is.

Memory is asked first, because it is newest and reading it is cheap; checkpoints are only listed unless one is newer.
Must not know: how state is stored, cut or computed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from windlass.checkpoint.agree import Peers, on_all_ranks
from windlass.checkpoint.memory.generators import set_rng_state
from windlass.checkpoint.memory.inventory import STORAGE, Saved, choose
from windlass.checkpoint.storage import Place
from windlass.checkpoint.store import begin_generation as fence_storage
from windlass.checkpoint.store import damage, list_checkpoints
from windlass.dist.env import ProcessEnv, get
from windlass.dist.errors import CheckpointError
from windlass.launch.check_recovery import needs_process
from windlass.launch.control_log import ControlLog
from windlass.launch.resume import Identity, Progress, changes, check_model_settings, check_order
from windlass.launch.resume_memory import Found, find_in_memory
from windlass.launch.run_folder import RunFolder
from windlass.launch.snapshots import Snapshots
from windlass.launch.start import Restorable, find_checkpoint_to_resume, go_on, step_of

if TYPE_CHECKING:
    from windlass.launch.job import JobConfig


@dataclass(frozen=True)
class Start:
    """Which start of the workers this is. `restarted`: one that follows a failure, whatever the user asked for first.

    `skips`: samples that are left out; `at_most`: go on from no later step than this; `left`: by generation the step it
    went on from, so that what earlier ones hold beyond it is of a past that the run has left.
    """

    generation: int = 0
    restarted: bool = False
    skips: tuple[tuple[int, int], ...] = ()
    at_most: int | None = None
    left: Mapping[int, int] = field(default_factory=dict)


def is_restart(config: JobConfig, env: ProcessEnv) -> bool:
    """Tell whether the launcher has started this job before in the same launch."""
    if env.generation:
        return ControlLog(Path(config.train.run_dir)).restarted()
    return int(get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def begin_generation(config: JobConfig, env: ProcessEnv, world: Peers) -> Start:
    """Return which start this is; without a controller that counts them, rank 0 does where snapshots need it.

    Collective: every rank of the world
    """

    def read() -> list[Any]:
        if world.rank != 0:
            return []
        log = ControlLog(Path(config.train.run_dir))
        counted = needs_process(config.snapshot.every, config.checkpoint.mode)
        generation = env.generation
        if not generation and counted:
            generation = log.bump(by=env.launcher)
        left = [[g, step] for g, step in log.left().items()]
        return [generation, is_restart(config, env), [list(skip) for skip in log.skips()], log.limit(), left]

    generation, restarted, skips, at_most, left = on_all_ranks(world, read).check()[0]
    return Start(generation, restarted, tuple((first, stop) for first, stop in skips), at_most, dict(left))


def note_recovered(config: JobConfig, env: ProcessEnv) -> None:
    """Note that a run that went back is under way again, where no controller does."""
    if not env.generation:
        ControlLog(Path(config.train.run_dir)).append("recovered")


@dataclass(frozen=True)
class Origin:
    """What a start goes on from: nothing, copies in memory or on local drives, or a checkpoint."""

    checkpoint: Place | None = None
    memory: Found | None = None
    step: int = -1
    passed_over: list[str] = field(default_factory=list)

    @property
    def found(self) -> bool:
        return self.checkpoint is not None or self.memory is not None

    @property
    def in_memory(self) -> tuple[int, int] | None:
        """Generation and step of the snapshot that must be kept until a newer one is protected."""
        if self.memory is None or self.memory.choice.tier == STORAGE:
            return None
        return self.memory.choice.generation, self.memory.step

    @property
    def anchor(self) -> tuple[int, int] | None:
        """Generation and step of the newest snapshot that is protected, kept until a newer one is."""
        return None if self.memory is None else self.memory.anchor

    def restore(self, config: JobConfig, identity: Identity, engine: Restorable, world: Peers) -> Progress:
        """Fill the engine and return where the run stands.

        Collective: every rank of the world
        """
        if self.memory is None:
            return go_on(config, identity, engine, world, self.checkpoint, self.passed_over)
        began = time.perf_counter()
        back = self.memory.restore(engine, world)
        if back.tier == STORAGE:  # what memory held proved damaged
            return go_on(config, identity, engine, world, back.place, back.passed_over)
        where = f"{back.tier} snapshot of generation {back.generation}"
        check_order(back.extra, identity, where)
        check_model_settings(back.extra, config, where)
        engine.optimizer_steps = back.extra["optimizer_steps"]
        if back.own_facts.get("rng"):
            set_rng_state(back.own_facts["rng"])
        return Progress(
            back.extra["step"],
            back.extra["consumed"],
            back.extra["tokens"],
            where,
            time.perf_counter() - began,
            [*back.passed_over, *back.repaired],
            changes(back.extra, config, world.size),
            in_memory=True,
        )


def find_origin(
    config: JobConfig, folder: RunFolder, world: Peers, snapshots: Snapshots | None, start: Start
) -> Origin:
    """Decide where this start goes on.

    Collective: every rank of the world
    Raises: CheckpointError if there are checkpoints and none is valid; ConfigError if the run would overwrite some
    """
    wish = "auto" if start.restarted else config.checkpoint.resume
    root: Place = config.checkpoint.url or folder.checkpoints
    if snapshots is None or wish != "auto":
        checkpoint, damaged = find_checkpoint_to_resume(wish, root, world, at_most=start.at_most)
        return Origin(checkpoint, None, -1 if checkpoint is None else step_of(checkpoint), damaged)
    saved, damaged = _listed(root, world, start.generation), []
    while True:
        memory = find_in_memory(
            world,
            snapshots.client,
            snapshots.folder,
            speaks=snapshots.speaks,
            saved=saved,
            at_most=start.at_most,
            left=start.left,
            local_dir=Path(config.checkpoint.local_dir) if config.checkpoint.local_dir else None,
            timeout_s=config.snapshot.peer_timeout_s,
        )
        if memory is not None and memory.choice.tier != STORAGE:
            return Origin(None, memory, memory.step, [*damaged, *memory.passed_over])
        best, passed_over = choose((), {}, saved, at_most=start.at_most, left=start.left)
        if best is None:
            if damaged:
                raise CheckpointError(
                    f"no checkpoint in '{root}' is valid and memory holds nothing ({'; '.join(damaged)}). Starting at "
                    "step 0 would overwrite them: give another train.run_dir, or remove them."
                )
            return Origin(passed_over=passed_over)
        problem = damage(best.place, world)
        if not problem:
            return Origin(best.place, None, best.step, [*damaged, *([] if memory is None else memory.passed_over)])
        damaged.append(f"{Path(best.place).name}: {problem}")
        saved = [s for s in saved if s.place != best.place]


def _listed(root: Place, world: Peers, generation: int) -> list[Saved]:
    """Fence off what older generations may still publish, and list what there is. Collective."""

    def look() -> list[Any]:
        if world.rank != 0:
            return []
        fence_storage(root, generation)
        infos = list_checkpoints(root)
        return [
            [i.step, str(i.folder), int(i.extra.get("generation", 0))] for i in infos if not i.problem and not i.hidden
        ]

    return [Saved(*entry) for entry in on_all_ranks(world, look).check()[0]]
