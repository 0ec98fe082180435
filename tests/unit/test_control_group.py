"""What control groups leave of memory: of Slurm and systemd, in and out of containers, in both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from windlass.dist.control_group import memory_left, memory_limit

MIB = 1 << 20


def group(folder: Path, limit: str, used: int = 0, cache: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\n")


def process(folder: Path, groups: str, *mounts: str) -> Path:
    """Write what /proc says of a process; `mounts`: root, place, type and options."""
    (folder / "proc").mkdir()
    (folder / "proc" / "cgroup").write_text(groups)
    rows = [mount.split() for mount in ("/ / ext4 rw", *mounts)]
    lines = [f"3{i} 1 0:3{i} {r} {p} rw,nosuid shared:4 - {t} {t} {o}\n" for i, (r, p, t, o) in enumerate(rows)]
    (folder / "proc" / "mountinfo").write_text("".join(lines))
    return folder / "proc"


@pytest.mark.parametrize("limited", ["job_7", "job_7/step_0", "job_7/step_0/task_1"])
def test_the_group_of_the_process_and_those_around_it_limit(tmp_path: Path, limited: str) -> None:
    here = tmp_path / "cgroup"
    for path in ("job_7", "job_7/step_0", "job_7/step_0/task_1"):
        group(here / path, "max")
    group(here / limited, str(100 * MIB), 60 * MIB)
    group(here / "job_8", str(MIB))  # of somebody else
    facts = process(tmp_path, "0::/job_7/step_0/task_1\n", f"/ {here} cgroup2 rw,nsdelegate")
    assert memory_left(facts) == 40 * MIB and memory_limit(facts) == 100 * MIB
    group(here / limited, "max")
    assert memory_left(facts) is None and memory_limit(facts) is None


def test_the_least_of_several_counts_and_pages_of_files_that_nobody_reads_give_way(tmp_path: Path) -> None:
    here = tmp_path / "cgroup"
    group(here / "a", str(100 * MIB), 90 * MIB)
    group(here / "a/b", str(80 * MIB), 75 * MIB, cache=3 * MIB)
    assert memory_left(process(tmp_path, "0::/a/b\n", f"/ {here} cgroup2 rw")) == 8 * MIB
    group(here / "a/b", str(80 * MIB), 81 * MIB)
    assert memory_left(tmp_path / "proc") == 0


@pytest.mark.parametrize(("path", "root"), [("/docker/c1", "/docker/c1"), ("/", "/"), ("/../other", "/")])
def test_a_container_sees_its_group_at_the_root_of_the_mount(tmp_path: Path, path: str, root: str) -> None:
    group(tmp_path / "cgroup", str(100 * MIB), MIB)
    group(tmp_path / "other", str(MIB))
    assert memory_left(process(tmp_path, f"0::{path}\n", f"{root} {tmp_path / 'cgroup'} cgroup2 rw")) == 99 * MIB


def test_version_1_has_its_memory_controller(tmp_path: Path) -> None:
    here = tmp_path / "memory" / "slurm" / "job_7"
    here.mkdir(parents=True)
    (here / "memory.limit_in_bytes").write_text(f"{100 * MIB}\n")
    (here / "memory.usage_in_bytes").write_text(f"{70 * MIB}\n")
    (here / "memory.stat").write_text(f"inactive_file 0\ntotal_inactive_file {5 * MIB}\n")
    groups = "5:cpu,cpuacct:/elsewhere\n4:memory:/slurm/job_7\n0::/\n"
    mounts = [f"/ {tmp_path / 'cpu'} cgroup rw,cpu,cpuacct", f"/ {tmp_path / 'memory'} cgroup rw,memory"]
    assert memory_left(process(tmp_path, groups, *mounts, f"/ {tmp_path / 'unified'} cgroup2 rw")) == 35 * MIB


def test_without_a_limit_or_without_groups_nothing_is_known(tmp_path: Path) -> None:
    group(tmp_path / "cgroup", "max", 7)
    assert memory_left(process(tmp_path, "0::/\n", f"/ {tmp_path / 'cgroup'} cgroup2 rw")) is None
    assert memory_left(tmp_path / "nowhere") is None


def test_the_groups_of_this_process_can_be_read() -> None:
    left = memory_left()
    assert left is None or left > 0
