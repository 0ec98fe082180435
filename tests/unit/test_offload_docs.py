"""docs/offload.md: its tables are those of the byte formulas, the program of a step and the simulation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from windlass.launch import cli
from windlass.offload.compile import build_program
from windlass.offload.placement import OffloadPlan, Sizes, plan_offload
from windlass.offload.plan_bytes import plan_bytes
from windlass.offload.policy import OffloadConfig
from windlass.offload.program import COPY_LANES, step_bytes
from windlass.offload.workload import Workload, uniform_workload

DOCS = Path(__file__).resolve().parents[2] / "docs"
CHUNK, CHUNKS, BLOCKS = 1 << 18, 4, 8
BLOCK = CHUNK * CHUNKS
SIZES = Sizes(param=2, reduce=4, master=4, num_states=2)
RESTING = ("param", "grad", "optimizer")


def rows(head: str) -> list[list[str]]:
    """Return the cells of the table that begins with a header."""
    lines = iter((DOCS / "offload.md").read_text().split(head, 1)[1].splitlines()[2:])

    def found() -> Iterator[list[str]]:
        for line in lines:
            if not line.startswith("|"):
                return
            yield [cell.strip() for cell in line.split("|")[1:-1]]

    return list(found())


def value(formula: str, **names: float) -> float:
    return float(eval(formula.strip("`"), {"__builtins__": {}}, names))


def planned(work: Workload, policy: str, **changes: Any) -> OffloadPlan:
    config = OffloadConfig(policy=policy, chunk=CHUNK, **changes)
    plan = plan_offload(config, work.units, SIZES, clips=work.clips, accumulates=work.accumulates)
    assert plan is not None
    return plan


@pytest.mark.parametrize("row", rows("| policy | device | host | nvme |"), ids=lambda row: row[0])
def test_bytes_at_rest_are_those_of_the_plan(row: list[str]) -> None:
    name = row[0].split("`")[1]
    expected = [value(cell, p=2, r=4) for cell in row[1:]]
    if name == "none":
        assert expected == [2 + 4 + 12, 0, 0]
        return
    work = uniform_workload(BLOCKS, BLOCK, clips="clip_norm=0" not in row[0])
    share = {"device_share": 0.5} if name == "deep-optimizer-states" else {}
    held = plan_bytes(planned(work, name, **share), work)
    found = [sum(held[tier].get(kind, 0) for kind in RESTING) for tier in ("device", "host", "nvme")]
    assert found == [n * BLOCKS * BLOCK for n in expected]


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("row", rows("| policy | h2d | d2h | file read | file write |"), ids=lambda row: row[0])
def test_what_lanes_move_is_what_the_program_moves(row: list[str], micro_batches: int) -> None:
    name = row[0].strip("`")
    work = uniform_workload(BLOCKS, BLOCK, num_micro_batches=micro_batches)
    work = Workload(**{**vars(work), "reshard": "each"})
    shares: dict[str, Any] = {"device_share": 0.25} if name == "deep-optimizer-states" else {}
    shares |= {"cache": BLOCKS} if name == "mlp-offload" else {}
    moved = step_bytes(build_program(planned(work, name, **shares), work))
    names = {"p": 2, "r": 4, "m": micro_batches, "f": 0.25, "c": BLOCKS / (BLOCKS * CHUNKS)}
    for lane, cell in zip(COPY_LANES, row[1:], strict=True):
        assert moved.get(lane, 0) == value(cell, **names) * BLOCKS * BLOCK, lane


@pytest.mark.parametrize("row", rows("| `offload.policy=` | simulated step, s |"), ids=lambda row: row[0])
def test_the_seconds_beside_the_pictures_are_those_of_the_simulation(
    row: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    policy, *others = row[0].strip("`").split()
    with pytest.raises(SystemExit) as left:
        cli.main(["draw", str(DOCS / "pictures" / "offload.yaml"), f"offload.policy={policy}", *others])
    assert not left.value.code
    seconds = capsys.readouterr().out.split("simulated, ")[1].split(" s:")[0]
    assert float(seconds) == pytest.approx(float(row[1]), rel=0.01)


def test_the_plan_that_is_shown_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    section = (DOCS / "offload.md").read_text().split("## Reading `windlass plan`")[1]
    command = section.split("`")[1].split()
    assert command[:3] == ["windlass", "plan", "docs/pictures/offload.yaml"]
    with pytest.raises(SystemExit):
        cli.main(["plan", str(DOCS / "pictures" / "offload.yaml"), *command[3:]])
    printed = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert {" ".join(line.split()) for line in section.split("```")[1].strip().splitlines()} <= printed
