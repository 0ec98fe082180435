"""The environment: every launcher is understood, contradictions are named, faults happen where they are asked for."""

import errno
import os
from typing import Any

import pytest

from windlass.dist.env import Fault, ProcessEnv, expand_hostlist, expand_tasks, fault, read_process_env
from windlass.dist.errors import ConfigError, WorkerError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "123456",
}


def test_no_variables_are_a_world_of_one() -> None:
    assert read_process_env({"PATH": "/bin"}) == ProcessEnv()


def test_torchruns_variables_are_understood() -> None:
    assert read_process_env(TORCHRUN) == ProcessEnv(5, 1, 8, 4, 1, "node-0", 29500, None, "torchrun")


def test_a_slurm_step_is_understood() -> None:
    assert read_process_env(SLURM) == ProcessEnv(5, 1, 7, 3, 1, "gpu07", 23456, None, "slurm")


def test_torchrun_inside_slurm_wins_and_a_batch_script_is_one_process() -> None:
    assert read_process_env(SLURM | TORCHRUN).launcher == "torchrun"
    assert read_process_env({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == ProcessEnv()


@pytest.mark.parametrize(
    "env",
    [
        ProcessEnv(1, 1, 2, 2, 0, rendezvous="file:///tmp/x", launcher="local"),
        ProcessEnv(5, 1, 8, 4, 1, "10.0.0.1", 4000, None, "ray"),
    ],
)
def test_a_child_reads_back_what_its_launcher_wrote(env: ProcessEnv) -> None:
    assert read_process_env(env.variables()) == env


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"WORLD_SIZE": None}, "RANK is set but WORLD_SIZE is not"),
        ({"RANK": None}, "WORLD_SIZE is set but RANK is not"),
        ({"RANK": "8"}, "RANK=8 but WORLD_SIZE=8"),
        ({"RANK": "one"}, "RANK = 'one': must be a number"),
        ({"LOCAL_RANK": None}, "needs LOCAL_RANK and LOCAL_WORLD_SIZE"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4 but LOCAL_WORLD_SIZE=4"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9 is more than WORLD_SIZE=8"),
        ({"MASTER_ADDR": None}, "needs MASTER_ADDR"),
        ({"MASTER_PORT": None}, "needs MASTER_PORT"),
        ({"WINDLASS_RENDEZVOUS": "/tmp/x"}, "must look like file:///path"),
        ({"WINDLASS_LAUNCHER": "mpi"}, "must be one of local, torchrun"),
    ],
)
def test_contradictions_are_named(change: dict[str, Any], words: str) -> None:
    environ = {k: v for k, v in (TORCHRUN | change).items() if v is not None}
    with pytest.raises(ConfigError, match=words):
        read_process_env(environ)


def test_slurm_lists_are_written_out() -> None:
    assert expand_hostlist("n[01-03,7],gpu5,r[1-2]c[8-9]") == [
        *("n01", "n02", "n03", "n7", "gpu5", "r1c8", "r1c9", "r2c8", "r2c9")
    ]
    assert expand_tasks("4(x2),3") == [4, 4, 3] and expand_hostlist("") == []


def test_a_fault_happens_only_at_its_door_rank_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    fault("step", rank=1, step=3)
    monkeypatch.setenv("WINDLASS_FAULT", "raise:rank=1:step=3")
    fault("step", rank=0, step=3)
    fault("step", rank=1, step=2)
    fault("checkpoint", rank=1, step=3)
    with pytest.raises(WorkerError, match="rank 1: fault injected at step, step 3"):
        fault("step", rank=1, step=3)
    monkeypatch.setenv("WINDLASS_FAULT", "enospc:checkpoint")
    with pytest.raises(OSError, match="No space left") as caught:
        fault("checkpoint", rank=4, step=9)
    assert caught.value.errno == errno.ENOSPC


def test_several_faults_strike_at_their_own_doors_and_generations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDLASS_FAULT", "raise:smp.vote:generation=2,eio:persist.write:rank=1")
    fault("smp.vote", rank=0, step=1, generation=1)
    fault("persist.write", rank=0, step=1)
    with pytest.raises(WorkerError, match="vote, step 7"):
        fault("smp.vote", rank=0, step=7, generation=2)
    with pytest.raises(OSError, match="write"):
        fault("persist.write", rank=1, step=1, generation=5)
    monkeypatch.setenv("WINDLASS_GENERATION", "2")
    with pytest.raises(WorkerError, match="vote, step 3"):
        fault("smp.vote", rank=0, step=3)


@pytest.mark.parametrize(("action", "code"), [("eio", errno.EIO), ("einval", errno.EINVAL), ("enospc", errno.ENOSPC)])
def test_a_fault_can_be_an_error_of_the_system(monkeypatch: pytest.MonkeyPatch, action: str, code: int) -> None:
    monkeypatch.setenv("WINDLASS_FAULT", f"{action}:nvme.write:step=2")
    fault("nvme.write", rank=0, step=1)
    with pytest.raises(OSError, match=f"{os.strerror(code)} .injected at nvme.write") as caught:
        fault("nvme.write", rank=0, step=2)
    assert caught.value.errno == code


def test_a_misspelt_fault_is_an_error() -> None:
    assert Fault.parse("hang:data:rank=2") == Fault("hang", "data", 2, None)
    for text in ("explode", "raise:rank=1:when=3", "raise:a:b", "raise:rank=one"):
        with pytest.raises(ConfigError, match="WINDLASS_FAULT"):
            Fault.parse(text)
