"""What an engine hands to snapshots: everything, equal on replicas, unchanged until the gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.harness import run_world
from tests.parity.test_zero import LR, Case, assemble, build_engine
from windlass.dist.comm import Comm
from windlass.parallel.zero import ZeroConfig

CASES = {
    "stage 0": (2, Case()),
    "stage 1": (2, Case(zero=ZeroConfig(stage=1))),
    "stage 2": (2, Case(zero=ZeroConfig(stage=2), param="bf16")),
    "stage 3": (2, Case(zero=ZeroConfig(stage=3), param="fp32")),
    "replicated shards": (4, Case(zero=ZeroConfig(stage=3), replicate=2)),
}


def watch(comm: Comm, case: Case) -> dict[str, Any]:
    """Train two steps, copying all state before the second and looking at it again at its gate."""
    engine = build_engine(comm, case)
    share = case.steps()[0][comm.world.rank :: comm.world.size]
    engine.train_step(share, LR)
    before = [(p.key, p.box, p.tensor.clone()) for p in engine.held()]
    at_gate: list[bool] = []

    def look() -> None:
        now = [p.tensor for p in engine.held()]
        at_gate.append(all(torch.equal(a, b) for (_, _, a), b in zip(before, now, strict=True)))

    engine.gate = look
    engine.train_step(share, LR)
    changed = [not torch.equal(a, p.tensor) for (_, _, a), p in zip(before, engine.held(), strict=True)]
    owned = [(p.key, p.global_shape, p.box, p.tensor.clone()) for p in engine.owned()]
    held = [(p.key, p.global_shape, p.box, p.tensor.clone()) for p in engine.held()]
    return {
        "replicas": engine.replicas,
        "at_gate": at_gate,
        "changed": any(changed),
        "owned": owned,
        "held": held,
        "movable": engine.movable,
    }


@pytest.mark.parametrize("name", CASES)
def test_state_is_whole_on_each_set_of_replicas_and_still_until_the_gate(name: str) -> None:
    num_ranks, case = CASES[name]
    results = run_world(num_ranks, watch, case)
    assert all(r["at_gate"] == [True] and r["changed"] and not r["movable"] for r in results)
    whole = assemble(results)
    for rank, result in enumerate(results):
        assert rank in result["replicas"]
        for peer in result["replicas"]:
            pairs = zip(result["held"], results[peer]["held"], strict=True)
            assert all(a[:3] == b[:3] and torch.equal(a[3], b[3]) for a, b in pairs)
    firsts = [results[ranks[0]] for ranks in {tuple(r["replicas"]) for r in results}]
    again = assemble([{"owned": r["held"]} for r in firsts])
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[key], whole[key]) for key in whole)
