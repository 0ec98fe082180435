"""Resuming from what the nodes hold: all ranks hear what is there, make the same choice, and read what they need.

A step that proves damaged beyond repair while it is read is passed over on all ranks, and the next best is taken. Every
wait has a deadline; a node that does not answer counts as lost.
Must not know: segments, parity, how state is cut.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from windlass.checkpoint.agree import Peers, on_all_ranks
from windlass.checkpoint.memory.client import SnapshotClient
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.inventory import LOCAL, STORAGE, Choice, Held, Saved, anchor, choose
from windlass.checkpoint.memory.layout import Layout
from windlass.checkpoint.memory.membership import Membership
from windlass.checkpoint.memory.peers import kept_moves
from windlass.checkpoint.memory.settings import Settings
from windlass.checkpoint.memory.source import MemorySource, kept_layouts, manifest_of
from windlass.checkpoint.memory.survey import Report, Survey
from windlass.checkpoint.restore import restore
from windlass.dist.env import fault
from windlass.dist.errors import CheckpointError
from windlass.dist.state import StateSource

NOTHING = Choice(-1, 0, STORAGE)


@dataclass(frozen=True)
class Resumed:
    """What was restored, and how long it took; `tier` "storage": nothing was, `place` is where to go on instead.

    Units: seconds by phase
    """

    step: int
    generation: int
    tier: str
    place: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    own_facts: dict[str, Any] = field(default_factory=dict)  # of this rank in a world of the same size; may be empty
    seconds: dict[str, float] = field(default_factory=dict)
    passed_over: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)


@dataclass
class _Heard:
    """What the nodes said: copies, memberships by generation, and which rank speaks for a node."""

    holdings: list[Held]
    worlds: dict[int, Membership]
    speakers: dict[str, int]
    silent: list[str]


class Found:
    """A step that can be restored. Tier "storage" where a checkpoint is newer, with step -1 where nothing is left."""

    def __init__(self, heard: _Heard, survey: Survey, saved: Sequence[Saved], left: Mapping[int, int]) -> None:
        self._heard, self._survey, self._saved, self._left = heard, survey, saved, left
        self.seconds: dict[str, float] = {}
        self.passed_over = list(heard.silent)
        self.choice = self._choose()

    @property
    def step(self) -> int:
        return self.choice.step

    @property
    def anchor(self) -> tuple[int, int] | None:
        """Generation and step of the snapshot that is kept beside the chosen one until a newer one is protected."""
        return anchor(self._heard.holdings, self.choice)

    def on_drives(self, at_most: int) -> Choice | None:
        """Return the newest step at or before one that local drives alone would give back."""
        held = [h for h in self._heard.holdings if h.tier == LOCAL and h.step <= at_most]
        return choose(held, self._heard.worlds, left=self._left)[0]

    def _choose(self) -> Choice:
        choice, passed_over = choose(self._heard.holdings, self._heard.worlds, self._saved, left=self._left)
        self.passed_over += [text for text in passed_over if text not in self.passed_over]
        return choice or NOTHING

    def restore(self, engine: StateSource, world: Peers) -> Resumed:
        """Fill the engine from the chosen step, or from the next best one if that proves damaged.

        Collective: every rank of the world
        Raises: CheckpointError on every rank if nothing is left that could be restored
        """
        while self.choice.tier != STORAGE:
            reach = self._survey.reach()
            source = MemorySource(
                self.choice,
                self._heard.worlds[self.choice.generation],
                reach,
                rank=world.rank,
                timeout_s=self._survey.timeout_s,
            )
            try:
                return self._restore(source, engine, world)
            except CheckpointError as error:
                self._pass_over(source, world, error)
            finally:
                source.close()
                reach.close()
        if self.choice.step < 0:
            raise CheckpointError(
                f"no step can be restored: {'; '.join(self.passed_over)}. Start at the beginning with "
                "checkpoint.resume=never in another train.run_dir"
            )
        choice = self.choice
        return Resumed(choice.step, choice.generation, STORAGE, choice.place, passed_over=self.passed_over)

    def _restore(self, source: MemorySource, engine: StateSource, world: Peers) -> Resumed:
        began = time.perf_counter()
        choice, members = source.choice, source.world
        layouts = self._layouts(source, world)
        facts: dict[str, Any] = {}
        own: dict[str, Any] = {}

        def read_facts() -> None:
            nonlocal facts, own
            facts = source.any_facts()
            own = (source.facts(world.rank) or {}) if members.world_size == world.size else {}
            fault("restore.load", rank=world.rank, step=choice.step)

        on_all_ranks(world, read_facts).check()
        read = time.perf_counter()
        manifest = manifest_of(layouts, choice.step, facts.get("extra", {}))
        remedy = (
            "It is what memory still holds of an earlier job in this run folder. Remove it on every node with "
            f"`windlass snapshot gc {self._run_folder()} --stop`, or give another train.run_dir"
        )
        extra = restore(source, engine, world, verify=False, manifest=manifest, remedy=remedy)
        repaired = dict.fromkeys(text for told in world.gather_objects(source.repaired) for text in told)
        seconds = {**self.seconds, "plan": read - began, "load": time.perf_counter() - read}
        return Resumed(
            choice.step,
            choice.generation,
            choice.tier,
            extra=extra,
            own_facts=own,
            seconds=seconds,
            passed_over=self.passed_over,
            repaired=[*repaired],
        )

    def _run_folder(self) -> str:
        with contextlib.suppress(CheckpointError):  # damaged
            return Settings.read_from(self._survey.folder).run_folder or "RUN"
        return "RUN"

    def _layouts(self, source: MemorySource, world: Peers) -> list[Layout]:
        """Tell all ranks what the bytes of every rank mean: each node that of its own ranks, then what it can."""
        members, speakers = source.world, self._heard.speakers
        every = {m.layout for m in members.members}
        documents = self._documents({m.layout for m in members.members if speakers.get(m.node) == world.rank}, world)
        if every - documents.keys():
            documents |= self._documents(every - documents.keys(), world)
        try:
            found = {digest: Layout.parse(text.encode(), digest) for digest, text in documents.items()}
            return kept_layouts(found, members)
        except CheckpointError as error:  # whatever is left of this generation cannot be read
            source.blame({h: str(error) for h in self._heard.holdings if h.generation == members.generation})
            raise

    def _documents(self, wanted: set[str], world: Peers) -> dict[str, str]:
        """Tell all ranks those of the layouts wanted here that this node, or one that was asked, has."""

        def read() -> dict[str, str]:
            found = {digest: self._survey.layout(digest) for digest in sorted(wanted)}
            return {digest: text for digest, text in found.items() if text}

        speaks = world.rank in self._heard.speakers.values()
        told = on_all_ranks(world, lambda: read() if speaks else {}).check()
        return {digest: text for part in told for digest, text in part.items()}

    def _pass_over(self, source: MemorySource, world: Peers, error: CheckpointError) -> None:
        """Count the copies that some rank could not read as lost, and choose anew.

        Raises: `error` if no copy is to blame
        """
        copies = self._heard.holdings  # in the same order on all ranks
        told = world.gather_objects([str(error), [[copies.index(held), why] for held, why in source.bad.items()]])
        bad = {index: why for _, part in told for index, why in part}
        if not bad:
            raise error
        self.passed_over.append(f"{source.choice}: {told[0][0]}")
        self._heard.holdings = [held.damaged(bad[index]) if index in bad else held for index, held in enumerate(copies)]
        self.choice = self._choose()


def find_in_memory(
    world: Peers,
    client: SnapshotClient,
    folder: NodeFolder,
    *,
    speaks: bool,
    saved: Iterable[Saved] = (),
    left: Mapping[int, int] | None = None,
    local_dir: Path | None = None,
    timeout_s: float = 10.0,
) -> Found | None:
    """Hear what the nodes hold and choose the newest step that can be restored; None if they hold nothing.

    One rank of every node `speaks` for it, through the `client` of its snapshot process. Nodes of earlier generations
    that have no rank now are asked too. For `saved` and `left` see `inventory.choose`.

    Collective: every rank of the world
    Blocks: host, at most about twice `timeout_s`
    """
    began = time.perf_counter()
    survey = Survey(client, folder, local_dir, timeout_s)
    heard = _hear(world, survey, speaks)
    if not heard.holdings:
        return None
    found = Found(heard, survey, tuple(saved), dict(left or {}))
    found.seconds["inventory"] = time.perf_counter() - began
    fault("restore.plan", rank=world.rank, step=found.step)
    return found


def _hear(world: Peers, survey: Survey, speaks: bool) -> _Heard:
    reports = on_all_ranks(world, lambda: survey.report() if speaks else {}).check()
    speakers = {report["node"]: rank for rank, report in enumerate(reports) if report}
    worlds = _worlds(reports, survey.folder.job)
    absent = _absent(worlds, speakers, survey.folder)
    asked = on_all_ranks(world, lambda: survey.ask(absent) if world.rank == 0 else []).check()[0]
    everybody = [report for report in [*reports, *asked] if report]
    return _Heard(
        holdings=sorted({Held(*row) for report in everybody for row in report["holdings"]}),
        worlds=worlds | _worlds(asked, survey.folder.job),
        speakers=speakers,
        silent=[f"{report['node']} is not counted: {report['problem']}" for report in everybody if report["problem"]],
    )


def _worlds(reports: Sequence[Report], job: str) -> dict[int, Membership]:
    """Return the memberships of this job by generation."""
    documents = {int(g): text for report in reports if report for g, text in report["memberships"].items()}
    out = {}
    for generation, text in sorted(documents.items()):
        with contextlib.suppress(CheckpointError):  # damaged: that generation has none then
            found = Membership.parse(text, f"membership of generation {generation}")
            if (found.job, found.generation) == (job, generation):
                out[generation] = found
    return out


def _absent(
    worlds: Mapping[int, Membership], speakers: Mapping[str, int], folder: NodeFolder
) -> list[tuple[str, str, int]]:
    """Return the nodes of earlier generations that have no rank now, each where it was last as far as is known here."""
    last = {}
    for _, world in sorted(worlds.items()):
        moves = kept_moves(folder, world)
        for node in world.nodes:
            last[node] = (node, *(moves[node][:2] if node in moves else world.address_of(node)))
    return [address for node, address in sorted(last.items()) if node not in speakers]
