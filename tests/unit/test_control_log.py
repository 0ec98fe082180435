"""The control log: durable, torn tails ignored, one owner at a time; phase reports; the job's token."""

from __future__ import annotations

import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from windlass.dist.errors import CheckpointError, WorkerError
from windlass.launch.control_log import ControlLog, PhaseLog, decode, encode, job_token, phases_path, read_phases


def test_what_was_appended_is_there_for_the_next_process(tmp_path: Path) -> None:
    log = ControlLog(tmp_path)
    assert log.bump(by="test") == 1
    log.append("failure", what="worker", step=3)
    again = ControlLog(tmp_path)
    assert [record["kind"] for record in again.records] == ["generation", "failure"]
    assert again.records == log.records and again.bump() == 2


@given(st.dictionaries(st.text(), st.one_of(st.integers(), st.text(), st.booleans(), st.none())))
def test_a_record_is_read_back_as_it_was_and_no_other_line_is_a_record(facts: dict[str, object]) -> None:
    line = encode(facts)
    assert decode(line) == facts and line.count(b"\n") == 1
    for place in range(0, len(line), 7):
        assert decode(line[:place] + bytes([line[place] ^ 1]) + line[place + 1 :]) is None


@settings(deadline=None)
@given(st.integers(1, 200))
def test_a_log_cut_off_anywhere_keeps_its_whole_records_and_goes_on(cut: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        log = ControlLog(Path(folder))
        for step in range(4):
            log.append("failure", step=step)
        whole = log.path.read_bytes()
        log.path.write_bytes(whole[:-cut])
        kept = whole[:-cut].count(b"\n")
        torn = ControlLog(Path(folder))
        assert [record["step"] for record in torn.records] == list(range(kept))
        torn.append("end", code=0)
        assert [r["kind"] for r in ControlLog(Path(folder)).records] == ["failure"] * kept + ["end"]


def test_damage_before_the_end_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    log = ControlLog(tmp_path)
    for step in range(3):
        log.append("failure", step=step)
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(lines[0] + lines[1].replace(b"failure", b"sailure") + lines[2])
    with pytest.raises(CheckpointError, match="line 2 is damaged"):
        ControlLog(tmp_path)


def test_many_processes_that_bump_never_get_the_same_generation(tmp_path: Path) -> None:
    found: list[int] = []

    def bump() -> None:
        log = ControlLog(tmp_path)
        found.extend(log.bump() for _ in range(5))

    threads = [threading.Thread(target=bump) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(1, 21))


def test_an_owner_is_fenced_off_by_a_newer_generation_but_others_may_append(tmp_path: Path) -> None:
    first, worker = ControlLog(tmp_path), ControlLog(tmp_path)
    first.bump()
    worker.append("skip", first=8, last=16)
    first.append("start")
    assert first.skips() == [(8, 16)]
    second = ControlLog(tmp_path)
    assert second.bump(at_least=9) == 9
    with pytest.raises(WorkerError, match="generation 1 is over: another process began generation 9"):
        first.append("failure")
    second.append("start")


def test_a_worker_of_an_older_generation_can_write_nothing_into_the_history_of_a_newer_one(tmp_path: Path) -> None:
    controller = ControlLog(tmp_path)
    controller.bump()
    worker = ControlLog(tmp_path, 1)
    worker.append("skip", first=0, last=8)
    controller.bump()
    with pytest.raises(WorkerError, match="generation 1 is over"):
        worker.append("rollback", step=3, why="late")
    controller.refresh()
    assert controller.left() == {}
    assert controller.skips() == [(0, 8)]


def test_generations_begin_beyond_what_storage_and_memory_have_heard_of(tmp_path: Path) -> None:
    log = ControlLog(tmp_path)
    log.floor = 7
    assert [log.bump(), log.bump()] == [8, 9]


def test_going_back_is_remembered_by_the_generation_that_did_it(tmp_path: Path) -> None:
    log = ControlLog(tmp_path)
    log.append("launch", launch="x")
    log.bump()
    assert log.left() == {} and not log.restarted()
    log.append("rollback", step=10, why="the loss jumped")
    log.bump()
    assert log.left() == {1: 10} and log.restarted() and log.num_rollbacks() == 1
    log.append("launch", launch="y")
    assert not log.restarted() and log.num_rollbacks() == 0


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "control").write_text("a file")
    with pytest.raises(CheckpointError, match="Not a directory"):
        ControlLog(tmp_path / "control" / "x").append("launch")


def test_the_token_is_made_once_and_only_the_user_can_read_it(tmp_path: Path) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(job_token(tmp_path))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 6 and len(found[0]) == 64
    assert [path.name for path in (tmp_path / "control").iterdir()] == ["token"]
    assert stat.S_IMODE((tmp_path / "control" / "token").stat().st_mode) == 0o600


def test_phases_of_all_ranks_are_read_in_order_and_half_lines_left_out(tmp_path: Path) -> None:
    PhaseLog(tmp_path, 2, 0).mark("began", when=1.0)
    PhaseLog(tmp_path, 2, 1).mark("loaded", step=7, tier="ram")
    with open(phases_path(tmp_path, 2), "a") as file:
        file.write('{"phase": "first')
    found = read_phases(tmp_path, 2)
    assert [(r["phase"], r["rank"]) for r in found] == [("began", 0), ("loaded", 1)]
    assert found[0]["time"] == 1.0 and found[1]["step"] == 7
    assert read_phases(tmp_path, 3) == []


def test_a_report_that_cannot_be_written_does_not_stop_a_worker(tmp_path: Path) -> None:
    (tmp_path / "control").write_text("a file")
    PhaseLog(tmp_path, 1, 0).mark("began")
    assert read_phases(tmp_path, 1) == []


def test_a_token_that_others_could_have_made_or_read_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_token(tmp_path)
    token = tmp_path / "control" / "token"
    with monkeypatch.context() as patch:
        patch.setattr("os.geteuid", lambda: token.stat().st_uid + 1)
        with pytest.raises(CheckpointError, match=r"token' is not this user's alone .*Remove it, and it is made"):
            job_token(tmp_path)
    token.chmod(0o640)
    with pytest.raises(CheckpointError, match="mode 640"):
        job_token(tmp_path)
    token.chmod(0o600)
    known = job_token(tmp_path)
    token.rename(tmp_path / "mine")
    token.symlink_to(tmp_path / "mine")
    with pytest.raises(CheckpointError, match="token' is a symbolic link"):
        job_token(tmp_path)
    token.unlink()
    assert job_token(tmp_path) != known
    assert [path.name for path in (tmp_path / "control").iterdir()] == ["token"]
