"""What a pipeline rank does for its rows of the vocabulary: the actions S, T, EF, EB and the messages between them.

Labels and tokens are on every pipeline rank, so every rank knows how many rows each message has, and forms the
gradient that the loss sends back by itself.
Must not know: the order of actions. Source: Yeung et al. 2024, arXiv:2411.05288, sections 3 and 4.
Differs:     statistics and partial gradients are sent to whoever needs them instead of all-reduced, so that no rank
             waits in a barrier; embedding rows come from their owners only, instead of an all-reduce of zeros
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from windlass.data.batch import IGNORE, Batch
from windlass.parallel.pipeline.action import Action
from windlass.parallel.pipeline.channels import Arriving, Channels
from windlass.parallel.pipeline.schedule import Layout
from windlass.parallel.unit import Unit
from windlass.parallel.units import ParameterPlan
from windlass.parallel.vocab.embedding import assemble, lookup, rows_for
from windlass.parallel.vocab.head import Merged, Scores, VocabHead
from windlass.parallel.vocab.shard import VocabShard, owned


@dataclass(frozen=True)
class Rows:
    """One cut parameter on this rank: its unit, its place in it, and the tensor that the unit binds."""

    unit: Unit
    plan: ParameterPlan
    parameter: torch.Tensor

    @staticmethod
    def of(unit: Unit) -> Rows:
        return Rows(unit, unit.plan.parameters[0], unit.parameters[0])

    @property
    def trained(self) -> bool:
        return self.unit.reducer is not None

    def here(self) -> torch.Tensor:
        """Return the rows, gathered."""
        self.unit.ready()
        return self.parameter.detach()


class VocabularyPasses:
    """The vocabulary of one rank during one step after another."""

    def __init__(
        self,
        layout: Layout,
        rank: int,
        shards: Sequence[VocabShard],
        head: VocabHead,
        embedding: Rows,
        projection: Rows,
        channels: Channels,
        *,
        dtype: torch.dtype,
        scheduled: bool,
    ) -> None:
        self._layout, self._rank, self._shards = layout, rank, tuple(shards)
        self._others = [r for r in range(layout.num_ranks) if r != rank]
        self._head, self._embedding, self._projection = head, embedding, projection
        self._channels, self._dtype, self._scheduled = channels, dtype, scheduled
        self._wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.units = list({id(rows.unit): rows.unit for rows in (embedding, projection)}.values())
        self.actions: dict[str, Callable[[Action], None]] = {
            "EF": self._look_up,
            "ROWS": self._rows,
            "S": self._score,
            "X": self._hidden,
            "STATS": self._stats,
            "DX": self._partial,
            "T": self._transposed,
            "DROWS": self._row_gradients,
            "EB": self._scatter,
            "VGATHER": lambda action: self._each(lambda unit: unit.residency.start()),
            "VRELEASE": lambda action: self._each(lambda unit: unit.release()),
            "VREDUCE": lambda action: self._each(lambda unit: unit.complete()),
        }

    @property
    def trains_embedding(self) -> bool:
        return self._embedding.trained

    def begin(self, batches: Sequence[Batch], seed: float, gradients: bool) -> None:
        """Start a step; `seed` multiplies the loss where backward starts."""
        self._batches, self._seed, self._gradients = batches, seed, gradients
        self._labels = [batch.labels_BT.reshape(-1) for batch in batches]
        self._tokens = [batch.tokens_BT.reshape(-1) for batch in batches]
        self._looked_up: dict[int, torch.Tensor] = {}
        self._arriving: dict[Action, list[Arriving]] = {}
        self._hidden_SD: dict[int, torch.Tensor] = {}
        self._scores: dict[int, Scores] = {}
        self._merged: dict[int, Merged] = {}
        self._partials: dict[int, torch.Tensor] = {}
        self._embedding_gradients: dict[int, torch.Tensor] = {}
        for unit in self.units:
            unit.expect(1)

    def _each(self, what: Callable[[Unit], None]) -> None:
        for unit in self.units:
            what(unit)

    def _done_with(self, rows: Rows) -> None:
        if not self._scheduled:
            rows.unit.release()

    # -- embedding ---------------------------------------------------------------------------------------------------

    def _look_up(self, action: Action) -> None:
        tokens_S = self._tokens[action.number]
        self._looked_up[action.number] = lookup(tokens_S, self._embedding.here(), self._shards[self._rank])
        self._done_with(self._embedding)

    def _rows(self, action: Action) -> None:
        home, number = self._layout.embed_rank, action.number
        if self._rank != home:
            rows_KD = self._looked_up.pop(number)
            self._channels.send("ROWS", rows_KD, [home], f"{self._rank}ROWS{number}")
            return
        width = self._embedding.plan.shape[1]
        self._arriving[action] = [
            self._channels.receive("ROWS", (self._count(number, r), width), self._dtype, r, f"{r}ROWS{number}")
            for r in self._others
        ]

    def _count(self, number: int, rank: int) -> int:
        return owned(self._tokens[number], self._shards[rank]).numel()

    def embedding(self, number: int) -> torch.Tensor:
        """Return the looked-up rows e_BTD of a micro-batch, on the embed rank.

        Blocks: host, until every owner has sent its rows
        """
        own = self._looked_up.pop(number)
        rows = [arriving.wait() for arriving in self._arriving.pop(Action(self._rank, "ROWS", number), [])]
        rows.insert(self._rank, own)
        e_SD = assemble(self._tokens[number], self._shards, rows)
        return e_SD.view(*self._batches[number].tokens_BT.shape, -1)

    def take_embedding_gradient(self, number: int, gradient_BTD: torch.Tensor) -> None:
        """Keep the gradient of the looked-up rows, on the embed rank."""
        self._embedding_gradients[number] = gradient_BTD.reshape(-1, gradient_BTD.shape[-1])

    def _row_gradients(self, action: Action) -> None:
        if not self.trains_embedding:
            return
        home, number = self._layout.embed_rank, action.number
        if self._rank == home:
            for r in self._others:
                rows_KD = rows_for(self._embedding_gradients[number], self._tokens[number], self._shards[r])
                self._channels.send("DROWS", rows_KD, [r], f"{r}DROWS{number}")
            return
        shape = (self._count(number, self._rank), self._embedding.plan.shape[1])
        label = f"{self._rank}DROWS{number}"
        self._arriving[action] = [self._channels.receive("DROWS", shape, self._dtype, home, label)]

    def _scatter(self, action: Action) -> None:
        if not self.trains_embedding:
            return
        number, shard = action.number, self._shards[self._rank]
        tokens_S = self._tokens[number]
        if self._rank == self._layout.embed_rank:
            rows_KD = rows_for(self._embedding_gradients.pop(number), tokens_S, shard)
        else:
            rows_KD = self._arriving.pop(Action(self._rank, "DROWS", number))[0].wait()
        index_K = tokens_S[owned(tokens_S, shard)] - shard.low
        reducer = self._embedding.unit.reducer
        assert reducer is not None
        reducer.add_rows(self._embedding.plan, index_K, rows_KD)

    # -- head --------------------------------------------------------------------------------------------------------

    def take_hidden(self, number: int, x_BTD: torch.Tensor) -> None:
        """Keep the last hidden states, on the head rank."""
        self._hidden_SD[number] = x_BTD.reshape(-1, x_BTD.shape[-1])

    def _hidden(self, action: Action) -> None:
        root, number = self._layout.head_rank, action.number
        label = f"{root}X{number}"
        if self._rank == root:
            self._channels.send("X", self._hidden_SD[number], self._others, label)
        else:
            shape = (self._labels[number].numel(), self._projection.plan.shape[1])
            self._arriving[action] = [self._channels.receive("X", shape, self._dtype, root, label)]

    def _score(self, action: Action) -> None:
        number = action.number
        if self._rank != self._layout.head_rank:
            self._hidden_SD[number] = self._arriving.pop(Action(self._rank, "X", number))[0].wait()
        x_SD, weight_RD = self._hidden_SD[number], self._projection.here()
        scores = self._head.score(x_SD, weight_RD, self._labels[number], gradients=self._gradients)
        self._done_with(self._projection)
        if scores.partial is not None:
            self._partials[number] = scores.partial
        self._scores[number] = replace(scores, partial=None)  # the message is gone before T
        if not self._gradients:
            del self._hidden_SD[number]

    def _stats(self, action: Action) -> None:
        number = action.number
        stats_SK = self._scores[number].stats_SK
        self._channels.send("STATS", stats_SK, self._others, f"{self._rank}STATS{number}")
        self._arriving[action] = [
            self._channels.receive("STATS", stats_SK.shape, stats_SK.dtype, r, f"{r}STATS{number}")
            for r in self._others
        ]

    def merged(self, number: int) -> Merged:
        """Return what all shards together say about a micro-batch.

        Blocks: host, until every rank has scored it
        """
        if number not in self._merged:
            stats = [arriving.wait() for arriving in self._arriving.pop(Action(self._rank, "STATS", number), [])]
            stats.insert(self._rank, self._scores[number].stats_SK)
            self._merged[number] = self._head.merge(stats, self._labels[number], self._batches[number].weights_BT)
        return self._merged[number]

    def _upstream(self, number: int) -> torch.Tensor:
        """Return the gradient of the step's loss with respect to each token's loss."""
        upstream_S = (self._labels[number] != IGNORE).to(self._wide) * self._seed
        weights_BT = self._batches[number].weights_BT
        return upstream_S if weights_BT is None else upstream_S * weights_BT.reshape(-1)

    def _partial(self, action: Action) -> None:
        root, number = self._layout.head_rank, action.number
        if self._rank != root:
            self._channels.send("DX", self._partials.pop(number), [root], f"{self._rank}DX{number}")
            return
        width = self._projection.plan.shape[1]
        self._arriving[action] = [
            self._channels.receive(
                "DX", (self._head.partial_rows(r, self._labels[number]), width), self._dtype, r, f"{r}DX{number}"
            )
            for r in self._others
        ]

    def _transposed(self, action: Action) -> None:
        number = action.number
        merged, x_SD, scores = self.merged(number), self._hidden_SD.pop(number), self._scores.pop(number)
        gradient_RD, partial = self._head.transposed(
            scores, x_SD, self._projection.here(), self._labels[number], merged, self._upstream(number)
        )
        self._done_with(self._projection)
        if partial is not None:
            self._partials[number] = partial
        if self._projection.unit.reducer is not None:
            self._projection.unit.reducer.add([(self._projection.plan, gradient_RD)])

    def hidden_gradient(self, number: int) -> torch.Tensor:
        """Return the gradient of the last hidden states x_BTD, on the head rank.

        Blocks: host, until every rank's part is here
        """
        partials = [arriving.wait() for arriving in self._arriving.pop(Action(self._rank, "DX", number), [])]
        partials.insert(self._rank, self._partials.pop(number))
        gradient_SD = self._head.input_gradient(
            partials, self.merged(number), self._labels[number], self._upstream(number), self._dtype
        )
        return gradient_SD.view(*self._batches[number].tokens_BT.shape, -1)

    def losses(self) -> list[torch.Tensor]:
        """Return the loss sum of every micro-batch, equal on all pipeline ranks.

        Blocks: host, until every rank has scored
        """
        return [self.merged(number).loss_S.sum() for number in range(len(self._batches))]

    def log_probs(self) -> list[torch.Tensor]:
        """Return logp_BT of the labels of every micro-batch, 0 where there is none.

        Blocks: host, until every rank has scored
        """
        return [self.merged(i).logp_S.view(batch.labels_BT.shape) for i, batch in enumerate(self._batches)]
