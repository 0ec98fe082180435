"""Actions and schedules as text and JSON: what is written is read back, and what is wrong is named with its place."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from windlass.dist.errors import PlanError
from windlass.parallel.pipeline.action import KINDS, LANES, Action
from windlass.parallel.pipeline.builders import BUILDERS, build
from windlass.parallel.pipeline.passes import lower
from windlass.parallel.pipeline.schedule import Layout, Schedule, load_schedule, write_schedule

TEXT = """# name: mine
# stage_rank: 0 1
# vocab: 0
# micro_batches: 2
# limits: 2 1
## the last stage alternates
0: 0F0 0F1 0B0 0B1
1: 1F0 1B0 1F1 1B1
"""


@given(st.integers(0, 300), st.sampled_from(sorted(KINDS)), st.integers(0, 10_000))
def test_an_action_is_read_back_from_its_text(place: int, kind: str, number: int) -> None:
    action = Action(place, kind, number)
    assert Action.parse(str(action)) == action
    assert pickle.loads(pickle.dumps(action)) == action


def test_every_kind_has_a_lane_and_a_place() -> None:
    assert {kind.lane for kind in KINDS.values()} == set(LANES)
    assert {kind.place for kind in KINDS.values()} == {"stage", "rank"}
    assert all(kind.meaning for kind in KINDS.values())


@pytest.mark.parametrize("text", ["", "F0", "2F", "2f0", "2F0 ", "-1F0", "2SEND_0", "2Q0", "2F1.5", "2SENDF1"])
def test_what_is_no_action_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(PlanError, match=r"'.*' is not an action.*(2F0|The kinds are F, B)"):
        Action.parse(text)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("vocab", [0, 1, 2])
def test_a_schedule_survives_text_json_and_files(name: str, vocab: int, tmp_path: Path) -> None:
    for schedule in (build(name, 3, 4, vocab=vocab), lower(build(name, 2, 3, vocab=vocab), gather="run")):
        assert Schedule.from_text(schedule.to_text()) == schedule
        assert Schedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule
        for file in ("schedule.txt", "schedule.json"):
            write_schedule(schedule, tmp_path / file)
            assert load_schedule(tmp_path / file) == schedule


def test_the_text_form_needs_only_stages_and_micro_batches() -> None:
    schedule = Schedule.from_text("# stage_rank: 0\n# micro_batches: 1\n\n0: 0F0 0B0", "folder/mine.txt")
    row = (Action(0, "F", 0), Action(0, "B", 0))
    assert schedule == Schedule("mine", Layout(1, (0,)), 1, (row,))


def test_a_schedule_knows_whether_communication_is_written_out() -> None:
    assert not Schedule.from_text(TEXT).lowered
    assert Schedule.from_text(TEXT.replace("0F0 0F1", "0F0 0SEND_F0 0F1")).lowered
    assert not Schedule.from_text(TEXT.replace("0B0", "0R0 0B0")).lowered


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("1B1", "1Q1", "file, line 8: '1Q1' is not an action: there is no kind 'Q'. The kinds are F, B"),
        ("1B1", "B1", "file, line 8: 'B1' is not an action. Write place, kind and number, such as 2F0"),
        ("1B1", "2B1", "file, line 8: '2B1' names stage 2; there are 0 to 1"),
        ("1B1", "2S1", "file, line 8: '2S1' names rank 2; there are 0 to 1"),
        ("0B1", "0B7", "file, line 7: '0B7' names micro-batch 7; there are 0 to 1"),
        ("vocab:", "vocub:", "file, line 3: there is no entry 'vocub'. The entries are name, stage_rank, vocab"),
        ("vocab: 0", "vocab: 3", "file: vocab 3: 0 (off) or the algorithm, 1 or 2"),
        ("vocab: 0", "vocab: on", "file, line 3: vocab = 'on': must be 0, 1 or 2"),
        ("batches: 2", "batches: two", "file, line 4: micro_batches = 'two': must be their number, such as 8"),
        ("batches: 2", "batches: 0", "file: schedule 'mine' has 0 micro-batches; it needs at least 1"),
        ("limits: 2 1", "limits: 2", "file: schedule 'mine': limits given: 1, ranks: 2. Give one per rank"),
        ("limits: 2 1", "limits: -2 1", "file, line 5: limits = '-2 1': must be the most stage activations"),
        ("# limits: 2 1", "limits: 2 1", "file, line 5: 'limits: 2 1' is neither a header '# key: value'"),
        ("# limits: 2 1", "# forward_only: maybe", "file, line 5: forward_only = 'maybe': must be true or false"),
        ("# stage_rank: 0 1\n", "", "file: 'stage_rank' is missing: the rank of every stage, such as 0 1 1 0"),
        ("rank: 0 1", "rank: 0 2", "file: stage 1 lies on rank 2: with 2 ranks, 0 to 1 work"),
        ("rank: 0 1", "rank: 0 0", "stage_rank (0, 0): every one of 2 ranks needs a stage, 1 has none"),
        ("1: 1F0", "2: 1F0", "file: no line for rank 1; write '1: ...'"),
        ("1: 1F0", "0: 1F0", "file, line 8: '0' stands in line 7 already; keep one of them"),
        ("vocab: 0", "name: 0", "file, line 3: 'name' stands in line 1 already; keep one of them"),
    ],
)
def test_a_wrong_text_names_the_line_and_what_would_be_right(right: str, wrong: str, said: str) -> None:
    assert TEXT.count(right) == 1
    with pytest.raises(PlanError) as error:
        Schedule.from_text(TEXT.replace(right, wrong), "file")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ranks": [["0F0"], ["1F0", 7]]}, "file, ranks[1][1]: '7' is not an action"),
        ({"ranks": [["0F0"], ["1F5"]]}, "file, ranks[1][0]: '1F5' names micro-batch 5; there are 0 to 1"),
        ({"ranks": "0F0"}, "file: 'ranks' must be a list with one list of actions per rank"),
        ({"micro_batches": True}, "file, 'micro_batches': micro_batches = True: must be their number"),
        ({"micro_batches": None}, "file: 'micro_batches' is missing"),
        ({"stage_rank": 1}, "file, 'stage_rank': stage_rank = 1: must be the rank of every stage"),
        ({"extra": 1}, "file, 'extra': there is no entry 'extra'"),
    ],
)
def test_wrong_json_names_the_place_and_what_would_be_right(change: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError) as error:
        Schedule.from_json({**Schedule.from_text(TEXT).to_json(), **change}, "file")
    assert said in str(error.value)


def test_a_file_without_ranks_is_refused() -> None:
    with pytest.raises(PlanError, match="file: a pipeline of 0 ranks: it needs at least 1"):
        Schedule.from_text("# stage_rank: 0\n# micro_batches: 1\n", "file")


def test_json_that_is_no_object_is_refused() -> None:
    with pytest.raises(PlanError, match=r"an object with the keys name, stage_rank, .*ranks"):
        Schedule.from_json([1], "file")  # type: ignore[arg-type]


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"absent\.txt cannot be read: .*No such file"):
        load_schedule(tmp_path / "absent.txt")
    (tmp_path / "broken.json").write_text('{"name": "x",\n "ranks": [}')
    with pytest.raises(PlanError, match=r"broken\.json, line 2: not JSON"):
        load_schedule(tmp_path / "broken.json")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(PlanError, match=r"bytes\.txt cannot be read"):
        load_schedule(tmp_path / "bytes.txt")


def test_a_layout_says_who_holds_what() -> None:
    layout = Layout(2, (0, 1, 1, 0), 2)
    assert (layout.num_stages, layout.embed_rank, layout.head_rank) == (4, 0, 0)
    assert [layout.stages_of(rank) for rank in (0, 1)] == [(0, 3), (1, 2)]
    assert [layout.rank_of(Action.parse(text)) for text in ("3F0", "2SEND_B1", "1S0", "0X4")] == [0, 1, 1, 0]


def test_a_schedule_without_micro_batches_or_with_a_list_too_few_is_refused() -> None:
    with pytest.raises(PlanError, match="0 micro-batches; it needs at least 1"):
        Schedule("none", Layout(1, (0,)), 0, ((),))
    with pytest.raises(PlanError, match="action lists given: 1, ranks: 2"):
        Schedule("short", Layout(2, (0, 1)), 1, ((),))
