"""Where a start goes on: in the memory of the nodes, at a checkpoint, or at the beginning.

Memory is asked first, because it is newest and reading it is cheap; checkpoints are only listed unless one is newer.
Must not know: how state is stored, cut or computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from windlass.checkpoint.agree import Peers, on_all_ranks
from windlass.checkpoint.memory.base import Base
from windlass.checkpoint.memory.generators import set_rng_state
from windlass.checkpoint.memory.inventory import LOCAL, STORAGE, Saved, choose, void
from windlass.checkpoint.reader import read_manifest
from windlass.checkpoint.storage import Place, storage_of
from windlass.checkpoint.store import begin_generation as fence_storage
from windlass.checkpoint.store import damage, find_checkpoint, list_checkpoints, restore_set_aside
from windlass.dist.errors import CheckpointError, ConfigError
from windlass.launch.generation import Start, checkpoints_of
from windlass.launch.resume import Identity, Progress, changes, check_model_settings, check_order
from windlass.launch.resume_memory import Found, find_in_memory
from windlass.launch.snapshots import Snapshots
from windlass.launch.start import Restorable, go_on

if TYPE_CHECKING:
    from windlass.launch.job import JobConfig


@dataclass(frozen=True)
class Origin:
    """What a start goes on from: nothing, copies in memory or on local drives, or a checkpoint."""

    checkpoint: Place | None = None
    memory: Found | None = None
    step: int = -1
    passed_over: list[str] = field(default_factory=list)
    after: Callable[[], Origin] | None = None  # what comes next where memory proves damaged
    own: bool = True  # this run has made it; else the user has named it
    base_at: Callable[[int], Base] = Base  # says of the step at which the run stands what is durable there

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
            return go_on(config, identity, engine, world, self.checkpoint, self.passed_over, own=self.own)
        began = time.perf_counter()
        back = self.memory.restore(engine, world)
        if back.tier == STORAGE:
            assert self.after is not None
            origin = self.after()
            if not origin.found:  # the engine was built to be filled
                raise CheckpointError(f"no step can be restored: {'; '.join([*back.passed_over, *origin.passed_over])}")
            return go_on(config, identity, engine, world, origin.checkpoint, [*back.passed_over, *origin.passed_over])
        where = f"{back.tier} snapshot of generation {back.generation}"
        check_order(back.extra, identity, where)
        check_model_settings(back.extra, config, where)
        engine.optimizer_steps = back.extra["optimizer_steps"]
        if back.own_facts.get("rng"):
            set_rng_state(back.own_facts["rng"])
        return Progress.of(
            back.extra,
            where,
            time.perf_counter() - began,
            passed_over=[*back.passed_over, *back.repaired],
            changes=changes(back.extra, config, world.size),
            in_memory=True,
        )


def find_origin(config: JobConfig, world: Peers, snapshots: Snapshots | None, start: Start) -> Origin:
    """Decide where this start goes on.

    Collective: every rank of the world
    Raises: CheckpointError if there are checkpoints and none is valid, or none old enough for a rollback; ConfigError
        if the run would overwrite some
    """
    return _Search(config, world, snapshots, start).run()


class _Search:
    """The newest state that belongs to the history that goes on and that can be read, over all places."""

    def __init__(self, config: JobConfig, world: Peers, snapshots: Snapshots | None, start: Start) -> None:
        self.config, self.world, self.snapshots, self.start = config, world, snapshots, start
        self.root, self.wish = checkpoints_of(config), config.checkpoint.resume
        self.saved: list[Saved] = []
        self.damaged: list[str] = []  # checkpoints that cannot be used, and why
        self.notes: list[str] = []  # other newer steps that cannot, and why
        self.checked: set[str] = set()
        self.memory: Found | None = None

    def run(self) -> Origin:
        """Search as the user asked for, and after a restart first among what this launch has made."""
        if self.wish != "auto" and not self.start.restarted:
            return self._given()
        self.saved = self._listed()
        origin = self._newest()
        if not origin.found:
            origin = origin if self.wish == "auto" else self._given()
            self._check_way_back(max(origin.step, 0))
        return origin

    def _check_way_back(self, base: int) -> None:
        """Refuse to begin again at `base` where a rollback was to find a checkpoint that is gone.

        A run that went back before the first one was due begins again as a matter of course.
        """
        checkpoint, left = self.config.checkpoint, self.start.left
        if not self.saved or not left:  # a restart that finds no checkpoint at all has nothing to overwrite
            return
        at_most = left[max(left)]
        if any(every and at_most // every > base // every for every in (checkpoint.every, checkpoint.local_every)):
            oldest = min(self.saved, key=lambda saved: saved.step)
            raise CheckpointError(
                f"the loss jumped, so the run goes back to step {at_most} or before, and '{self.root}' has nothing "
                f"that old: its oldest checkpoint is of step {oldest.step}. Starting at step {base} would overwrite "
                f"it. To go on from it as it is, set checkpoint.resume={oldest.place} in another train.run_dir; to "
                "begin anew, use one without it. Keep more checkpoints (checkpoint.keep) from then on."
            )

    def _newest(self) -> Origin:
        config = self.config
        while self.snapshots is not None:
            memory = find_in_memory(
                self.world,
                self.snapshots.client,
                self.snapshots.folder,
                speaks=self.snapshots.speaks,
                saved=self.saved,
                left=self.start.past,
                local_dir=Path(config.checkpoint.local_dir) if config.checkpoint.local_dir else None,
                timeout_s=config.snapshot.peer_timeout_s,
            )
            if memory is None:
                break
            self.memory = memory
            if memory.choice.tier != STORAGE:
                notes = [*self.damaged, *memory.passed_over]
                return Origin(None, memory, memory.step, notes, self.from_storage, base_at=self._base_at)
            self._note(memory.passed_over)
            if memory.choice.step < 0 or self._whole(memory.choice.place):
                break
        return self.from_storage()

    def from_storage(self) -> Origin:
        """Return the newest checkpoint that is whole. Collective: every rank of the world"""
        while True:
            best, passed_over = choose((), {}, self.saved, left=self.start.past)
            if best is None:
                self._note(passed_over)
                if self.damaged and self.wish == "auto":
                    raise CheckpointError(
                        f"no checkpoint in '{self.root}' is valid ({'; '.join(self.damaged)}). Starting at step 0 "
                        "would overwrite them: give another train.run_dir, or remove them."
                    )
                return Origin(passed_over=[*self.damaged, *self.notes])
            if self._whole(best.place):
                return Origin(best.place, None, best.step, [*self.damaged, *self.notes], base_at=self._base_at)

    def _base_at(self, step: int) -> Base:
        """Say what the history that goes on has that is durable, now that the run stands at a step."""
        saved = [s for s in self.saved if s.step <= step]
        found = {STORAGE: choose((), {}, saved, left=self.start.past)[0]}
        if self.memory is not None:
            found[LOCAL] = self.memory.on_drives(step)
        return Base(step, {level: choice.step for level, choice in found.items() if choice is not None})

    def _note(self, texts: Sequence[str]) -> None:
        self.notes += [text for text in texts if text not in self.notes]

    def _whole(self, place: str) -> bool:
        """Read a checkpoint together; one that is damaged is not considered again."""
        if place in self.checked:
            return True
        problem = damage(place, self.world)
        if not problem:
            self.checked.add(place)
            return True
        self.damaged.append(f"{Path(place).name}: {problem}")
        self.saved = [s for s in self.saved if s.place != place]
        return False

    def _listed(self) -> list[Saved]:
        """Fence off what older generations may still publish, and list what there is. Collective."""
        start = self.start

        def look() -> list[Any]:
            if self.world.rank != 0:
                return []
            if start.generation:
                fence_storage(self.root, start.generation)
            else:
                restore_set_aside(storage_of(self.root))
            found = list_checkpoints(self.root)
            return [
                [i.step, str(i.folder), int(i.extra.get("generation", 0)), i.problem or "", bool(i.hidden)]
                for i in found
            ]

        saved = []
        for step, place, generation, problem, hidden in on_all_ranks(self.world, look).check()[0]:
            if generation < start.since:
                continue
            if not problem and not hidden:
                saved.append(Saved(step, place, generation))
            elif hidden:
                self._note([f"{Path(place).name}: {problem}"])
            else:
                self.damaged.append(f"{Path(place).name}: {problem}")
        return saved

    def _given(self) -> Origin:
        """Return the checkpoint that the user names, or none.

        Raises: ConfigError if the run would overwrite newer ones
        """
        # What a rollback of this launch has left nobody goes on from: it may be overwritten.
        left = self.start.left if self.start.restarted else {}

        def look() -> dict[str, Any]:
            if self.world.rank != 0:
                return {}
            kept = [i for i in list_checkpoints(self.root) if not void(i.generation, i.step, left)]
            own = [info.step for info in kept]
            if self.wish == "never":
                return {"folder": "", "step": -1, "own": own}
            found = find_checkpoint(self.wish if "://" in self.wish else Path(self.wish).resolve())
            return {"folder": str(found), "step": read_manifest(found).step, "own": own}

        found = on_all_ranks(self.world, look).check()[0]
        newer = [step for step in found["own"] if step > max(found["step"], 0)]
        if newer:
            raise ConfigError(
                f"checkpoint.resume = '{self.wish}': '{self.root}' has a checkpoint of step {max(newer)}, which would "
                "be overwritten. Use checkpoint.resume=auto to go on from it, or give another train.run_dir."
            )
        durable = {STORAGE: found["step"]} if found["folder"] else {}
        return Origin(
            found["folder"] or None,
            None,
            found["step"],
            [*self.damaged],
            own=False,
            base_at=lambda step: Base(step, durable),
        )
