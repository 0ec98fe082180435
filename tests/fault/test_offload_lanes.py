"""Lanes that break, stop or are given up while an engine trains over them, and records of all sizes through few slabs.

An error surfaces at the next wait, a transfer that never ends at the watchdog, and closing waits for nobody.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.fault.test_offload_faults import CLOSED_S, WATCHDOG_S, Breaks, attempt, case_of, check_error
from tests.harness import run_world
from tests.parity.offload_case import OffloadCase, build, folders
from tests.parity.test_offload import POLICIES, check
from tests.parity.test_zero import LR, Case
from tests.waiting import until
from windlass.dist.comm import Comm
from windlass.offload.ledger import TierLedger
from windlass.offload.machine import OffloadMachine
from windlass.parallel.engine import Engine
from windlass.parallel.optim import UpdateKernel
from windlass.parallel.zero import ZeroConfig


def lose_a_thread(engine: Engine, machine: OffloadMachine) -> None:
    def leave(*_: Any) -> None:
        raise SystemExit(3)

    machine.device = replace_copy(machine.device, leave)


def replace_copy(device: Any, copy: Callable[..., None]) -> Any:
    """Return a device whose copies are these."""

    class Broken(type(device)):  # type: ignore[misc]
        pass

    Broken.copy = staticmethod(copy)  # type: ignore[attr-defined]
    broken = object.__new__(Broken)
    broken.__dict__.update(device.__dict__)
    return broken


def fail_in_kernel(engine: Engine, machine: OffloadMachine) -> None:
    calls = iter(range(1000))
    whole = UpdateKernel.update

    def update(self: UpdateKernel, *args: Any, **kwargs: Any) -> None:
        if next(calls) == 5:
            raise RuntimeError("a kernel that fails")
        whole(self, *args, **kwargs)

    UpdateKernel.update = update  # type: ignore[method-assign]


def end_the_machinery(engine: Engine, machine: OffloadMachine) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the machinery of a lane fails")

    machine.lanes._publish = fail  # type: ignore[method-assign]


def tell(comm: Comm, given: OffloadCase, breaks: Breaks) -> dict[str, Any]:
    """Attempt, with any error as the text of one."""
    try:
        return attempt(comm, given, breaks)
    except RuntimeError as error:
        return {"error": str(error), "closed_s": 0.0, "host": 0}


@pytest.mark.parametrize("policy", ["fuyou", "all on nvme", "interleaved"])
@pytest.mark.parametrize(
    ("breaks", "text"),
    [
        (lose_a_thread, "SystemExit"),
        (fail_in_kernel, "a kernel that fails"),
        (end_the_machinery, "machinery of a lane"),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_a_thread_that_dies_surfaces_at_the_next_wait(policy: str, breaks: Breaks, text: str) -> None:
    began = time.perf_counter()
    [out] = run_world(1, tell, case_of(policy), breaks)
    check_error(out, text)
    assert time.perf_counter() - began < WATCHDOG_S, "before the watchdog"


@pytest.mark.parametrize("policy", ["fuyou", "zero-infinity"])
def test_a_transfer_that_never_ends_is_reported_by_the_watchdog_with_all_lanes(policy: str) -> None:
    env = {"WINDLASS_FAULT": "hang:nvme.read:step=60"}
    [out] = run_world(1, attempt, case_of(policy, watchdog_s=2.0, io_threads=1), env=env)
    check_error(out, "offload.watchdog_s", "lanes:", "file read: runs 'read ", "waiting:")


def interrupt(comm: Comm, given: OffloadCase, at: int) -> dict[str, Any]:
    """Break off in the middle of a step, with lanes at work, and close."""
    with folders(1) as paths:
        ledger = TierLedger()
        engine, machine = build(comm, given, paths, ledger)
        assert machine is not None
        first, second, *_ = given.steps()
        engine.train_step(first, LR)
        calls, whole = iter(range(1000)), torch.autograd.grad

        def grad(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == at:
                raise KeyboardInterrupt
            return whole(*args, **kwargs)

        torch.autograd.grad = grad
        with suppress(KeyboardInterrupt):
            engine.train_step(second, LR)
        torch.autograd.grad = whole
        began = time.perf_counter()
        machine.close()
        closed_s = time.perf_counter() - began
        until(lambda: not any(t.name.split(",")[0] in ("h2d", "d2h", "file read") for t in threading.enumerate()))
        return {"closed_s": closed_s, "host": ledger.current("host")}


@pytest.mark.parametrize("at", [0, 3, 7])
def test_a_step_that_is_broken_off_leaves_nothing_running(at: int) -> None:
    for policy in ("fuyou", "all on nvme"):
        [out] = run_world(1, interrupt, case_of(policy), at)
        assert out["closed_s"] < CLOSED_S and out["host"] == 0


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_units_of_a_few_elements_and_of_many_records_are_the_same_as_on_the_device(ranks: int) -> None:
    cases = []
    for width, blocks, chunk in ((2, 1, 2048), (130, 2, 2048), (130, 2, 1 << 22)):
        for policy in ("fuyou", "all on nvme", "interleaved"):
            model = {"width": width, "num_blocks": blocks, "tied": width == 2}  # its head then has 2 x 2 elements
            case = Case(ZeroConfig(stage=3), "bf16", micro_batches=2 * ranks, model=model)
            offload = replace(POLICIES[policy], chunk=chunk, slabs=1)
            cases.append(OffloadCase(case, offload, (LR,) * 3, (0.02, 5.0, 5.0)))
    check(ranks, cases)


def test_a_single_slab_serves_every_policy_with_throttled_lanes() -> None:
    # Slow drives and fast ones: the order in which slabs come free is another each time.
    for throttle in ({"file read": 2e7, "h2d": 4e7}, {"file write": 1e7, "cpu update": 5e7}, {"d2h": 1e7}):
        cases = [
            replace(case_of(policy, throttle=throttle, io_threads=3, lookahead=(4, 1, 0)), lrs=(LR,) * 3)
            for policy in ("fuyou", "all on nvme", "mlp-offload", "interleaved")
        ]
        check(1, cases)
