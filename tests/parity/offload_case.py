"""Training under an offload policy in a test: the same engine and data as in test_zero, with a machine of tiers."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tests.parity import reference
from tests.parity.test_zero import LR, Case
from windlass.dist.comm import Comm
from windlass.dist.device import pick_device
from windlass.dist.mesh import ParallelismConfig, plan_mesh
from windlass.dist.trace import Tracer
from windlass.offload.ledger import Limit, TierLedger
from windlass.offload.machine import Drives, OffloadMachine
from windlass.offload.placement import plan_offload
from windlass.offload.policy import OffloadConfig
from windlass.parallel.activation import ActivationConfig
from windlass.parallel.engine import Engine
from windlass.parallel.offloading import element_sizes, unit_facts
from windlass.parallel.precision import PrecisionConfig
from windlass.parallel.units import plan_units


@dataclass(frozen=True)
class OffloadCase:
    """A case of test_zero with an offload policy on top."""

    case: Case
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    lrs: tuple[float, ...] = (LR,) * 5


def build(
    comm: Comm, given: OffloadCase, folder: str, ledger: TierLedger | None = None, resume: bool = False
) -> tuple[Engine, OffloadMachine | None]:
    """Build engine and machine of one rank."""
    case, config = given.case, given.offload
    model = reference.OddModel(**case.model)
    device = pick_device("cpu", 0)
    ledger = ledger or TierLedger(
        {
            tier: Limit(num_bytes, f"offload.{tier}_bytes")
            for tier, num_bytes in (("device", config.device_bytes), ("host", config.host_bytes))
            if num_bytes
        }
    )
    mesh = plan_mesh(ParallelismConfig(dp_replicate=case.replicate), comm.world.size)
    precision = PrecisionConfig(param=case.param, reduce=case.reduce)
    tracer = Tracer()
    shards = mesh.sizes["dp_shard"]
    plan = plan_offload(
        config,
        unit_facts(plan_units(model, shards), case.zero),
        element_sizes(precision, case.optimizer_config),
        clips=case.clip > 0,
        accumulates=case.micro_batches > comm.world.size,
    )
    machine = None
    if plan is not None:
        drives = Drives([folder], identity="test", rank=comm.rank)
        machine = OffloadMachine(
            plan, config, device=device, ledger=ledger, tracer=tracer, drives=drives, warn=print, resume=resume
        )
    engine = Engine(
        model,
        comm=comm,
        mesh=mesh,
        device=device,
        zero=case.zero,
        precision=precision,
        activation=ActivationConfig(policy=case.recompute, every=case.every),
        optimizer=case.optimizer_config,
        fill=reference.fill,
        tracer=tracer,
        account=lambda state, held: ledger.add("device", state, held),
        offload=machine,
    )
    return engine, machine


def train(comm: Comm, given: OffloadCase, folder: str) -> dict[str, Any]:
    """Train on this rank's share; return everything that can be compared."""
    engine, machine = build(comm, given, folder)
    size, rank = comm.world.size, comm.world.rank
    losses, norms, skipped = [], [], []
    for micro_batches, lr in zip(given.case.steps(), given.lrs, strict=False):
        report = engine.train_step(micro_batches[rank::size], lr)
        losses.append(report.loss)
        norms.append(report.grad_norm)
        skipped.append(report.skipped)
    out: dict[str, Any] = {"losses": losses, "norms": norms, "skipped": skipped}
    out["eval"] = engine.evaluate(given.case.steps()[0][rank::size])
    out["owned"] = [(p.key, p.global_shape, p.box, p.tensor.clone()) for p in engine.owned()]
    if machine is not None:
        machine.loans.give_back()
        machine.lanes.check_idle()
        machine.check_balanced()
        machine.close()
    return out


def whole_state(results: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Put the pieces of all ranks together."""
    tensors: dict[str, torch.Tensor] = {}
    for result in results:
        for key, shape, box, tensor in result["owned"]:
            tensors.setdefault(key, torch.zeros(shape, dtype=tensor.dtype))[box.slices] = tensor
    return tensors


def same(results: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Check bit for bit."""
    for mine, theirs in zip(results, expected, strict=True):
        for name in ("losses", "norms", "skipped", "eval"):
            assert mine[name] == theirs[name], (name, mine[name], theirs[name])
    got, want = whole_state(results), whole_state(expected)
    assert set(got) == set(want)
    for key, value in want.items():
        assert torch.equal(got[key], value), f"{key}: {(got[key] != value).sum()} of {value.numel()} elements differ"


def temporary() -> str:
    """Return a folder for the files of one test."""
    return tempfile.mkdtemp(prefix="windlass-test-")


def without(given: OffloadCase) -> OffloadCase:
    """Return the same training with nothing offloaded."""
    return replace(given, offload=OffloadConfig())
