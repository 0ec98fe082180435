"""What is planned is what happens: bytes of every lane and step, and bytes of every class on every tier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.harness import run_world
from tests.pairwise import pairwise
from tests.parity import reference
from tests.parity.offload_case import OffloadCase, build, folders, settle
from tests.parity.test_offload import CHOICES, case_of
from windlass.dist.comm import Comm
from windlass.offload.compile import build_program
from windlass.offload.ledger import TIERS, TierLedger
from windlass.offload.plan_bytes import plan_bytes
from windlass.offload.program import LANES, step_bytes
from windlass.offload.workload import PartWork, Workload
from windlass.parallel.offloading import unit_facts
from windlass.parallel.units import plan_units

COMPARED = [lane for lane in LANES if lane not in ("compute", "comm")]


def workload(given: OffloadCase, ranks: int) -> Workload:
    """Return what a step of one rank is, by the units of the case's model."""
    case = given.case
    units = plan_units(reference.OddModel(**case.model), ranks)
    return Workload(
        units=tuple(unit_facts(units, case.zero)),
        parts=tuple(PartWork(part.name, part.units) for part in units.stages[0].parts),
        state_names=case.optimizer_config.state_names,
        num_shards=ranks,
        num_micro_batches=case.micro_batches // ranks,
        clips=case.clip > 0,
        prefetch=case.zero.prefetch,
    )


def record(comm: Comm, given: OffloadCase) -> dict[str, Any]:
    """Train; return for every step the bytes of every lane, and the peaks by tier and class."""
    ledger, moved = TierLedger(), []
    with folders(given.drives) as paths:
        engine, machine = build(comm, given, paths, ledger)
        assert machine is not None
        try:
            for micro_batches, lr in zip(given.steps(), given.lrs, strict=True):
                report = engine.train_step(micro_batches[comm.rank :: comm.world.size], lr)
                settle(machine)
                lanes: Counter[str] = Counter()
                for lane, counters in report.lanes.items():
                    lanes[lane.rstrip("0123456789 ")] += counters.num_bytes
                moved.append({lane: n for lane, n in lanes.items() if n})
            return {
                "moved": moved,
                "peaks": {tier: dict(ledger.peak_by_class(tier)) for tier in TIERS},
                "plan": machine.plan,
            }
        finally:
            machine.close()


def record_all(comm: Comm, cases: Sequence[OffloadCase]) -> list[dict[str, Any]]:
    return [record(comm, case) for case in cases]


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_lane_moves_and_every_tier_holds_what_was_planned(ranks: int) -> None:
    quiet = {"clipping": ["never", "always"], "between": ["nothing"]}
    cases = [case_of(choice, ranks) for choice in pairwise(CHOICES | quiet)]
    # A step that is clipped is made twice: a limit that no gradient reaches asks for the norm all the same.
    cases = [replace(c, case=replace(c.case, clip=1e9 if c.case.clip else 0.0)) for c in cases]
    for case, found in zip(cases, run_world(ranks, record_all, cases, timeout_s=110.0)[0], strict=True):
        work, plan = workload(case, ranks), found["plan"]
        for number, moved in enumerate(found["moved"]):
            expected = step_bytes(build_program(plan, work, step=number))
            if number > 0 or not plan.cache:  # the first step finds nothing kept
                wanted = {lane: expected[lane] for lane in COMPARED if expected.get(lane)}
                assert {lane: n for lane, n in moved.items() if lane in COMPARED} == wanted, (case, number)
        held = plan_bytes(plan, work)
        for tier in ("host", "nvme"):
            assert found["peaks"][tier] == held[tier], (case, tier)
        for name, num_bytes in held["device"].items():
            if name in ("optimizer", "slab", "grad", "param", "shard"):
                assert found["peaks"]["device"].get(name, 0) == num_bytes, (case, name)
        assert found["peaks"]["device"].get("gather", 0) <= held["device"].get("gather", 0), case
