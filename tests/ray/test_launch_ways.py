"""The same job, really trained, under the local launcher, torchrun and Ray over two nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from windlass.data.prepare import prepare

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120.0
JOB = """
model: {{vocab_size: 257, hidden_size: 32, num_layers: 2, num_heads: 2, max_seq_len: 64}}
data: {{path: {data}}}
train: {{steps: 4, seq_len: 64, micro_batch: 2, device: cpu, eval_batches: 1}}
zero: {{stage: 3}}
parallelism: {{timeout_s: {timeout_s:g}}}
metrics: {{tensorboard: false}}
checkpoint: {{at_end: false}}
launch: {{workers: 2, threads: 1}}
"""
WAYS = ("local", "torchrun", "ray")


@dataclass
class Done:
    """How a launch ended: exit code, its output, and seconds from rank 0's line of step 2 to the end."""

    code: int
    out: str
    since_step_2_s: float


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job of four steps on a little text."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "text.txt").write_text("\n".join(f"line {i} says {i * i}" for i in range(2000)))
    prepare([folder / "text.txt"], folder / "tokens", workers=1, validation=0.0)
    file = folder / "job.yaml"
    file.write_text(JOB.format(data=folder / "tokens", timeout_s=TIMEOUT_S))
    return file


def launch(way: str, job: Path, run_dir: Path, cluster: Cluster, fault: str = "") -> Done:
    windlass = [sys.executable, "-m", "windlass"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "windlass"]
    command = {
        "local": [*windlass, "train", str(job)],
        "torchrun": [*torchrun, "train", str(job)],
        "ray": [*windlass, "launch", str(job), "--ray", cluster.address, "--nodes", "2", "--spread"],
    }[way]
    process = subprocess.Popen(
        [*command, f"train.run_dir={run_dir}"],
        cwd=ROOT,
        env={**os.environ, "WINDLASS_FAULT": fault, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines, seen = [], time.monotonic()
    for line in process.stdout:
        lines.append(line)
        if "step: 2 " in line:
            seen = time.monotonic()
    return Done(process.wait(), "".join(lines), time.monotonic() - seen)


def losses(run_dir: Path) -> list[str]:
    """Return the losses of the steps as they are written, digit by digit."""
    events = [json.loads(line, parse_float=str) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if "event" not in event]  # steps are the lines without a name


def test_three_ways_to_launch_give_bitwise_the_same_losses(job: Path, tmp_path: Path, cluster: Cluster) -> None:
    by_way = {}
    for way in WAYS:
        done = launch(way, job, tmp_path / way, cluster)
        assert done.code == 0, done.out
        by_way[way] = losses(tmp_path / way)
    assert len(by_way["local"]) == 4
    assert by_way["torchrun"] == by_way["local"]
    assert by_way["ray"] == by_way["local"]


KILLED, RAISED = ("kill", "SIGKILL", 137), ("raise", "WorkerError: rank 1: fault injected", 10)


@pytest.mark.parametrize(
    ("way", "fault", "cause", "code"),
    [
        ("local", *RAISED),
        ("ray", *KILLED),
        pytest.param("local", *KILLED, marks=pytest.mark.soak),
        pytest.param("torchrun", *KILLED, marks=pytest.mark.soak),
        pytest.param("torchrun", *RAISED, marks=pytest.mark.soak),
        pytest.param("ray", *RAISED, marks=pytest.mark.soak),
    ],
)
def test_a_rank_that_fails_stops_all_within_seconds_with_its_cause_first(
    way: str, fault: str, cause: str, code: int, job: Path, tmp_path: Path, cluster: Cluster
) -> None:
    done = launch(way, job, tmp_path, cluster, fault=f"{fault}:rank=1:step=3")
    assert "step: 2 " in done.out, done.out
    assert done.since_step_2_s < TIMEOUT_S / 2, "nobody waits for a lost peer until it times out"
    if way == "torchrun":
        assert done.code != 0
        root_cause = done.out[done.out.index("Root Cause") :]
        assert cause in root_cause and "rank      : 1" in root_cause
    else:
        assert done.code == code, done.out
        reports = [line for line in done.out.splitlines() if line.startswith("windlass: ") and "failed" in line]
        assert "rank 1 failed first" in reports[0] and cause in reports[0], done.out
