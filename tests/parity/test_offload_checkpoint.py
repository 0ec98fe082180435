"""Checkpoints of state that rests anywhere: saved under one placement, resumed under another, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import run_world
from tests.parity.offload_case import OffloadCase, build, folders, whole_state
from tests.parity.test_zero import LR, ODD, Case
from windlass.checkpoint.restore import restore
from windlass.checkpoint.save import save
from windlass.dist.comm import Comm
from windlass.offload.policy import OffloadConfig
from windlass.parallel.zero import ZeroConfig

POLICIES = {
    "none": OffloadConfig(),
    "zero-offload": OffloadConfig(policy="zero-offload", chunk=2048),
    "zero-infinity": OffloadConfig(policy="zero-infinity", chunk=2048),
    "fuyou": OffloadConfig(policy="fuyou", chunk=2048),
    "mlp-offload": OffloadConfig(policy="mlp-offload", chunk=2048, cache=2),
    "interleaved": OffloadConfig(policy="deep-optimizer-states", device_share=0.5, chunk=2048),
}


def case_of(policy: str, param: str) -> OffloadCase:
    return OffloadCase(Case(ZeroConfig(stage=3), param=param, model=ODD), POLICIES[policy])


def train_and_save(comm: Comm, given: OffloadCase, root: Path) -> dict[str, Any]:
    with folders(1) as paths:
        return _train_and_save(comm, given, paths, root)


def _train_and_save(comm: Comm, given: OffloadCase, paths: list[str], root: Path) -> dict[str, Any]:
    engine, machine = build(comm, given, paths)
    losses = []
    for i, batches in enumerate(given.case.steps()):
        if i == 2:
            report = save(root, 2, engine, {"optimizer_steps": engine.optimizer_steps}, comm.world, keep=2)
            assert report.ok, report.reason
        losses.append(engine.train_step(batches[comm.rank :: comm.size], LR).loss)
    owned = [(p.key, p.global_shape, p.box, p.tensor.clone()) for p in engine.owned()]
    if machine is not None:
        machine.close()
    return {"losses": losses, "owned": owned}


def load_and_train(comm: Comm, given: OffloadCase, checkpoint: Path) -> dict[str, Any]:
    with folders(1) as paths:
        return _load_and_train(comm, given, paths, checkpoint)


def _load_and_train(comm: Comm, given: OffloadCase, paths: list[str], checkpoint: Path) -> dict[str, Any]:
    engine, machine = build(comm, given, paths)
    extra = restore(checkpoint, engine, comm.world)
    engine.optimizer_steps = extra["optimizer_steps"]
    losses = [engine.train_step(batches[comm.rank :: comm.size], LR).loss for batches in given.case.steps()[2:]]
    owned = [(p.key, p.global_shape, p.box, p.tensor.clone()) for p in engine.owned()]
    if machine is not None:
        machine.lanes.check_idle()
        machine.close()
    return {"losses": losses, "owned": owned}


@pytest.mark.parametrize("param", ["fp32", "bf16"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_checkpoint_of_one_placement_resumes_under_the_next_one(policy: str, param: str, tmp_path: Path) -> None:
    names = list(POLICIES)
    other = names[(names.index(policy) + 1) % len(names)]
    through = run_world(2, train_and_save, case_of(policy, param), tmp_path)
    resumed = run_world(2, load_and_train, case_of(other, param), tmp_path / "step-00000002")
    assert resumed[0]["losses"] == through[0]["losses"][2:]
    final = whole_state(through)
    assert all(torch.equal(value, final[key]) for key, value in whole_state(resumed).items())


def test_a_checkpoint_of_two_ranks_on_nvme_resumes_on_one_with_other_chunks(tmp_path: Path) -> None:
    through = run_world(2, train_and_save, case_of("fuyou", "fp64"), tmp_path)
    config = OffloadConfig(policy="zero-infinity", chunk=4096, slabs=1)
    given = OffloadCase(Case(ZeroConfig(stage=3), param="fp64", model=ODD), config)
    resumed = run_world(1, load_and_train, given, tmp_path / "step-00000002")
    expected = torch.tensor(through[0]["losses"][2:], dtype=torch.float64)
    assert torch.allclose(torch.tensor(resumed[0]["losses"], dtype=torch.float64), expected, rtol=1e-12)
