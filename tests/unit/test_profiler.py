"""The profiler window: which steps it records, and what it writes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from windlass.dist.trace import Tracer
from windlass.launch.profiler import ProfilerConfig, StepProfiler


def run_steps(profiler: StepProfiler, steps: range) -> dict[int, list[str]]:
    written = {}
    for step in steps:
        with profiler.step(step) as window, profiler.tracer.span("work", "compute", step=step):
            torch.ones(4).sum()
        if window.files:
            written[step] = window.files
    return written


def test_the_window_is_written_once_with_exactly_its_steps(tmp_path: Path) -> None:
    profiler = StepProfiler(ProfilerConfig(start_step=3, num_steps=2, shapes=True), tmp_path / "traces", 0, Tracer())
    written = run_steps(profiler, range(1, 8))
    assert list(written) == [4]
    timeline, operators = (json.loads(gzip.decompress(Path(file).read_bytes())) for file in written[4])
    work = [event for event in timeline["traceEvents"] if event["name"] == "work"]
    assert [event["args"]["step"] for event in work] == [3, 4]
    assert [event["name"] for event in timeline["traceEvents"] if event["name"].startswith("step ")] == [
        "step 3",
        "step 4",
    ]
    assert any(event["name"] == "aten::sum" for event in operators["traceEvents"])


def test_a_run_resumed_inside_the_window_records_the_rest_of_it(tmp_path: Path) -> None:
    profiler = StepProfiler(ProfilerConfig(start_step=3, num_steps=4, operators=False), tmp_path, 0, Tracer())
    written = run_steps(profiler, range(5, 9))
    assert list(written) == [6]


def test_a_run_that_ends_inside_the_window_writes_what_it_has(tmp_path: Path) -> None:
    profiler = StepProfiler(ProfilerConfig(start_step=2, num_steps=9, operators=False), tmp_path, 0, Tracer())
    assert run_steps(profiler, range(1, 4)) == {}
    assert [Path(file).name for file in profiler.close(3).files] == ["timeline_rank0_step3.json.gz"]
    assert profiler.close(3).files == []


@pytest.mark.parametrize(("all_ranks", "count"), [(False, 0), (True, 1)])
def test_other_ranks_record_only_when_asked(tmp_path: Path, all_ranks: bool, count: int) -> None:
    config = ProfilerConfig(start_step=1, num_steps=1, operators=False, all_ranks=all_ranks)
    profiler = StepProfiler(config, tmp_path, 1, Tracer())
    assert len(run_steps(profiler, range(1, 3))) == count


def test_a_trace_that_cannot_be_written_is_a_problem_not_an_error(tmp_path: Path) -> None:
    (tmp_path / "traces").write_text("in the way")
    profiler = StepProfiler(
        ProfilerConfig(start_step=1, num_steps=1, operators=False), tmp_path / "traces", 0, Tracer()
    )
    with profiler.step(1) as window:
        pass
    assert window.files == []
    assert "cannot write into" in window.problem
