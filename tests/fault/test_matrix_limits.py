"""What is full, slow or given wrongly: training goes on where it can, and says what is missing where it cannot.

Rows of the fault matrix:
    16  full disk, full memory  -> test_a_disk_that_is_full_*, test_memory_that_others_fill_*, test_too_little_memory_*
    17  slow link               -> test_a_slow_link_*
    25  two jobs on one host    -> test_jobs_that_share_*, test_what_a_dead_job_left_*
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

from tests.fault.memory_runs import Act, Lab, Live, Told, end_all
from windlass.checkpoint.memory.folder import list_jobs
from windlass.checkpoint.store import list_checkpoints
from windlass.dist.errors import CheckpointError, ConfigError, PlanError
from windlass.launch.metrics import read_metrics

MIB = 1 << 20


def warnings(told: Told) -> str:
    events = read_metrics(told.run / "metrics.jsonl")
    return "\n".join(event["message"] for event in events if event.get("event") == "warning")


def saved(told: Told) -> list[int]:
    return sorted(info.step for info in list_checkpoints(told.run / "checkpoints") if info.problem is None)


class Mounted:
    """File systems in memory of a few MiB."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, list[Path]()

    def make(self, num_bytes: int) -> Path:
        place = self.folder / f"small-{len(self.made)}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(place)], check=False)
        if done.returncode:
            pytest.skip("a small file system cannot be mounted here")
        self.made.append(place)
        return place


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Mounted]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mounted = Mounted(tmp_path)
    yield mounted
    for place in mounted.made:
        end_all(place)
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(folder: Path) -> Path:
    """Write into a file system until it is full."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return path


# -- full --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["write", "manifest", "rename"])
def test_a_disk_that_is_full_at_any_moment_of_a_checkpoint_leaves_no_trace_and_training_goes_on(
    moment: str, lab: Lab
) -> None:
    told = lab.run(spares=0, fault=f"enospc:persist.{moment}:step=4", settings=["checkpoint.every=4"])
    told.check(lab.undisturbed(), restarts=0)
    assert saved(told) == [8, 12]
    assert "No space left" in warnings(told) and "step 4" in warnings(told)
    assert not list((told.run / "checkpoints").glob(".step-*"))


def test_a_disk_that_is_too_small_for_the_last_checkpoint_leaves_the_last_step_in_memory(
    lab: Lab, mounted: Mounted
) -> None:
    disk = mounted.make(128 << 10)
    told = lab.run(spares=0, settings=[f"checkpoint.url=file://{disk}/run", "checkpoint.every=4"], keep=True)
    try:
        assert told.code == 0, told.said
        assert "CHECKPOINT NOT SAVED" in warnings(told) and "590.0 KiB" in warnings(told)
        assert {folder.node for folder in list_jobs(told.memory)} == {"node-0", "node-1"}
        subprocess.run(["mount", "-o", "remount,size=8M", str(disk)], check=True)
        again = lab.run(spares=0, settings=[f"checkpoint.url=file://{disk}/run", "checkpoint.every=4"], after=told)
        assert (again.code, again.leftovers) == (0, []), again.said
        assert [info.step for info in list_checkpoints(f"file://{disk}/run")] == [12]
        assert len(again.every_step) == 12, "no step was done again"
    finally:
        end_all(told.memory)


def test_memory_that_others_fill_does_not_stop_training_nor_recovery(lab: Lab, mounted: Mounted) -> None:
    memory = mounted.make(32 * MIB)
    told = lab.run(
        spares=0,
        memory=memory,
        strikes=[Act(3, lambda live: fill(memory)), "smp=1@step=5"],
        fault="kill:train.forward:rank=1:step=8:generation=1",
    )
    told.check(lab.undisturbed(), restarts=1)
    assert told.restored[0][1] == "ram"


def test_too_little_memory_is_said_with_what_is_needed_before_the_first_step(lab: Lab, mounted: Mounted) -> None:
    told = lab.run(spares=0, memory=mounted.make(9 * MIB), settings=["recovery.max_restarts=0"])
    assert told.code == CheckpointError.exit_code
    assert "MiB" in told.said and "Give it" in told.said and "snapshot.folder" in told.said
    assert told.every_step == [] and told.leftovers == []


# -- slow --------------------------------------------------------------------------------------------------------------


def test_a_slow_link_skips_snapshots_and_counts_them_and_training_waits_at_its_own_gate_only(lab: Lab) -> None:
    sizes: list[int] = []

    def look(live: Live) -> None:
        status = live.status()
        sizes.append(status.resident["own"])

    acts = [Act(2, look), Act(11, look)]
    told = lab.run(spares=0, strikes=acts, settings=["snapshot.link_bytes_per_s=400000"])
    told.check(lab.undisturbed(), restarts=0)
    last = told.history[-1]["snapshot"]
    assert last["skipped"] > 0
    assert sizes[1] - sizes[0] < 8 * MIB
    usual = median(entry["step_s"] for entry in lab.undisturbed().history)
    own = median(entry["step_s"] - entry["snapshot"]["blocked_s"] for entry in told.history[1:])
    assert own < 5 * usual + 0.2, "beyond the gate, steps take what they take"
