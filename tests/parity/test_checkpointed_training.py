"""Training that goes through checkpoint files on the way equals training that does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import run_world
from tests.parity.test_zero import LR, ODD, STEPS, Case, assemble, build_engine, train
from tests.tolerance import assert_close
from windlass.checkpoint.restore import restore
from windlass.checkpoint.save import save
from windlass.dist.comm import Comm
from windlass.parallel.zero import ZeroConfig


def train_and_save(comm: Comm, case: Case, root: Path) -> dict[str, Any]:
    """Train two steps, save, and train on without interruption."""
    engine = build_engine(comm, case)
    size, rank = comm.world.size, comm.world.rank
    losses = []
    for i, batches in enumerate(case.steps()):
        if i == 2:
            report = save(root, 2, engine, {"optimizer_steps": engine.optimizer_steps}, comm.world, keep=2)
            assert report.ok, report.reason
        losses.append(engine.train_step(batches[rank::size], LR).loss)
    owned = [(p.key, p.global_shape, p.box, p.tensor.clone()) for p in engine.owned()]
    return {"losses": losses, "owned": owned}


def load_and_train(comm: Comm, case: Case, folder: Path) -> dict[str, Any]:
    """Restore in a fresh engine of any layout and train the remaining steps."""
    engine = build_engine(comm, case)
    extra = restore(folder, engine, comm.world)
    engine.optimizer_steps = extra["optimizer_steps"]
    size, rank = comm.world.size, comm.world.rank
    losses = [engine.train_step(batches[rank::size], LR).loss for batches in case.steps()[2:]]
    owned = [(p.key, p.global_shape, p.box, p.tensor.clone()) for p in engine.owned()]
    return {"losses": losses, "owned": owned}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resuming_in_the_same_layout_is_bitwise_the_uninterrupted_run(stage: int, tmp_path: Path) -> None:
    case = Case(ZeroConfig(stage=stage), param="fp32", model=ODD)
    through = run_world(2, train_and_save, case, tmp_path)
    resumed = run_world(2, load_and_train, case, tmp_path / "step-00000002")
    assert resumed[0]["losses"] == through[0]["losses"][2:]
    final = assemble(through)
    assert all(torch.equal(v, final[k]) for k, v in assemble(resumed).items())
    assert run_world(2, train, case)[0]["losses"] == through[0]["losses"], "saving changes nothing"


@pytest.mark.parametrize(("ranks", "stage", "param"), [(2, 1, "fp64"), (1, 0, "fp64"), (4, 2, "fp64"), (2, 1, "bf16")])
def test_a_stage_3_checkpoint_of_4_ranks_resumes_under_another_layout(
    ranks: int, stage: int, param: str, tmp_path: Path
) -> None:
    first = Case(ZeroConfig(stage=3), param=param, model=ODD)
    through = run_world(4, train_and_save, first, tmp_path)
    other = Case(ZeroConfig(stage=stage), param=param, model=ODD)
    resumed = run_world(ranks, load_and_train, other, tmp_path / "step-00000002")
    dtype = torch.float64 if param == "fp64" else torch.bfloat16
    assert len(resumed[0]["losses"]) == STEPS - 2
    assert_close(
        torch.tensor(resumed[0]["losses"], dtype=dtype), torch.tensor(through[0]["losses"][2:], dtype=dtype), "losses"
    )
