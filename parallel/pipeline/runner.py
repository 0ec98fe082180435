"""Executes one rank's list of actions: the one engine for every schedule, a single stage included.

Compute actions wait for what they need; communication actions only begin something. What is received, handed over
between stages of one rank, or still to be sent is kept here by action; what autograd needs is the walk's.
Must not know: how schedules are made, ZeRO stages, optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from windlass.data.batch import Batch
from windlass.dist.errors import PlanError
from windlass.dist.trace import Tracer
from windlass.parallel.pipeline.action import KINDS, Action
from windlass.parallel.pipeline.channels import Arriving, Channels
from windlass.parallel.pipeline.schedule import Schedule
from windlass.parallel.pipeline.vocabulary_passes import VocabularyPasses
from windlass.parallel.unit import Unit
from windlass.parallel.walk import Walk

BEFORE_GATHER = 1  # parts of the model that one stage ahead counts as: fetched, but not gathered yet
BACKWARD = ("B", "W")  # after these a stage's gradients of a micro-batch are whole


@dataclass(frozen=True)
class _Orders:
    """One rank's list with what it takes to execute it."""

    schedule: Schedule
    actions: tuple[Action, ...]
    completing: frozenset[Action]  # backwards after which a reduction is scheduled: it may begin inside them
    last_of: dict[int, list[int]]  # position -> micro-batches that no later action of this rank names
    gathered_next: dict[Action, Action]  # gather -> the one after it, for which slow tiers can begin already


class Runner:
    """Runs micro-batches through the stages of one rank as a schedule says.

    `context` makes what the parts need besides h, once per micro-batch. `width` is that of the hidden states.
    """

    def __init__(
        self,
        rank: int,
        walks: Mapping[int, Walk],
        channels: Channels,
        vocabulary: VocabularyPasses | None,
        *,
        context: Callable[[Batch], Any],
        width: int,
        dtype: torch.dtype,
        tracer: Tracer,
    ) -> None:
        self._rank, self._walks, self._channels, self._vocabulary = rank, dict(walks), channels, vocabulary
        self._context, self._width, self._dtype, self._tracer = context, width, dtype, tracer
        self._orders: dict[int, _Orders] = {}
        self._seed = 0.0
        self._gradients = False
        self._batches: Sequence[Batch] = ()
        self._do: dict[str, Callable[[Action], None]] = {
            "F": self._forward,
            "B": self._backward,
            "I": self._backward,
            "W": self._weights,
            "R": lambda action: self._walks[action.place].rebuild(action.number),
            "SEND_F": self._send_forward,
            "RECV_F": self._post_forward,
            "SEND_B": self._send_backward,
            "RECV_B": self._post_backward,
            "GATHER": self._gather,
            "RELEASE": self._release,
            "REDUCE": self._reduced,
        }
        if vocabulary is not None:
            self._do |= vocabulary.actions

    @property
    def units(self) -> list[Unit]:
        """Every unit of this rank, once."""
        found = [unit for walk in self._walks.values() for unit in (*walk.units, *walk.tiles)]
        found += self._vocabulary.units if self._vocabulary is not None else []
        return list({id(unit): unit for unit in found}.values())

    def run(
        self,
        schedule: Schedule,
        batches: Sequence[Batch],
        seed: float = 0.0,
        *,
        gradients: bool = True,
        per_token: bool = False,
    ) -> list[torch.Tensor]:
        """Execute this rank's part of a schedule; return the loss sum of every micro-batch on the head rank.

        `seed` multiplies the loss where backward starts: one over the global number of valid tokens. `per_token`
        returns the log-probabilities of labels, logp_BT, instead (without gradients). Other ranks return nothing.
        Collective:  every rank of the pipeline and of the shard groups
        """
        orders = self._now = self._prepare(schedule)
        if len(batches) != schedule.num_micro_batches:
            raise PlanError(
                f"schedule '{schedule.name}' is for {schedule.num_micro_batches} micro-batches per step, but "
                f"{len(batches)} were given. Give it {schedule.num_micro_batches}, or plan for {len(batches)}"
            )
        self._layout = schedule.layout
        self._batches, self._seed, self._gradients, self._per_token = batches, seed, gradients, per_token
        self._losses: dict[int, torch.Tensor] = {}
        self._contexts: dict[int, Any] = {}
        self._ready: dict[Action, torch.Tensor] = {}  # handed over by a stage of this rank, or to be sent
        self._arriving: dict[Action, Arriving] = {}
        if gradients:
            self._expect(orders)
        if self._vocabulary is not None:
            self._vocabulary.begin(batches, seed, gradients)
        for position, action in enumerate(orders.actions):
            with self._tracer.span(str(action), KINDS[action.kind].lane, action=str(action)):
                self._do[action.kind](action)
            for number in orders.last_of.get(position, ()):
                self._contexts.pop(number, None)
        self._channels.settle()
        if self._vocabulary is not None and self._rank == self._layout.head_rank:
            return self._vocabulary.log_probs() if per_token else self._vocabulary.losses()
        return [self._losses[number] for number in sorted(self._losses)]

    def _prepare(self, schedule: Schedule) -> _Orders:
        known = self._orders.get(id(schedule))
        if known is None:
            known = self._orders[id(schedule)] = _orders(schedule, self._rank)
        return known

    def _expect(self, orders: _Orders) -> None:
        """Tell every unit how often it is completed in this step."""
        times: dict[int, int] = {}
        for action in orders.completing:
            for unit in self._walks[action.place].completed_units:
                times[id(unit)] = times.get(id(unit), 0) + 1
        for unit in self.units:
            unit.expect(times.get(id(unit), 1))

    # -- stages ------------------------------------------------------------------------------------------------------

    def _forward(self, action: Action) -> None:
        stage, number = action.place, action.number
        batch = self._batches[number]
        if number not in self._contexts:
            self._contexts[number] = self._context(batch)
        h = self._input(action)
        if self._gradients:
            out = self._walks[stage].forward(number, h, batch, self._contexts[number])
        else:
            out = self._walks[stage].evaluate(h, batch, self._contexts[number], per_token=self._per_token)
        if stage < self._layout.num_stages - 1:
            self._ready[Action(stage + 1, "F", number)] = out
        elif self._vocabulary is not None:
            self._vocabulary.take_hidden(number, out)
        else:
            self._losses[number] = out

    def _input(self, action: Action) -> torch.Tensor | None:
        if action.place > 0:
            return self._take(action, "RECV_F")
        return None if self._vocabulary is None else self._vocabulary.embedding(action.number)

    def _backward(self, action: Action) -> None:
        """Run B, or I where backward is split."""
        stage, number = action.place, action.number
        walk = self._walks[stage]
        if stage < self._layout.num_stages - 1:
            gradient = self._take(action._replace(kind="B"), "RECV_B")
        elif self._vocabulary is not None:
            gradient = self._vocabulary.hidden_gradient(number)
        else:
            gradient = torch.full_like(self._losses[number], self._seed)
        if action.kind == "B":
            below = walk.both_gradients(number, gradient, complete=action in self._now.completing)
        else:
            below = walk.input_gradient(number, gradient)
        if stage > 0:
            if below is None:  # nothing before this stage is trained; the schedule is the same all the same
                below = torch.zeros_like(gradient)
            self._ready[Action(stage - 1, "B", number)] = below
        elif self._vocabulary is not None and below is not None:
            self._vocabulary.take_embedding_gradient(number, below)

    def _weights(self, action: Action) -> None:
        complete = action in self._now.completing
        self._walks[action.place].weight_gradient(action.number, complete=complete)

    # -- point to point ----------------------------------------------------------------------------------------------

    def _take(self, action: Action, receive: str) -> torch.Tensor:
        """Return what the neighbouring stage computed, from this rank or another.

        Blocks: host, until it has arrived
        """
        posted = self._arriving.pop(action._replace(kind=receive), None)
        return self._ready.pop(action) if posted is None else posted.wait()

    def _send_forward(self, action: Action) -> None:
        after = Action(action.place + 1, "F", action.number)
        self._channels.send("F", self._ready.pop(after), [self._layout.stage_rank[after.place]], str(action))

    def _post_forward(self, action: Action) -> None:
        self._post("F", action, action.place - 1, "SEND_F")

    def _send_backward(self, action: Action) -> None:
        before = Action(action.place - 1, "B", action.number)
        self._channels.send("B", self._ready.pop(before), [self._layout.stage_rank[before.place]], str(action))

    def _post_backward(self, action: Action) -> None:
        self._post("B", action, action.place + 1, "SEND_B")

    def _post(self, kind: str, action: Action, stage: int, sent: str) -> None:
        shape = (*self._batches[action.number].tokens_BT.shape, self._width)
        source, label = self._layout.stage_rank[stage], str(Action(stage, sent, action.number))
        self._arriving[action] = self._channels.receive(kind, shape, self._dtype, source, label)

    # -- ZeRO --------------------------------------------------------------------------------------------------------

    def _gather(self, action: Action) -> None:
        for unit in self._walks[action.place].units:
            unit.residency.start()
        following = self._now.gathered_next.get(action)
        for unit in self._walks[following.place].units if following is not None else ():
            unit.residency.approach(BEFORE_GATHER)

    def _release(self, action: Action) -> None:
        for unit in self._walks[action.place].units:
            unit.release()

    def _reduced(self, action: Action) -> None:
        """The reduction of each unit began inside the backward before this action, when its gradient was whole."""


def _orders(schedule: Schedule, rank: int) -> _Orders:
    actions = schedule.ranks[rank]
    completing, pending = set(), dict[int, Action]()
    last: dict[int, int] = {}
    for position, action in enumerate(actions):
        if action.kind in BACKWARD:
            pending[action.place] = action
        elif action.kind == "REDUCE":
            completing.add(pending[action.place])
        if not KINDS[action.kind].ordinal:
            last[action.number] = position
    last_of: dict[int, list[int]] = {}
    for number, position in last.items():
        last_of.setdefault(position, []).append(number)
    gathers = [a for a in actions if a.kind == "GATHER"]
    return _Orders(schedule, actions, frozenset(completing), last_of, dict(pairwise(gathers)))
