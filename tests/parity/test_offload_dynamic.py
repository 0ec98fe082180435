"""Offload under what a static plan cannot foresee: blocks that branch, and micro-batches of other shapes every step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.harness import run_world
from tests.parity import reference
from tests.parity.offload_case import OffloadCase, build, folders, pieces, same_state, settle
from tests.parity.test_zero import LR, Case
from windlass.data.batch import Batch
from windlass.dist.comm import Comm
from windlass.offload.policy import OffloadConfig
from windlass.parallel.zero import ZeroConfig

POLICIES = [
    OffloadConfig(policy="zero-offload", chunk=2048),
    OffloadConfig(policy="zero-infinity", chunk=2048, slabs=1),
    OffloadConfig(policy="fuyou", chunk=2048, slabs=2),
    OffloadConfig(policy="superpipeline", chunk=2048),
]


class Branching(reference.Mixer):
    """Leaves most of its parameters out whenever the first number of its input is below zero."""

    def forward(self, h: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return h + self.gain * h if float(h.detach().flatten()[0]) < 0 else super().forward(h, context)


def batch_of(step: int) -> Batch:
    """Return a micro-batch of another number of rows and tokens in every step."""
    whole, tokens = reference.make_batch(step, rows=1 + step % 3), reference.TOKENS - step % 4
    columns = ("tokens_BT", "positions_BT", "documents_BT", "labels_BT")
    return replace(whole, **{name: getattr(whole, name)[:, :tokens].contiguous() for name in columns})


def train(comm: Comm, offload: OffloadConfig) -> dict[str, Any]:
    case = Case(ZeroConfig(3), param="fp32", model={"block": Branching, "width": 64}, micro_batches=comm.size)
    out: dict[str, Any] = {"losses": [], "host": []}
    with folders(1) as paths:
        engine, machine = build(comm, OffloadCase(case, offload), paths)
        for step in range(6):
            out["losses"].append(engine.train_step([batch_of(step * comm.size + comm.rank)], LR).loss)
            if machine is not None:
                out["host"].append(machine.ledger.current("host"))
        out["owned"] = pieces(engine)
        settle(machine)
        if machine is not None:
            machine.close()
    return out


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.policy)
def test_blocks_that_branch_and_changing_shapes_train_bit_for_bit_and_host_memory_never_grows(
    policy: OffloadConfig, ranks: int
) -> None:
    mine, plain = run_world(ranks, train, policy), run_world(ranks, train, OffloadConfig())
    assert [r["losses"] for r in mine] == [r["losses"] for r in plain]
    same_state([r["owned"] for r in mine], [r["owned"] for r in plain], policy.policy)
    assert all(len(set(r["host"])) == 1 and r["host"][0] > 0 for r in mine)
