"""The engine on one CUDA device against the plain loop on the CPU. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from tests.parity.test_zero import LR, Case, plain
from windlass.dist.comm import Comm
from windlass.dist.device import pick_device
from windlass.dist.env import ProcessEnv
from windlass.dist.mesh import ParallelismConfig, plan_mesh
from windlass.dist.trace import Tracer
from windlass.parallel.activation import ActivationConfig
from windlass.parallel.engine import Engine
from windlass.parallel.precision import PrecisionConfig
from windlass.parallel.zero import ZeroConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("param", "bound"), [("fp64", 1e-10), ("fp32", 1e-4), ("bf16", 3e-2)])
def test_one_gpu_trains_like_the_plain_loop(stage: int, param: str, bound: float) -> None:
    from tests.parity import reference

    case = Case(ZeroConfig(stage=stage), param=param, model={"tied": True, "frozen": True})
    device = pick_device("cuda", 0)
    with Comm.start(ProcessEnv(), device) as comm:
        engine = Engine(
            reference.OddModel(**case.model),
            comm=comm,
            mesh=plan_mesh(ParallelismConfig(), 1),
            device=device,
            zero=case.zero,
            precision=PrecisionConfig(param=param),
            activation=ActivationConfig(),
            optimizer=case.optimizer_config,
            fill=reference.fill,
            tracer=Tracer(),
            account=lambda state, held: None,
        )
        losses = [engine.train_step(batches, LR).loss for batches in case.steps()]
    expected = plain(case).losses
    assert max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)) < bound
