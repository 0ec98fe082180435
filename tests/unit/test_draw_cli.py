"""`windlass draw`: pictures of schedules, of jobs, and of what a run recorded."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from windlass.dist.trace import Tracer
from windlass.launch import cli
from windlass.parallel.pipeline.builders import BUILDERS, build
from windlass.parallel.pipeline.costs import Costs
from windlass.parallel.pipeline.passes import lower
from windlass.parallel.pipeline.simulate import simulate


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        cli.main(["draw", *arguments])
    out = capsys.readouterr()
    return int(left.value.code or 0), out.out, out.err


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("rank ")]


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("vocab", ["0", "2"])
def test_every_schedule_is_drawn_without_a_job(
    name: str, vocab: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "step.svg"
    arguments = ["--builder", name, "--ranks", "2", "--micro-batches", "4", "--vocab", vocab, "--svg", str(path)]
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and len(rows(out)) == 2 and f"{name}: 2 ranks, 4 micro-batches" in out
    assert all("idle" in row and "in flight" in row for row in rows(out))
    drawn = "".join(ET.parse(path).getroot().itertext())
    assert "forwards of a stage" in drawn and ("vocabulary algorithm 2" in drawn) == (vocab == "2")


def test_a_heavy_head_that_is_not_cut_leaves_the_other_ranks_idle(capsys: pytest.CaptureFixture[str]) -> None:
    def idle(*arguments: str) -> float:
        _, out, _ = run(capsys, "--builder", "1f1b", "--micro-batches", "16", "--head", "2", *arguments)
        return float(out.splitlines()[-2].split("%")[0].split()[-1])

    assert idle("--vocab", "0") > 50 > 20 > idle("--vocab", "2")


def test_a_schedule_file_is_drawn_and_a_broken_one_is_explained(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "own.txt"
    code, out, _ = run(capsys, "--builder", "zbv", "--ranks", "3", "--micro-batches", "2", "--write", str(path))
    assert code == 0 and f"wrote {path}" in out
    code, again, _ = run(capsys, "--builder", str(path))
    assert code == 0 and len(rows(again)) == 3 and rows(again) == rows(out)
    code, _, err = run(capsys, "--builder", "zbv", "--write", str(tmp_path / "no" / "own.txt"))
    assert code == 2 and "Give a file that can be written" in err
    assert run(capsys, "pipeline-vocab", "--write", str(path))[0] == 2
    path.write_text(path.read_text().replace("0F0 ", ""))
    code, _, err = run(capsys, "--builder", str(path))
    assert code == 3 and "0F0" in err and "Traceback" not in err


def test_a_job_is_drawn_as_it_is_planned(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "step.svg"
    code, out, _ = run(
        capsys, "pipeline-vocab", "--pipeline.schedule=1f1b", "train.global_batch=32", "--svg", str(path)
    )
    assert code == 0 and "1f1b with vocabulary algorithm 2, 8 micro-batches (as asked for)" in out
    assert len(rows(out)) == 2 and f"wrote {path}" in out and path.read_text().startswith("<svg")
    assert "forwards of a block" in path.read_text()
    code, out, _ = run(capsys, "pretrain-7b", "zero.stage=1", "parallelism.pp=2", "parallelism.dp_shard=4")
    assert code == 0 and len(rows(out)) == 2 and "of 15 " in out


def test_a_job_without_a_pipeline_is_one_stage(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "quickstart", "launch.workers=1", "train.global_batch=16")
    assert code == 0 and len(rows(out)) == 1 and "F0" in out and "B1" in out


def record(folder: Path, rank: int, step: int) -> None:
    """Write what the profiler of a run writes for one step of one rank."""
    tracer = Tracer(enabled=True)
    with tracer.span(f"step {step}", "step"):
        for action in (f"{rank}F0", f"{rank}B0"):
            with tracer.span(action, "compute", action=action):
                sum(range(20_000))
    tracer.write_chrome(folder / "traces" / f"timeline_rank{rank}_step{step}.json.gz", rank)


def test_what_a_run_recorded_is_drawn_from_its_newest_traces(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    mesh = {"pp": 2, "dp_replicate": 1, "dp_shard": 2}
    (tmp_path / "plan.json").write_text(json.dumps({"mesh": mesh}))
    (tmp_path / "traces").mkdir()
    code, _, err = run(capsys, "--from-trace", str(tmp_path))
    assert code == 2 and "no timeline of rank 0" in err and "profiler.all_ranks=true" in err
    for rank in (0, 2):  # the first data-parallel rank of either pipeline rank
        for step in (5, 12):
            record(tmp_path, rank, step)
    path = tmp_path / "step.svg"
    code, out, _ = run(capsys, "pipeline-vocab", "--from-trace", str(tmp_path), "--svg", str(path))
    assert code == 0 and len(rows(out)) == 4 and f"{tmp_path}: measured" in out
    assert "measured" in path.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give a JOB, --from-trace RUN, both of these, or --builder NAME"),
        (["pipeline-vocab", "--builder", "1f1b"], "give a JOB, --from-trace RUN"),
        (["--builder", "1f1c"], "no schedule '1f1c'"),
        (["--builder", "1f1b", "--svg", "/no/such/folder/x.svg"], "--svg /no/such/folder/x.svg: No such file"),
        (["--from-trace", "/no/such/run"], "no plan.json"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, *arguments)
    assert code in (2, 3) and err.count("\n") == 1 and words in err


@pytest.mark.parametrize("name", BUILDERS)
def test_the_costs_in_the_documentation_are_those_of_the_simulation(name: str) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "pipelines.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
    cells = [cell.strip() for cell in row.split("|")[3:-1]]

    def facts(vocab: int, head: float) -> tuple[str, str, str]:
        layout = build(name, 4, 1, vocab=vocab).layout
        chunks = layout.num_stages // 4
        costs = Costs.uniform(layout, head=head * chunks)
        timeline = simulate(lower(build(name, 4, 16, vocab=vocab, costs=costs)), costs)
        in_flight = " ".join(f"{held / chunks:g}" for held in timeline.peak_in_flight)
        return f"{timeline.total_s / chunks:g}", f"{sum(timeline.idle) / 4:.0%}".replace("%", " %"), in_flight

    plain, whole, cut = facts(0, 0.0), facts(0, 1.0), facts(2, 1.0)
    assert cells == [*plain, whole[0], cut[0], cut[2]]


LANES = Path(__file__).resolve().parents[2] / "docs" / "pictures" / "offload.yaml"


@pytest.mark.parametrize("option", ["--svg", "--out"])
def test_a_job_that_offloads_is_drawn_by_its_lanes(
    option: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "lanes.svg"
    code, out, _ = run(capsys, str(LANES), "offload.policy=fuyou", option, str(path))
    lanes = [line.split("|")[0].strip() for line in out.splitlines() if "busy " in line and "|" in line]
    assert code == 0 and lanes == ["compute", "h2d", "d2h", "file read", "file write", "cpu update"]
    assert "fuyou, 1 micro-batch (simulated, " in out and "update " in out and f"wrote {path}" in out
    drawn = "".join(ET.parse(path).getroot().itertext())
    assert "backward blocks.3" in drawn and "file write" in drawn


def test_what_the_planner_chooses_is_what_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, str(LANES), "offload.policy=auto", "cluster.device_bytes=16GB")
    assert code == 0 and "cpu update" in out and "file read" not in out, "no drive is named"
    code, out, _ = run(capsys, str(LANES), "offload.policy=auto", "cluster.device_bytes=80GB")
    assert code == 0 and len(rows(out)) == 1 and "cpu update" not in out, "all of it fits the device"


def test_rates_that_are_not_known_are_named_and_a_file_of_them_is_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["quickstart", "--world", "1", "offload.policy=zero-offload"]
    code, _, err = run(capsys, *arguments)
    assert code == 3 and err.count("\n") == 1 and "bench tiers" in err
    assert all(key in err for key in ("cluster.device_flops", "cluster.h2d_bytes_per_s", "cluster.cpu_update_per_s"))
    path = tmp_path / "cluster.yaml"
    path.write_text("device_flops: 1.0e+11\nh2d_bytes_per_s: 1.0e+9\ncpu_update_per_s: 1.0e+8\n")
    code, out, _ = run(capsys, *arguments, "--cluster", str(path))
    assert code == 0 and "zero-offload, " in out and "cpu update" in out


def test_a_pipeline_that_offloads_is_drawn_by_its_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "pipeline-vocab", "zero.stage=3", "offload.policy=zero-offload")
    assert code == 0 and len(rows(out)) == 2 and "what tiers move is left out" in out


def test_lanes_that_a_run_recorded_are_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"mesh": {"pp": 1, "dp_replicate": 1, "dp_shard": 1}}))
    (tmp_path / "traces").mkdir()
    tracer = Tracer(enabled=True)
    for step in (6, 7):
        with tracer.span(f"step {step}", "step"):
            for name, lane in (("0F0", "compute"), ("record head/0", "h2d")):
                with tracer.span(name, lane, action=name):
                    sum(range(20_000))
    tracer.write_chrome(tmp_path / "traces" / "timeline_rank0_step7.json.gz", 0)
    code, out, _ = run(capsys, "--from-trace", str(tmp_path), "--svg", str(tmp_path / "lanes.svg"))
    assert code == 0 and "step 7 (measured)" in out and "h2d" in out
    assert "record head/0" in (tmp_path / "lanes.svg").read_text()
