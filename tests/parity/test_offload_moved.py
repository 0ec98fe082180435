"""What a step moves and what a rank holds, measured, against what the program of the step and the formulas say."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from tests.harness import run_world
from tests.pairwise import pairwise
from tests.parity.offload_case import OffloadCase, build, folders, settle
from tests.parity.test_offload import MODELS, POLICIES, TABLES, WIDTH
from tests.parity.test_zero import LR, Case
from windlass.dist.comm import Comm
from windlass.offload.compile import build_program
from windlass.offload.machine import OffloadMachine
from windlass.offload.plan_bytes import plan_bytes
from windlass.offload.policy import OffloadConfig
from windlass.offload.program import step_bytes
from windlass.offload.workload import PartWork, Workload
from windlass.parallel.activation import ActivationConfig
from windlass.parallel.engine import Engine
from windlass.parallel.offloading import tile_orders, unit_facts
from windlass.parallel.zero import ZeroConfig

LANES = ("h2d", "d2h", "file read", "file write", "cpu update", "device update")
COUNTED = ("param", "grad", "master", "exp_avg", "exp_avg_sq", "optimizer", "gather", "shard", "slab")
CHOICES: dict[str, Any] = {
    "policy": [*POLICIES, *range(len(TABLES))],
    "format": [("bf16", "fp32"), ("fp32", "auto"), ("bf16", "bf16")],
    "model": list(MODELS),
    "stage": [3, 2],
    "accumulated": [1, 3],
    "records": [(2048, 1, 1), (4096, 4, 3)],
    "reshard": ["turnaround", "each", "never"],
    "lookahead": [(3, 2, 1), (0, 0, 0), (4, 1, 1)],
    "clip": [0.0, 100.0],  # no step is clipped: what is made twice cannot be foreseen
    "recompute": ["keep", "recompute"],
    "tile": [0, 16 * WIDTH],
}


def case_of(choice: dict[str, Any], ranks: int) -> OffloadCase:
    stage, (chunk, slabs, drives) = choice["stage"], choice["records"]
    case = Case(
        ZeroConfig(stage=stage, reshard=choice["reshard"] if stage == 3 else "auto"),
        *choice["format"],
        clip=choice["clip"],
        model={"width": WIDTH, **MODELS[choice["model"]]},
        micro_batches=ranks * choice["accumulated"],
        recompute=choice["recompute"],
    )
    policy = choice["policy"]
    offload = POLICIES[policy] if policy in POLICIES else OffloadConfig(table=TABLES[policy])
    offload = replace(offload, chunk=chunk, slabs=slabs, lookahead=choice["lookahead"])
    offload = replace(offload, tile=choice["tile"] if stage == 3 else 0)
    return OffloadCase(case, offload, (LR,) * 3, drives=drives)


def workload(engine: Engine, given: OffloadCase, shards: int, micro_batches: int) -> Workload:
    """Return the step of this rank as the program sees it."""
    case = given.case
    reshard = case.zero.resharding(False)
    activation = ActivationConfig(policy=case.recompute)
    parts = [part for stage in engine.plan.stages for part in stage.parts]
    return Workload(
        units=tuple(unit_facts(engine.plan, case.zero)),
        parts=tuple(
            PartWork(p.name, p.units, 0.0, 0.0, *tile_orders(p, recomputed=activation.recomputes(p.name)))
            for p in parts
        ),
        state_names=case.optimizer_config.state_names,
        num_shards=shards,
        num_micro_batches=micro_batches,
        clips=case.clip > 0,
        reshard=reshard if reshard in ("each", "turnaround") else "never",
        prefetch=case.zero.prefetch,
    )


def measure(comm: Comm, cases: list[OffloadCase]) -> list[list[str]]:
    """Train every case; return where what was measured is not what is foreseen."""
    return [differences(comm, given) for given in cases]


def differences(comm: Comm, given: OffloadCase) -> list[str]:
    with folders(given.drives) as paths:
        engine, machine = build(comm, given, paths)
        assert machine is not None
        work = workload(engine, given, comm.size, given.case.micro_batches // comm.size)
        found = []
        for step, batches in enumerate(given.steps()):
            moved = by_lane(engine.train_step(batches[comm.rank :: comm.size], LR).lanes)
            foreseen = step_bytes(build_program(machine.plan, work, step=step))
            if step >= 2:  # what is kept from step to step is kept from the second one on
                found += [
                    f"step {step}, {lane}: {moved[lane]:,} bytes, foreseen {foreseen.get(lane, 0):,}"
                    for lane in LANES
                    if moved[lane] != foreseen.get(lane, 0)
                ]
        settle(machine)
        found += held_otherwise(machine, work)
        machine.close()
    return found


def by_lane(counters: dict[str, Any]) -> Counter[str]:
    """Return the bytes of every lane, those of all drives together."""
    moved: Counter[str] = Counter()
    for name, lane in counters.items():
        moved[name.rstrip("0123456789").rstrip() if name.startswith("file") else name] += lane.num_bytes
    return moved


def held_otherwise(machine: OffloadMachine, work: Workload) -> list[str]:
    """Return the classes of state that hold other bytes than the formulas say."""
    found = []
    for tier, foreseen in plan_bytes(machine.plan, work).items():
        held = {name: n for name, n in machine.ledger.peak_by_class(tier).items() if n and name in COUNTED}
        for name in sorted({*held, *foreseen}):
            if held.get(name, 0) != foreseen.get(name, 0):
                found.append(f"{tier}, {name}: {held.get(name, 0):,} bytes, foreseen {foreseen.get(name, 0):,}")
    return found


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_a_step_moves_and_holds_exactly_what_is_foreseen(ranks: int) -> None:
    cases = [case_of(choice, ranks) for choice in pairwise(CHOICES)]
    for found in run_world(ranks, measure, cases):
        wrong = {str(case): differing for case, differing in zip(cases, found, strict=True) if differing}
        assert not wrong, "\n".join(f"{case}\n  " + "\n  ".join(lines) for case, lines in wrong.items())
