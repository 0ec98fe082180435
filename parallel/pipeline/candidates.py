"""The plans that a pipeline could have: one for every schedule and vocabulary algorithm that the policy leaves open.

Each is worked out in full: stages are cut, the vocabulary is shared out, costs are added up and a step is simulated.
Must not know: which of them is best.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from windlass.dist.errors import PlanError
from windlass.parallel.pipeline.builders import BUILDERS, build, num_stages, one_stage
from windlass.parallel.pipeline.costs import Costs, Part
from windlass.parallel.pipeline.cut import Blocks, Room, cut_blocks, ranges
from windlass.parallel.pipeline.model_costs import ModelCosts
from windlass.parallel.pipeline.passes import lower
from windlass.parallel.pipeline.planned import PipelinePlan
from windlass.parallel.pipeline.policy import ALGORITHMS, PipelineConfig
from windlass.parallel.pipeline.schedule import Layout, Schedule, load_schedule
from windlass.parallel.pipeline.simulate import simulate
from windlass.parallel.pipeline.timeline import peak_in_flight
from windlass.parallel.pipeline.verify import verify
from windlass.parallel.vocab.shard import VocabShard, cut_vocabulary


@dataclass(frozen=True)
class PipelineJob:
    """Everything that a plan follows from. See `plan.plan_pipeline`."""

    config: PipelineConfig
    num_ranks: int
    num_micro_batches: int
    vocab_size: int
    tied: bool
    lowering: dict[str, Any]
    costs: ModelCosts
    vocab_problem: str
    sequences: int

    @property
    def num_blocks(self) -> int:
        return len(self.costs.blocks)

    def choices(self) -> list[tuple[str, int]]:
        """Return the schedules and vocabulary algorithms that the policy leaves open; a file brings its own algorithm.

        Raises: PlanError if none is possible
        """
        name = self.config.schedule
        if self.num_ranks == 1:
            return [("one_stage", 0)]
        if name not in ("auto", *BUILDERS):
            return [(name, load_schedule(name).layout.vocab)]
        algorithms = self._algorithms()
        return [(name, vocab) for name in self._names() for vocab in algorithms]

    def plan(self, name: str, vocab: int) -> PipelinePlan:
        """Work out one choice.

        Raises: PlanError if it does not fit the model or the job
        """
        if name == "one_stage":
            return self._work_out(one_stage(self.num_micro_batches))
        if name not in BUILDERS:
            return self._work_out(self._from_file(name))
        p, m, chunks = self.num_ranks, self.num_micro_batches, self.config.chunks
        draft = build(name, p, m, vocab=vocab, chunks=chunks)
        if not vocab:
            return self._work_out(draft)
        shards = self._shards(draft.layout)
        costs = self._action_costs(draft.layout, self._cut(draft, shards), shards)
        return self._work_out(build(name, p, m, vocab=vocab, chunks=chunks, costs=costs))

    # -- what is to choose from ----------------------------------------------------------------------------------------

    def _names(self) -> list[str]:
        asked = self.config.schedule
        stages = {name: self._num_stages(name) for name in BUILDERS}
        if asked != "auto":
            if stages[asked] > self.num_blocks:
                fits = [name for name in BUILDERS if stages[name] <= self.num_blocks]
                ranks = self.num_blocks * self.num_ranks // stages[asked]
                ways = [f"pipeline.schedule={' or '.join(fits)}"]
                if asked == "interleaved" and (chunks := self.num_blocks // self.num_ranks) >= 2:
                    ways.append(f"pipeline.chunks={chunks}")
                if ranks > 1:
                    ways.append(f"parallelism.pp={ranks}{' or less' if ranks > 2 else ''}")
                raise PlanError(
                    f"pipeline.schedule = '{asked}' needs {stages[asked]} stages on {self.num_ranks} pipeline ranks, "
                    f"but the model has {self.num_blocks} blocks and every stage needs one. Use {', or '.join(ways)}"
                )
            return [asked]
        # GPipe takes as long as 1F1B and keeps more activations.
        names = [name for name in BUILDERS if name != "gpipe" and stages[name] <= self.num_blocks]
        if self.config.cut:
            names = [name for name in names if stages[name] == len(self.config.cut)]
            if not names:
                legal = sorted({count for count in stages.values() if count <= self.num_blocks})
                raise self._bad_cut(f"no schedule has {len(self.config.cut)} stages", legal)
        return names

    def _num_stages(self, name: str) -> int:
        return num_stages(name, self.num_ranks, self.config.chunks)

    def _algorithms(self) -> list[int]:
        asked = self.config.vocab
        wants_cut = bool(self.config.vocab_shares or self.config.vocab_chunk)
        if asked == "auto" and not wants_cut and (self.vocab_problem or self.vocab_size < self.num_ranks):
            return [0]
        algorithms = [ALGORITHMS[asked]] if asked != "auto" else [1, 2] if wants_cut else [0, 1, 2]
        if any(algorithms) and self.vocab_problem:
            keys = [key for key in ("vocab_shares", "vocab_chunk") if getattr(self.config, key)]
            also = f" without {' and '.join(f'pipeline.{key}' for key in keys)}" if keys else ""
            raise PlanError(self.vocab_problem + also)
        return algorithms

    def _check_reductions(self, schedule: Schedule, at: str) -> None:
        counts = Counter((action.place, action.kind) for row in schedule.ranks for action in row)
        for stage in range(schedule.layout.num_stages):
            backwards = counts[stage, "B"] + counts[stage, "W"]
            if counts[stage, "REDUCE"] != backwards:
                raise PlanError(
                    f"{at}: reduces stage {stage} {counts[stage, 'REDUCE']} times in {backwards} backwards; with "
                    "zero.stage = 2 or 3 a REDUCE follows each. Use zero.stage=1, or a file of compute actions only"
                )

    def _from_file(self, name: str) -> Schedule:
        schedule = load_schedule(name)
        layout, at = schedule.layout, f"pipeline.schedule = '{name}'"
        if layout.num_ranks != self.num_ranks:
            raise PlanError(
                f"{at}: is for {layout.num_ranks} pipeline ranks, the job has {self.num_ranks}. "
                f"Use parallelism.pp={layout.num_ranks}"
            )
        if schedule.num_micro_batches != self.num_micro_batches:
            batch = schedule.num_micro_batches * self.sequences
            raise PlanError(
                f"{at}: is for {schedule.num_micro_batches} micro-batches, a step of this job has "
                f"{self.num_micro_batches}. Use train.global_batch={batch or 'that many times what a micro-batch has'}"
            )
        if schedule.forward_only:
            raise PlanError(f"{at}: has forwards only. Give a schedule with backwards (B, or I and W)")
        if ALGORITHMS.get(self.config.vocab, layout.vocab) != layout.vocab:
            works = {number: name for name, number in ALGORITHMS.items()}[layout.vocab]
            raise PlanError(
                f"pipeline.vocab = '{self.config.vocab}': the schedule in '{name}' is made for {works}. "
                f"Use pipeline.vocab={works} or auto"
            )
        if layout.vocab and self.vocab_problem:
            raise PlanError(self.vocab_problem)
        if schedule.lowered and self.lowering["reduce"] == "each":
            self._check_reductions(schedule, at)
        try:
            verify(schedule)
        except PlanError as error:
            raise PlanError(f"{at}: {error}") from error
        return schedule

    # -- one plan ------------------------------------------------------------------------------------------------------

    def _work_out(self, schedule: Schedule) -> PipelinePlan:
        shards = self._shards(schedule.layout)
        counts = self._cut(schedule, shards)
        costs = self._action_costs(schedule.layout, counts, shards)
        lowering = self.lowering
        if schedule.lowered:  # by whoever wrote the file
            kinds = {action.kind for row in schedule.ranks for action in row}
            lowering = {**lowering, "gather": "run" if "GATHER" in kinds else "none", "recompute": "R" in kinds}
        complete = schedule if schedule.lowered else lower(schedule, **lowering)
        timeline = simulate(complete, costs)
        return PipelinePlan(
            schedule=complete,
            blocks=ranges(counts),
            shards=shards,
            tied=self.tied,
            vocab_chunk=self.config.vocab_chunk,
            lowering=lowering,
            why="as asked for",
            costs=costs,
            in_seconds=self.costs.in_seconds,
            step_s=timeline.total_s,
            idle=timeline.idle,
            in_flight=timeline.peak_in_flight,
            peak_bytes=timeline.peak_bytes,
        )

    def _shards(self, layout: Layout) -> tuple[VocabShard, ...]:
        if not layout.vocab:
            return ()
        return cut_vocabulary(self.vocab_size, self.num_ranks, self.config.vocab_shares or self.config.speeds or None)

    def _speeds(self) -> list[float]:
        return self.config.speeds or [1.0] * self.num_ranks

    def _cut(self, schedule: Schedule, shards: Sequence[VocabShard]) -> tuple[int, ...]:
        stages, cut = schedule.layout.num_stages, self.config.cut
        if cut:
            if len(cut) != stages:
                raise self._bad_cut(f"schedule {schedule.name} has {stages} stages", [stages])
            if sum(cut) != self.num_blocks:
                raise self._bad_cut(f"the model has {self.num_blocks} blocks, these are {sum(cut)}", [stages])
            return tuple(cut)
        if stages > self.num_blocks:
            raise PlanError(
                f"pipeline.schedule: {schedule.name} has {stages} stages, but the model has {self.num_blocks} blocks "
                f"and every stage needs one. Use a schedule of at most {self.num_blocks} stages"
            )
        blocks, rooms = self._blocks(), self._rooms(schedule, shards)
        try:
            return cut_blocks(blocks, rooms, self.costs.limit_bytes)
        except PlanError:  # an estimate before the order of actions is known; what the simulation holds decides
            return cut_blocks(blocks, rooms)

    def _bad_cut(self, why: str, stages: Sequence[int]) -> PlanError:
        even = [[n // s + (i < n % s) for i in range(s)] for n in [self.num_blocks] for s in stages]
        return PlanError(
            f"pipeline.cut = {list(self.config.cut)}: {why}. Use one number per stage that add up to "
            f"{self.num_blocks}, such as {' or '.join(map(str, even))}"
        )

    def _blocks(self) -> Blocks:
        again, parts = self.lowering["recompute"], self.costs.blocks
        rebuilt = [int(part.activation_bytes) if again else 0 for part in parts]
        return Blocks(
            tuple((1 + again) * part.forward_s + part.input_gradient_s + part.weight_gradient_s for part in parts),
            tuple(held + more for held, more in zip(self.costs.block_state_bytes, rebuilt, strict=True)),
            tuple(int(self.costs.hidden_bytes) if again else int(part.activation_bytes) for part in parts),
        )

    def _rooms(self, schedule: Schedule, shards: Sequence[VocabShard]) -> list[Room]:
        layout, costs, speeds = schedule.layout, self.costs, self._speeds()
        in_flight = [peak_in_flight(row) for row in schedule.ranks]
        rooms = []
        for stage, rank in enumerate(layout.stage_rank):
            mine = len(layout.stages_of(rank))
            seconds, held = 0.0, 0.0
            if shards:
                share = shards[rank].num_rows / self.vocab_size / mine
                seconds = share * (_seconds(costs.head) + _seconds(costs.embedding))
                held = share * (costs.head_state_bytes + costs.embedding_state_bytes)
            else:
                if stage == 0:
                    seconds += _seconds(costs.embedding)
                    held += costs.embedding_state_bytes
                if stage == layout.num_stages - 1:
                    seconds += _seconds(costs.whole_head)
                    held += self._head_bytes(layout) + in_flight[rank] / mine * costs.whole_head.activation_bytes
            rooms.append(Room(rank, speeds[rank], seconds, int(held), in_flight[rank] / mine))
        return rooms

    def _head_bytes(self, layout: Layout) -> float:
        """Return what the last stage holds for a head that is not cut."""
        copy = self.tied and layout.embed_rank != layout.head_rank
        return self.costs.head_state_bytes + self.costs.chunk_bytes + copy * self.costs.embedding_state_bytes

    def _action_costs(self, layout: Layout, counts: Sequence[int], shards: Sequence[VocabShard]) -> Costs:
        c, stages = self.costs, ranges(counts)
        parts = [sum(c.blocks[first + 1 : last], c.blocks[first]) for first, last in stages]
        costs = Costs.from_parts(
            layout,
            parts,
            head=c.head if shards else c.whole_head,
            embedding=c.embedding,
            hidden_bytes=c.hidden_bytes,
            statistics_bytes=c.statistics_bytes,
            speeds=self._speeds(),
            shares=[shard.num_rows / self.vocab_size for shard in shards] or None,
            recompute=self.lowering["recompute"],
            stream_scores=self.config.vocab_chunk > 0,
            num_shards=c.num_shards,
            freed_by_input_gradient=0.0,  # what W needs, inputs and gradients of outputs, is as much as there was
            latency_s=c.latency_s,
            bytes_per_s=c.bytes_per_s,
        )
        resident = [0.0] * layout.num_ranks
        for rank, (first, last) in zip(layout.stage_rank, stages, strict=True):
            resident[rank] += sum(c.block_state_bytes[first:last])
        if shards:
            for rank, shard in enumerate(shards):
                resident[rank] += shard.num_rows / self.vocab_size * (c.head_state_bytes + c.embedding_state_bytes)
        else:
            resident[layout.embed_rank] += c.embedding_state_bytes
            resident[layout.head_rank] += self._head_bytes(layout)
        if self.lowering["recompute"]:  # the input of every block is kept, not of every stage
            kept = tuple((last - first) * c.hidden_bytes for first, last in stages)
            costs = replace(costs, activation_bytes=kept)
        return replace(costs, resident_bytes=tuple(resident))


def _seconds(part: Part) -> float:
    return part.forward_s + part.input_gradient_s + part.weight_gradient_s
