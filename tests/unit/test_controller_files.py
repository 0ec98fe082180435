"""The controller when files fail it or it dies itself once the job has come to its end."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.controller_doubles import FOUR, Died, Fleet, Stop, controller, records
from windlass.dist.errors import CheckpointError
from windlass.launch.control_log import ControlLog
from windlass.launch.controller import Controller, Patience


def dies_at_the_end(patch: pytest.MonkeyPatch) -> None:
    """Let the controller die as it is about to write that the run has ended."""
    write = ControlLog._write

    def dying(self: ControlLog, fd: int, record: dict[str, Any]) -> dict[str, Any]:
        if record["kind"] == "end":
            raise Died
        return write(self, fd, record)

    patch.setattr(ControlLog, "_write", dying)


@pytest.mark.parametrize("released", [False, True])
def test_a_controller_that_dies_once_all_is_done_is_followed_by_one_that_starts_nothing(
    released: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Fleet(tmp_path, ["kill", "done", "done"])
    release = fleet.release

    def dying(ok: bool) -> None:
        release(ok)
        fleet.running = None  # the actors of the workers are ended with it
        dies_at_the_end(patch)
        raise Died

    with monkeypatch.context() as patch:
        if released:
            patch.setattr(fleet, "release", dying)
        else:
            dies_at_the_end(patch)
        with pytest.raises(Died):
            controller(fleet, launch="one").run(Stop())
    assert controller(fleet, launch="one").run(Stop()) == 0
    assert len(fleet.seatings) == 2 and fleet.released == [True]


def test_a_controller_that_dies_as_it_gives_up_is_followed_by_one_that_ends_with_the_same_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Fleet(tmp_path, ["kill"])
    with monkeypatch.context() as patch:
        dies_at_the_end(patch)
        with pytest.raises(Died):
            controller(fleet, replace(FOUR, max_restarts=0), launch="one").run(Stop())
    assert records(fleet, "decision")[-1]["action"] == "stop"
    fleet.running = None
    assert controller(fleet, replace(FOUR, max_restarts=0), launch="one").run(Stop()) == 137


def test_a_log_that_cannot_be_read_for_a_while_is_said_once_and_ends_no_healthy_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Fleet(tmp_path, ["run"])
    check, looks, said = ControlLog.check_owner, itertools.count(), list[str]()

    def stale(self: ControlLog) -> None:
        if fleet.seatings and 2 < next(looks) < 5:
            raise CheckpointError("stale file handle")
        check(self)

    turns = itertools.count()
    fleet.turn = lambda: fleet.group.end() if next(turns) > 12 else None
    monkeypatch.setattr(ControlLog, "check_owner", stale)
    monkeypatch.setattr("windlass.launch.controller.LOOK_S", 0.0)
    log = ControlLog(tmp_path)
    assert Controller(fleet, log, FOUR, Patience(), tmp_path, say=said.append).run(Stop()) == 0
    assert [text for text in said if "stale" in text] == ["windlass: stale file handle; training goes on"]
    assert not records(fleet, "failure")


def test_a_full_disk_behind_the_output_ends_no_run_and_prevents_no_recovery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, code = Fleet(tmp_path, ["kill", "done"]), -1
    with pytest.raises(OSError, match="No space left"), open("/dev/full", "w") as full:  # as it is closed
        monkeypatch.setattr("sys.stderr", full)
        code = Controller(fleet, ControlLog(tmp_path), FOUR, Patience(), tmp_path).run(Stop())
    assert code == 0 and len(fleet.seatings) == 2
