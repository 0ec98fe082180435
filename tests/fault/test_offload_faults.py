"""Tiers that break while an engine trains over them: a clear error or the right numbers, and never a hang.

What a state file alone does when its drive fails is in test_nvme_faults, what a whole run does in test_offload_runs.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.harness import GRACE_S, outcomes, run_world
from tests.parity.offload_case import OffloadCase, build, folders, run, same, settle, train, without
from tests.parity.test_offload import POLICIES, SOME, WIDTH
from tests.parity.test_offload_moved import workload
from tests.parity.test_zero import LR, Case
from windlass.dist.comm import Comm
from windlass.dist.errors import OffloadError, TierOutOfMemory
from windlass.offload.ledger import Limit, TierLedger
from windlass.offload.machine import OffloadMachine
from windlass.offload.plan_bytes import footprints
from windlass.parallel.engine import Engine
from windlass.parallel.zero import ZeroConfig

WATCHDOG_S = 60.0
CLOSED_S = 30.0  # lanes that are given up are waited for a second; a hang would take much longer
Breaks = Callable[[Engine, OffloadMachine], None]


def case_of(policy: str, ranks: int = 1, **changes: Any) -> OffloadCase:
    case = Case(ZeroConfig(stage=3), "bf16", "fp32", micro_batches=2 * ranks, model={"width": WIDTH, "frozen": True})
    offload = replace(POLICIES[policy], **{"chunk": 2048, "slabs": 1, "watchdog_s": WATCHDOG_S, **changes})
    return OffloadCase(case, offload, (LR,) * 4, SOME)


def attempt(comm: Comm, given: OffloadCase, breaks: Breaks | None = None, after: int = 1) -> dict[str, Any]:
    """Train, with something broken after some steps; return what came out, or the error, and the seconds to give up."""
    out: dict[str, Any] = {"warnings": []}
    ledger = TierLedger()
    with folders(given.drives) as paths:
        machine = None
        try:
            engine, machine = build(comm, given, paths, ledger, warn=out["warnings"].append)
            assert machine is not None
            if breaks is not None:
                run(comm, replace(given, lrs=given.lrs[:after]), engine, machine)
                breaks(engine, machine)
                rest = replace(given, lrs=given.lrs[after:], weights=given.weights[after:])
                out |= run(comm, rest, engine, machine)
            else:
                out |= run(comm, given, engine, machine)
        except OffloadError as error:
            out["error"] = f"{type(error).__name__}: {error}"
        finally:
            began = time.perf_counter()
            if machine is not None:
                machine.close()
            out["closed_s"] = time.perf_counter() - began
            out["host"] = ledger.current("host")
    return out


def check_error(out: dict[str, Any], *texts: str) -> None:
    """Check that an attempt ended in an error with these texts in it, quickly, and holds nothing any more."""
    assert all(text in out.get("error", "") for text in texts), (texts, out.get("error"), out.get("losses"))
    assert out["closed_s"] < CLOSED_S and out["host"] == 0


# -- budgets -----------------------------------------------------------------------------------------------------------


def least_budget(comm: Comm, given: OffloadCase, tier: str) -> dict[str, Any]:
    """Follow what the errors ask for, from one byte on, until training fits; return what was tried and foreseen."""
    tried, budget = [], 1
    while True:
        limits = {tier: Limit(budget, f"offload.{tier}_bytes")}
        tried.append(budget)
        with folders(1) as paths:
            try:
                engine, machine = build(comm, given, paths, TierLedger(limits))
                assert machine is not None
                for batches in given.steps():
                    engine.train_step(batches[comm.rank :: comm.size], LR)
                work = workload(engine, given, comm.size, given.case.micro_batches // comm.size)
                foreseen = footprints(machine.plan, work)[tier]
                machine.close()
                return {"tried": tried, "foreseen": foreseen, "peak": machine.ledger.peak(tier)}
            except TierOutOfMemory as error:
                text = str(error)
                assert f"tier '{tier}'" in text and f"Set offload.{tier}_bytes to at least" in text
                budget = int(text.split("to at least ")[1].split(",")[0])


def mostly_soak(*cases: tuple[str, ...], fast: int) -> list[Any]:
    """Return cases of which one in `fast` runs every time and the others in `make soak`."""
    return [case if i % fast == 0 else pytest.param(*case, marks=pytest.mark.soak) for i, case in enumerate(cases)]


@pytest.mark.parametrize(
    ("policy", "tier"), mostly_soak(("fuyou", "nvme"), ("zero-offload", "host"), ("zero-infinity", "host"), fast=3)
)
def test_what_refusals_ask_for_leads_to_the_least_budget_which_is_the_one_foreseen(policy: str, tier: str) -> None:
    given = replace(case_of(policy), lrs=(LR,) * 2, weights=())
    [found] = run_world(1, least_budget, given, tier)
    assert found["tried"][-1] == found["foreseen"] == found["peak"]
    assert sorted(found["tried"]) == found["tried"] and len(found["tried"]) > 2


def within(comm: Comm, given: OffloadCase, tier: str, less: int) -> tuple[str, int]:
    """Train within what an unlimited run takes at most, less some bytes; return the error and that peak."""
    peaks = []
    for limited in (False, True):
        limits = {tier: Limit(peaks[0] - less, f"offload.{tier}_bytes")} if limited else {}
        with folders(1) as paths:
            machine = None
            try:
                ledger = TierLedger(limits)
                engine, machine = build(comm, given, paths, ledger)
                run(comm, given, engine, machine)
                peaks.append(ledger.peak(tier))
            except TierOutOfMemory as error:
                return str(error), peaks[0]
            finally:
                if machine is not None:
                    machine.close()
    return "", peaks[0]


@pytest.mark.parametrize(
    ("policy", "tier"),
    mostly_soak(*product(("zero-infinity", "interleaved", "all on nvme"), ("device", "host", "nvme")), fast=4),
)
def test_one_byte_less_than_the_peak_is_refused_and_the_peak_is_enough(policy: str, tier: str) -> None:
    given = replace(case_of(policy), lrs=(LR,) * 2, weights=())
    [(text, peak)] = run_world(1, within, given, tier, 0)
    assert text == ""
    if peak:
        [(text, _)] = run_world(1, within, given, tier, 1)
        assert f"offload.{tier}_bytes" in text and "asks for" in text


# -- drives ------------------------------------------------------------------------------------------------------------


FULL, BROKEN = ("enospc", "write", "No space"), ("eio", "read", "Input/output")


@pytest.mark.parametrize(
    ("policy", "action", "verb", "what"),
    mostly_soak(
        *[(policy, *how) for policy in ("fuyou", "all on nvme", "mlp-offload") for how in (FULL, BROKEN)], fast=3
    ),
)
def test_a_drive_that_fails_at_any_transfer_is_named_and_nobody_hangs(
    policy: str, action: str, verb: str, what: str
) -> None:
    failed = 0
    for number in (1, 7, 30, 60, 100):
        [out] = run_world(1, attempt, case_of(policy), env={"WINDLASS_FAULT": f"{action}:nvme.{verb}:step={number}"})
        if "error" in out:  # a small number of transfers may end before
            check_error(out, what, "state.bin")
            failed += 1
    assert failed >= 3


def test_a_full_drive_on_one_rank_ends_all_of_them() -> None:
    env = {"WINDLASS_FAULT": "enospc:nvme.write:rank=1:step=70"}
    first, second = outcomes(2, attempt, case_of("fuyou", 2), env=env)
    check_error(second.value, "No space", "rank 1")
    assert type(first.error).__name__ == "CommError"


def test_a_killed_rank_does_not_leave_its_peer_waiting() -> None:
    env = {"WINDLASS_FAULT": "kill:nvme.read:rank=0:step=40"}
    began = time.perf_counter()
    first, second = outcomes(2, attempt, case_of("all on nvme", 2), env=env)
    assert "SIGKILL" in first.text and type(second.error).__name__ == "CommError"
    assert time.perf_counter() - began < GRACE_S, "it heard of it by itself"


def full_at_start(comm: Comm, given: OffloadCase) -> dict[str, Any]:
    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    os.posix_fallocate = refuse  # in this process only, which ends with the test
    return attempt(comm, given)


def test_a_drive_without_room_refuses_before_training() -> None:
    [out] = run_world(1, full_at_start, case_of("fuyou"))
    check_error(out, "offload.nvme_bytes", "cluster.nvme_paths")


def limit_file_size(engine: Engine, machine: OffloadMachine) -> None:
    half = machine.files[0].num_bytes // 2 + 1000
    resource.setrlimit(resource.RLIMIT_FSIZE, (half, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def cut_short(engine: Engine, machine: OffloadMachine) -> None:
    os.truncate(machine.files[0].path, machine.files[0].num_bytes // 3)


def flip_bytes(engine: Engine, machine: OffloadMachine) -> None:
    path = machine.files[0].path
    with open(path, "r+b") as file:
        for at in range(100, machine.files[0].num_bytes, 4096):
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def forget_a_version(engine: Engine, machine: OffloadMachine) -> None:
    machine.store.stamp("blocks.0/param", 0)


@pytest.mark.parametrize("policy", ["fuyou", "all on nvme"])
@pytest.mark.parametrize(
    ("breaks", "texts"),
    [
        (limit_file_size, ("state.bin",)),
        (cut_short, ("state.bin",)),
        (flip_bytes, ("embed/param", "are damaged")),
        (forget_a_version, ("version",)),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_files_that_are_cut_damaged_or_limited_are_named(policy: str, breaks: Breaks, texts: tuple[str, ...]) -> None:
    [out] = run_world(1, attempt, case_of(policy, checksums=True), breaks)
    check_error(out, *texts)


def test_training_goes_on_through_the_page_cache_where_direct_access_is_refused() -> None:
    given = case_of("fuyou")
    [out] = run_world(1, attempt, given, env={"WINDLASS_FAULT": "einval:nvme.open"})
    [plain] = run_world(1, train, without(given))
    same([out], [plain], given)
    assert len(out["warnings"]) == 1 and "page cache" in out["warnings"][0]


def two_at_once(comm: Comm, given: OffloadCase) -> dict[str, Any]:
    with folders(1) as paths:
        engine, machine = build(comm, given, paths)
        second = ""
        try:
            build(comm, given, paths)
        except OffloadError as error:
            second = str(error)
        other, apart = build(comm, given, paths, identity="another")  # not the same run
        out = {"second": second, "first": run(comm, given, engine, machine), "other": run(comm, given, other, apart)}
        for each in (machine, apart):
            assert each is not None
            each.close()
        out["left"] = os.listdir(paths[0])
    return out


def test_two_machines_of_one_run_do_not_share_a_folder_and_those_of_two_runs_can() -> None:
    given = replace(case_of("all on nvme"), lrs=(LR,) * 2)
    [out] = run_world(1, two_at_once, given)
    assert "is open here already" in out["second"]
    [plain] = run_world(1, train, without(given))
    for name in ("first", "other"):
        same([out[name]], [plain], name)
    assert out["left"] == []


# -- misuse ------------------------------------------------------------------------------------------------------------


def without_a_drive(comm: Comm, given: OffloadCase, folder: str) -> list[str]:
    texts = []
    for paths in ([], [folder]):
        try:
            build(comm, given, paths)
        except OffloadError as error:
            texts.append(str(error))
    return texts


def test_a_machine_without_a_usable_folder_says_so(tmp_path: Path) -> None:
    missing = tmp_path / "not" / "there"
    [[empty, absent]] = run_world(1, without_a_drive, case_of("fuyou"), str(missing))
    assert "cluster.nvme_paths is empty" in empty and str(missing) in absent
    assert not missing.exists()


def keep_open(comm: Comm, given: OffloadCase) -> str:
    """Read state as a checkpoint does, give nothing back, and train on."""
    with folders(1) as paths:
        engine, machine = build(comm, given, paths)
        assert machine is not None
        engine.train_step(given.steps()[0], LR)
        for piece in engine.owned()[:3]:
            assert piece.tensor.isfinite().all()
        try:
            engine.train_step(given.steps()[1], LR)
            settle(machine)
        except OffloadError as error:
            return str(error)
        finally:
            machine.close()
    return ""


def test_state_that_was_lent_for_saving_does_not_stop_the_next_step() -> None:
    for policy in ("fuyou", "all on nvme", "mlp-offload"):
        [text] = run_world(1, keep_open, case_of(policy))
        assert text == "", (policy, text)
