"""Training under an offload policy in a test: the same engine and data as in test_zero, with a machine of tiers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tests.parity import reference
from tests.parity.test_zero import LR, STEPS, Case
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

INF = float("inf")


@dataclass(frozen=True)
class OffloadCase:
    """A case of test_zero with an offload policy on top.

    `weights` multiply the loss step by step, so that some steps clip and others do not; an infinite one spoils one
    micro-batch of its step. `drives` folders share the files by `shares`. `evaluates`: between steps, too. `saves`: all
    state is read between steps, as for a checkpoint.
    """

    case: Case = field(default_factory=Case)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    lrs: tuple[float, ...] = (LR,) * STEPS
    weights: tuple[float, ...] = ()
    drives: int = 1
    shares: tuple[float, ...] = ()
    evaluates: bool = False
    saves: bool = False

    def steps(self) -> list[list[Any]]:
        """Return the micro-batches of every step, over all ranks."""
        out = self.case.steps()[: len(self.lrs)]
        for micro_batches, factor in zip(out, self.weights, strict=False):
            for i, batch in enumerate(micro_batches):
                one = 1.0 if factor == INF and i else factor
                weights = torch.full(batch.labels_BT.shape, one, dtype=torch.float32)
                micro_batches[i] = replace(batch, weights_BT=weights)
        return out


def build(
    comm: Comm,
    given: OffloadCase,
    folders: Sequence[str],
    ledger: TierLedger | None = None,
    resume: bool = False,
    warn: Callable[[str], None] = print,
    identity: str = "test",
) -> tuple[Engine, OffloadMachine | None]:
    """Build engine and machine of one rank."""
    case, config = given.case, given.offload
    model = reference.OddModel(**case.model)
    device = pick_device("cpu", 0)
    ledger = ledger or TierLedger(
        {
            tier: Limit(num_bytes, f"offload.{tier}_bytes")
            for tier, num_bytes in (
                ("device", config.device_bytes),
                ("host", config.host_bytes),
                ("nvme", config.nvme_bytes),
            )
            if num_bytes
        }
    )
    mesh = plan_mesh(ParallelismConfig(dp_replicate=case.replicate), comm.world.size)
    precision = PrecisionConfig(param=case.param, reduce=case.reduce)
    tracer = Tracer()
    plan = plan_offload(
        config,
        unit_facts(plan_units(model, mesh.sizes["dp_shard"], tile=config.tile), case.zero),
        element_sizes(precision, case.optimizer_config),
        clips=case.clip > 0,
        accumulates=case.micro_batches > comm.world.size,
    )
    machine = None
    if plan is not None:
        drives = Drives(list(folders), list(given.shares), identity=identity, rank=comm.rank, resume=resume)
        machine = OffloadMachine(plan, config, device=device, ledger=ledger, tracer=tracer, drives=drives, warn=warn)
    try:
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
            tile=config.tile,
        )
    except BaseException:
        if machine is not None:
            machine.close()
        raise
    return engine, machine


@contextmanager
def folders(number: int) -> Iterator[list[str]]:
    """Yield that many folders, as on different drives; they and all in them are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="windlass-test-") as folder:
        paths = [f"{folder}/drive{i}" for i in range(number)]
        for path in paths:
            Path(path).mkdir()
        yield paths


def train(comm: Comm, given: OffloadCase) -> dict[str, Any]:
    """Train on this rank's share; return everything that can be compared."""
    with folders(given.drives) as paths:
        engine, machine = build(comm, given, paths)
        try:
            return run(comm, given, engine, machine)
        finally:
            if machine is not None:
                machine.close()


def train_all(comm: Comm, cases: Sequence[OffloadCase]) -> list[dict[str, Any]]:
    """Train every case."""
    return [train(comm, case) for case in cases]


def run(comm: Comm, given: OffloadCase, engine: Engine, machine: OffloadMachine | None) -> dict[str, Any]:
    """Take all steps of a case; make sure that nothing is left over after each."""
    size, rank = comm.world.size, comm.world.rank
    out: dict[str, Any] = {"losses": [], "norms": [], "skipped": [], "evals": [], "saved": []}
    for micro_batches, lr in zip(given.steps(), given.lrs, strict=True):
        report = engine.train_step(micro_batches[rank::size], lr)
        out["losses"].append(report.loss)
        out["norms"].append(report.grad_norm)
        out["skipped"].append(report.skipped)
        if given.evaluates:
            out["evals"].append(engine.evaluate(given.case.steps()[0][rank::size]))
        if given.saves:
            out["saved"].append(pieces(engine))
        settle(machine)
    out["evals"].append(engine.evaluate(given.case.steps()[0][rank::size]))
    out["owned"] = pieces(engine)
    settle(machine)
    return out


def pieces(engine: Engine) -> list[tuple[Any, ...]]:
    """Return all state that this rank writes into a checkpoint."""
    return [(p.key, p.global_shape, p.box, p.tensor.clone()) for p in engine.owned()]


def settle(machine: OffloadMachine | None) -> None:
    """Give back what is lent, and make sure that nothing is under way and every slab is back."""
    if machine is not None:
        machine.loans.give_back()
        machine.lanes.check_idle()
        machine.check_balanced()


def whole_state(results: list[dict[str, Any]], name: str = "owned") -> dict[str, torch.Tensor]:
    """Put the pieces of all ranks together."""
    return assemble([result[name] for result in results])


def assemble(of_ranks: list[list[tuple[Any, ...]]]) -> dict[str, torch.Tensor]:
    """Put pieces together."""
    tensors: dict[str, torch.Tensor] = {}
    for owned in of_ranks:
        for key, shape, box, tensor in owned:
            tensors.setdefault(key, torch.zeros(shape, dtype=tensor.dtype))[box.slices] = tensor
    return tensors


def same(results: list[dict[str, Any]], expected: list[dict[str, Any]], what: object = "") -> None:
    """Check bit for bit."""
    for mine, theirs in zip(results, expected, strict=True):
        for name in ("losses", "norms", "skipped", "evals"):
            assert repr(mine[name]) == repr(theirs[name]), (what, name, mine[name], theirs[name])
    for step in range(len(results[0]["saved"])):
        same_state(*([r["saved"][step] for r in of] for of in (results, expected)), f"{what} after step {step}")
    same_state(*([r["owned"] for r in of] for of in (results, expected)), what)


def same_state(mine: list[Any], theirs: list[Any], what: object) -> None:
    """Check that pieces hold the same values, bit for bit."""
    got, want = assemble(mine), assemble(theirs)
    assert set(got) == set(want), what
    for key, value in want.items():
        differing = int((got[key] != value).sum())
        assert torch.equal(got[key], value), f"{what}: {key}: {differing} of {value.numel()} elements differ"


def without(given: OffloadCase) -> OffloadCase:
    """Return the same training with nothing offloaded, in the same tiles, which round in another way than none."""
    return replace(given, offload=OffloadConfig(tile=given.offload.tile), drives=1, shares=())
