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
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

from tests.fault.memory_runs import Act, Lab, Live
from tests.fault.oracle import EXACT, Told
from tests.leftovers import end_all
from tests.waiting import until
from windlass.checkpoint.memory import pids
from windlass.checkpoint.memory.folder import list_jobs
from windlass.checkpoint.store import list_checkpoints
from windlass.dist.errors import CheckpointError, ConfigError, PlanError
from windlass.launch.check import check_job
from windlass.launch.config import load_job
from windlass.launch.metrics import read_metrics

MIB = 1 << 20


def warnings(told: Told) -> str:
    events = read_metrics(told.run / "metrics.jsonl")
    return "\n".join(event["message"] for event in events if event.get("event") == "warning")


def saved(told: Told) -> list[int]:
    return sorted(info.step for info in list_checkpoints(told.run / "checkpoints") if info.problem is None)


def check_went_on(told: Told, lab: Lab) -> None:
    """Check that a run that was started again did no step twice, and each as the undisturbed run."""
    assert (told.code, told.leftovers) == (0, []), told.said
    right = [[entry[key] for key in EXACT] for entry in lab.undisturbed().history]
    assert [[entry[key] for key in EXACT] for entry in told.every_step] == right


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
    def given_up(live: Live) -> None:
        """Wait until nobody tries any more to write step 4: step 8 would be left out while somebody does."""
        until(lambda: "step 4 could not be written" in live.status().last_error)

    told = lab.run(
        spares=0,
        fault=f"enospc:persist.{moment}:step=4",
        strikes=[Act(5, given_up)],
        settings=["checkpoint.every=4"],
    )
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


@pytest.mark.soak
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
    told = lab.run(spares=0, memory=mounted.make(9 * MIB))
    assert told.code == PlanError.exit_code, "a restart would not mend it"
    assert "MiB" in told.said and "Give it" in told.said and "snapshot.folder" in told.said
    assert "the same would happen again" in told.said and "suspect" not in told.said
    assert told.every_step == [] and told.leftovers == []


# -- slow --------------------------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_a_slow_link_skips_snapshots_and_counts_them_and_training_waits_at_its_own_gate_only(lab: Lab) -> None:
    sizes: list[int] = []

    def look(live: Live) -> None:
        status = live.status()
        sizes.append(status.resident["own"])

    acts = [Act(2, look), Act(11, look)]
    slow = ["snapshot.link_bytes_per_s=700000", "snapshot.slots=2"]
    told = lab.run(spares=0, strikes=acts, settings=slow, pace=())
    told.check(lab.undisturbed(), restarts=0)
    last = told.history[-1]["snapshot"]
    assert last["skipped"] > 0
    assert sizes[1] - sizes[0] < 8 * MIB
    usual = median(entry["step_s"] for entry in lab.undisturbed().history)
    own = median(entry["step_s"] - entry["snapshot"]["blocked_s"] for entry in told.history[1:])
    assert own < 5 * usual + 0.2, "beyond the gate, steps take what they take"


# -- given wrongly -----------------------------------------------------------------------------------------------------


def test_a_group_larger_than_there_are_nodes_is_refused_with_the_size_that_works(lab: Lab) -> None:
    told = lab.run(spares=0, settings=["snapshot.group=3", "recovery.max_restarts=0"])
    assert told.code == PlanError.exit_code and told.every_step == []
    assert "snapshot.group" in told.said and "2" in told.said
    assert told.leftovers == []


def test_ranks_that_protect_each_other_on_one_machine_are_warned_of(lab: Lab) -> None:
    told = lab.run(nodes=1, spares=0)
    assert told.code == 0 and "node-0" in warnings(told)


def test_storage_that_cannot_be_written_is_refused_before_anything_starts(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    keys = [f"checkpoint.url=file://{tmp_path}/file/run", "checkpoint.mode=lazy", f"train.run_dir={tmp_path}/run"]
    with pytest.raises(ConfigError, match=r"checkpoint\.url = .*/file/run': cannot be written"):
        check_job(load_job(lab.job, [*keys, "launch.workers=2"]), 2)


@pytest.mark.soak
def test_snapshots_of_another_shape_of_the_model_are_refused_by_name_and_stay(lab: Lab) -> None:
    stopping = ["recovery.max_restarts=0"]
    died = lab.run(spares=0, fault="kill:train.forward:rank=1:step=4", settings=stopping, keep=True)
    assert died.code == 128 + signal.SIGKILL, died.said
    other = lab.run(spares=0, settings=[*stopping, "model.hidden_size=64"], after=died, keep=True)
    assert other.code == CheckpointError.exit_code
    assert "embed" in other.said and "32" in other.said and "64" in other.said
    again = lab.run(spares=0, settings=stopping, after=died)
    check_went_on(again, lab)


# -- several jobs ------------------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_jobs_that_share_a_folder_in_memory_do_not_see_each_other(lab: Lab) -> None:
    stopping = ["recovery.max_restarts=0"]
    died = lab.run(spares=0, fault="kill:train.forward:rank=1:step=4", settings=stopping, keep=True)
    held = {folder.job for folder in list_jobs(died.memory)}
    other = lab.run(spares=0, memory=died.memory, keep=True)
    other.check(lab.undisturbed(), restarts=0)
    assert {folder.job for folder in list_jobs(died.memory)} == held, "the other job's is gone, this one's is here"
    again = lab.run(spares=0, settings=stopping, after=died)
    check_went_on(again, lab)


@pytest.mark.soak
def test_what_a_dead_job_left_goes_with_its_lease_when_another_one_starts(lab: Lab) -> None:
    stopping = ["recovery.max_restarts=0", "snapshot.lease_s=100"]
    memory, fault = lab.new_memory(), "kill:train.forward:rank=1:step=2"
    for _ in range(2):
        assert lab.run(spares=0, fault=fault, settings=stopping, memory=memory, keep=True).code != 0
    early, late = sorted({folder.job for folder in list_jobs(memory)})
    for folder in list_jobs(memory):
        served = folder.read_smp()
        assert served is not None and pids.kill([(served.pid, served.started)], 5.0) == []
        if folder.job == early:
            os.utime(folder.lease_path, (0, time.time() - 101))
    lab.run(spares=0, memory=memory, keep=True).check(lab.undisturbed(), restarts=0)
    assert {folder.job for folder in list_jobs(memory)} == {late}
    end_all(memory)
