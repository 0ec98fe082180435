"""A run goes on with other workers, or with its state cut in another way, from memory and from a checkpoint alike.

Row 20 of the fault matrix. That the state which comes from memory is the one that a checkpoint of the same step holds
is shown by what is made of it: two runs that go on in the same shape, one from each, stay bitwise equal to the end.
"""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from tests.fault.memory_runs import Act, Lab, Live
from tests.fault.oracle import BATCH, EXACT, Told
from tests.leftovers import end_all
from windlass.checkpoint.reader import CheckpointReader
from windlass.launch.metrics import read_metrics

Shape = tuple[int, int]  # workers, ZeRO stage
CASES: dict[str, tuple[Shape, Shape]] = {
    "fewer workers": ((4, 2), (2, 2)),
    "more workers": ((2, 2), (4, 2)),
    "state that was cut is whole everywhere": ((2, 3), (2, 0)),
    "state that was whole is cut": ((2, 0), (2, 3)),
}
ONCE = ("recovery.max_restarts=0", "checkpoint.every=3")


def shaped(shape: Shape) -> dict[str, object]:
    workers, stage = shape
    return {"workers": workers, "nodes": workers, "spares": 0, "settings": (*ONCE, f"zero.stage={stage}")}


def source(told: Told) -> str:
    """Return where the last start went on from."""
    return [e["folder"] for e in read_metrics(told.run / "metrics.jsonl") if e.get("event") == "resume"][-1]


def check_order(told: Told, steps: int) -> None:
    """Check that every sample was used once and in its order."""
    edges = [tuple(entry["samples"]) for entry in told.history]
    assert edges == [(step * BATCH, (step + 1) * BATCH) for step in range(steps)]
    assert [entry["step"] for entry in told.every_step] == list(range(1, steps + 1)), "no step was done twice"


@pytest.mark.parametrize(
    "case", [name if name == "fewer workers" else pytest.param(name, marks=pytest.mark.soak) for name in CASES]
)
def test_state_in_memory_is_cut_anew_as_that_of_a_checkpoint_is(case: str, lab: Lab) -> None:
    before, after = CASES[case]
    died = lab.run(**shaped(before), fault="kill:train.forward:rank=1:step=4", keep=True, pace=("peers", "storage"))
    try:
        assert died.code != 0 and len(died.every_step) == 3, died.said
        elsewhere = died.run.with_name(f"{died.run.name}-elsewhere")  # another job: nothing in memory is its
        shutil.copytree(died.run, elsewhere)
        stored = replace(died, run=elsewhere, memory=lab.new_memory())
        told = lab.run(**shaped(after), after=died)
        control = lab.run(**shaped(after), after=stored)
    finally:
        end_all(died.memory)
    for run in (told, control):
        assert (run.code, run.leftovers) == (0, []), run.said
        check_order(run, run.steps)
    assert source(told).startswith("ram") and source(control).endswith("step-00000003")
    assert [[e[key] for key in EXACT] for e in told.history] == [[e[key] for key in EXACT] for e in control.history]
    with CheckpointReader(told.checkpoint) as mine, CheckpointReader(control.checkpoint) as theirs:
        assert sorted(mine.manifest.tensors) == sorted(theirs.manifest.tensors)
        for key in mine.manifest.tensors:
            assert torch.equal(mine.read(key), theirs.read(key)), key


@pytest.mark.soak
def test_a_run_shrinks_when_a_node_is_lost_and_grows_when_it_is_back(lab: Lab) -> None:
    def come_back(live: Live) -> None:
        machine = live.fleet._machines["node-3"]
        machine.node = replace(machine.node, alive=True)

    told = lab.run(
        workers=4,
        nodes=4,
        spares=0,
        strikes=["node=3@step=3", Act(6, come_back)],
        settings=["recovery.min_workers=2", "recovery.grow_s=0.3", "train.steps=48"],
    )
    told.check(lab.undisturbed(4, **{"train.steps": 48}), exact=False, restarts=2)
    assert [tier for _, tier in told.restored] == ["ram", "ram"]
    assert [r["workers"] for r in told.of("start")] == [4, 2, 4]
    losses = [entry["loss"] for entry in told.history]
    right = [entry["loss"] for entry in lab.undisturbed(4, **{"train.steps": 48}).history]
    assert losses == pytest.approx(right, rel=1e-3), "sums in another order, the same samples"
