"""The actions that a pipeline schedule is made of, and their text form.

An action is a place, a kind and a number: `2F0` is the forward of stage 2 for micro-batch 0, `0S3` the vocabulary
scores of rank 0 for micro-batch 3. Names of the zero-bubble family follow Qi et al. 2023, arXiv:2401.10241; S and T
follow Yeung et al. 2024, arXiv:2411.05288.
Must not know: how an action is executed, what it costs, what comes before it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from windlass.dist.errors import PlanError

LANES = ("compute", "p2p", "collective", "copy")


@dataclass(frozen=True, slots=True)
class Kind:
    """What an action of this kind does.

    `lane` says with what it competes: actions of one rank and lane follow each other. `place` says what the first
    number of the action means, `ordinal` that the last number counts the actions of this kind and place instead of
    naming a micro-batch.
    """

    name: str
    lane: str
    place: str
    meaning: str
    ordinal: bool = False


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("F", "compute", "stage", "forward"),
        Kind("B", "compute", "stage", "backward: gradients of the input and of the weights"),
        Kind("I", "compute", "stage", "gradient of the input"),
        Kind("W", "compute", "stage", "gradients of the weights, some time after I"),
        Kind("R", "compute", "stage", "rebuild the activations from the stage's input"),
        Kind("S", "compute", "rank", "scores of this rank's vocabulary shard"),
        Kind("T", "compute", "rank", "gradient of this rank's shard of the head"),
        Kind("EF", "compute", "rank", "look up this rank's rows of the embedding"),
        Kind("EB", "compute", "rank", "add up the gradients of this rank's rows of the embedding"),
        Kind("SEND_F", "p2p", "stage", "send the output to the next stage"),
        Kind("RECV_F", "p2p", "stage", "post the receive of the input from the previous stage"),
        Kind("SEND_B", "p2p", "stage", "send the gradient of the input to the previous stage"),
        Kind("RECV_B", "p2p", "stage", "post the receive of the output's gradient from the next stage"),
        Kind("X", "collective", "rank", "last hidden states, from the head rank to every rank"),
        Kind("STATS", "collective", "rank", "softmax statistics per token of every shard, to every rank"),
        Kind("DX", "collective", "rank", "partial gradients of the last hidden states, to the head rank"),
        Kind("ROWS", "collective", "rank", "embedding rows, from their owners to the embed rank"),
        Kind("DROWS", "collective", "rank", "gradients of embedding rows, from the embed rank to their owners"),
        Kind("GATHER", "collective", "stage", "gather the stage's sharded parameters", ordinal=True),
        Kind("REDUCE", "collective", "stage", "reduce the stage's gradients", ordinal=True),
        Kind("RELEASE", "copy", "stage", "drop the stage's gathered parameters", ordinal=True),
        Kind("VGATHER", "collective", "rank", "gather the vocabulary shard's sharded parameters", ordinal=True),
        Kind("VREDUCE", "collective", "rank", "reduce the vocabulary shard's gradients", ordinal=True),
        Kind("VRELEASE", "copy", "rank", "drop the vocabulary shard's gathered parameters", ordinal=True),
    )
}

_TEXT = re.compile(r"([0-9]+)([A-Z]+(?:_[A-Z]+)?)([0-9]+)")


class Action(NamedTuple):
    """One thing that one rank does, unique in its schedule.

    `place` is a stage or a rank and `number` a micro-batch or an ordinal, as its kind says.
    """

    place: int
    kind: str
    number: int

    def __str__(self) -> str:
        return f"{self.place}{self.kind}{self.number}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Read the text form, `2F0`.

        Raises:  PlanError if the text is not an action, saying how one is written
        """
        match = _TEXT.fullmatch(text)
        if match is None:
            raise PlanError(f"'{text}' is not an action. Write place, kind and number, such as 2F0, 0S3 or 1SEND_F2")
        place, kind, number = match.groups()
        if kind not in KINDS:
            raise PlanError(f"'{text}' is not an action: there is no kind '{kind}'. The kinds are {', '.join(KINDS)}")
        return cls(int(place), kind, int(number))
