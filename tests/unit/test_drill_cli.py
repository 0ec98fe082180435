"""What a drill accepts, does and tells; the runs themselves are in tests/fault."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from windlass.dist.errors import ConfigError
from windlass.launch import local_run
from windlass.launch.cli import main
from windlass.launch.config import load_job
from windlass.launch.control_log import ControlLog
from windlass.launch.drill import Strike, Targets, all_done, check_strikes, drill_table, outcomes, pending
from windlass.launch.fleet import Seating
from windlass.launch.job import Loaded
from windlass.launch.local import LaunchConfig, WorkerCommand
from windlass.launch.local_fleet import LocalFleet
from windlass.launch.run_folder import RunFolder, RunLock

HAS = Targets(workers=4, steps=10, processes=True, ray=False, nodes=("node-0", "node-1", "node-2"))


@pytest.mark.parametrize("text", ["rank=1@step=20", "stop=0@step=5", "node=node-3@step=30", "controller=0@step=2"])
def test_a_strike_is_written_as_it_is_read(text: str) -> None:
    assert str(Strike.parse(text)) == text


def test_the_number_of_a_node_is_short_for_its_name() -> None:
    assert Strike.parse("smp=1@step=9") == Strike("smp", "node-1", 9)


@pytest.mark.parametrize("text", ["rank=1", "rank=node-0@step=3", "rack=1@step=3", "rank=1@step=x", "rank=@step=3"])
def test_what_is_no_strike_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ConfigError, match="rank=1@step=20"):
        Strike.parse(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rank=4@step=3", "only 4 workers"),
        ("rank=1@step=0", "a step from 1 to 9"),
        ("rank=1@step=10", "a step from 1 to 9"),
        ("node=77@step=3", "Use one of node-0, node-1, node-2"),
        ("smp=rack-1@step=3", "no such node"),
        ("agent=1@step=3", "Add --ray local"),
        ("controller=0@step=3", "Add --ray local"),
    ],
)
def test_a_strike_that_cannot_happen_is_refused_before_anything_starts(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"--kill {text.split('=')[0]}=.*{says}"):
        check_strikes([Strike.parse(text)], HAS)


def test_nobody_is_struck_whom_only_a_snapshot_process_would_miss_where_there_is_none() -> None:
    for text in ("smp=0@step=3", "stop=1@step=3"):
        check_strikes([Strike.parse(text)], HAS)
        with pytest.raises(ConfigError, match=r"snapshot\.every=1"):
            check_strikes([Strike.parse(text)], replace(HAS, processes=False))


def test_a_node_that_an_earlier_strike_takes_away_is_not_struck_again() -> None:
    one, two = Strike.parse("node=0@step=3"), Strike.parse("smp=0@step=5")
    check_strikes([one, replace(two, step=2), replace(two, target="node-1"), Strike.parse("rank=0@step=7")], HAS)
    for again in (two, replace(one, step=9), Strike.parse("zombie=0@step=4")):
        with pytest.raises(ConfigError, match=f"--kill {again}: node=node-0@step=3 has taken that node away"):
            check_strikes([again, one], HAS)


def test_a_cluster_knows_its_nodes_itself_and_may_get_them_back() -> None:
    texts = ("node=77@step=3", "node=77@step=4", "controller=0@step=5", "agent=host-a@step=6")
    check_strikes([Strike.parse(text) for text in texts], replace(HAS, ray=True, nodes=()))


class Memory:
    """The memory of a node whose snapshot process runs until it is killed."""

    def __init__(self) -> None:
        self.pid = 7

    def kill(self) -> int:
        pid, self.pid = self.pid, 0
        return pid

    def leave(self) -> None:
        pass

    def lose(self, local_dir: Path | None) -> None:
        self.kill()


class Workers:
    def send(self, ranks: object, signum: int) -> None:
        assert signum == signal.SIGKILL


def test_a_strike_on_what_is_not_there_any_more_is_not_made() -> None:
    memories = {f"node-{number}": Memory() for number in range(3)}
    fleet = LocalFleet(WorkerCommand(()), LaunchConfig(workers=2, nodes=2, spares=1), memories=memories)  # type: ignore[arg-type]
    fleet._workers, fleet._seating = Workers(), Seating(("node-0", "node-1"))  # type: ignore[assignment]
    assert "process 7" in fleet.strike("smp", "node-0")
    assert "lost" in fleet.strike("node", "node-1") and "killed" in fleet.strike("reboot", "node-2")
    for kind, target, says in (
        ("smp", "node-0", "no snapshot process"),
        ("smp", "node-1", "lost already"),
        ("node", "node-1", "lost already"),
        ("reboot", "node-2", "nothing runs"),
        ("node", "node-7", "no such node"),
        ("controller", "0", "without Ray"),
    ):
        with pytest.raises(ConfigError, match=f"--kill {kind}={target}: .*{says}"):
            fleet.strike(kind, target)
    assert "killed" in fleet.strike("reboot", "node-0"), "its workers are"


def test_strikes_that_were_made_are_not_made_again() -> None:
    one, two = Strike("rank", "1", 3), Strike("rank", "1", 9)
    done = {"kind": "struck", "what": "rank", "target": "1", "at": 3}
    assert pending([two, one], []) == [one, two]
    assert pending([two, one, one], [done]) == [one, two]
    assert not all_done([one], []) and all_done([one], [done, {"kind": "blow", "done": True, "message": ""}])
    assert not all_done([one], [done, {"kind": "blow", "done": False, "message": ""}])


def struck(log: ControlLog, what: str, target: str, at: int, *, done: bool = True, message: str = "done") -> None:
    log.append("struck", what=what, target=target, at=at)
    log.append("blow", message=message, done=done)


def test_the_table_tells_for_every_strike_what_came_of_it(tmp_path: Path) -> None:
    log = ControlLog(tmp_path)
    log.bump()
    struck(log, "smp", "node-0", 2)
    log.append("notice", message="snapshot process of node-0 replaced in 0.2 s")
    struck(log, "rank", "1", 5)
    log.append("failure", what="worker", step=5)
    log.bump()
    log.append("decision", action="restart", nodes=["node-0"], why="in place")
    log.append("recovered", restored=4, tier="ram", lost=1, seconds={"fence": 0.5, "load": 0.25})
    struck(log, "agent", "node-0", 6, done=False, message="no agents here")
    struck(log, "node", "node-0", 7)
    log.append("failure", what="node", step=7)
    log.append("decision", action="stop", why="no room")
    lines = drill_table(outcomes(log.records)).splitlines()
    assert lines[0].split() == ["STRUCK", "LOST", "SECONDS", "RESTORED", "DECISION"]
    assert "smp=node-0@step=2" in lines[1] and "did not stop: snapshot process of node-0 replaced" in lines[1]
    assert lines[2].split() == ["rank=1@step=5", "1", "0.75", "4", "ram", "in", "place"]
    assert lines[3].split() == ["fence", "0.50", "load", "0.25"]
    assert "not done: no agents here" in lines[4] and "no room; did not recover" in lines[5]


def test_a_drill_runs_the_job_with_enough_restarts_and_fails_if_a_strike_was_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"train: {{steps: 9, run_dir: {tmp_path}/run}}\nlaunch: {{workers: 2}}\n")
    seen: list[Any] = []

    def run(loaded: Loaded, strikes: list[Strike]) -> int:
        seen.append((loaded.config.recovery.max_restarts, strikes))
        struck(ControlLog(tmp_path / "run"), "rank", "1", 3)
        return 0

    monkeypatch.setattr(local_run, "run_controlled", run)
    monkeypatch.setattr("windlass.launch.check.check_job", lambda *arguments, to_run: None)
    with pytest.raises(SystemExit) as ended:
        main(["drill", str(job), "--kill", "rank=1@step=3", "--kill", "rank=0@step=5"])
    assert ended.value.code == 1
    assert seen == [(3, [Strike("rank", "1", 3), Strike("rank", "0", 5)])]
    shown = capsys.readouterr()
    assert "rank=1@step=3" in shown.out and "not every strike was made" in shown.err


def test_a_drill_without_a_strike_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["drill", "tiny"])
    assert ended.value.code == 2 and "--kill" in capsys.readouterr().err


def test_a_launcher_holds_the_lock_of_the_run_folder_as_long_as_it_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = RunFolder(tmp_path / "run"), list[str]()

    class Watching:
        """In place of the controller: tries to enter the run folder, as any other run would."""

        def __init__(self, *arguments: object, **settings: object) -> None:
            pass

        def run(self, stop: object) -> int:
            with pytest.raises(ConfigError) as refused:
                RunLock(folder)
            seen.append(str(refused.value))
            return 0

    monkeypatch.setattr(local_run, "Controller", Watching)
    loaded = load_job(
        "quickstart", [f"train.run_dir={folder.root}", "recovery.max_restarts=1", "recovery.fork_server=false"]
    )
    assert local_run.run_controlled(loaded) == 0
    assert f"train.run_dir = '{folder.root}': in use by another run" in seen[0]
    RunLock(folder).release()


@pytest.mark.parametrize(("where", "here"), [([], True), (["--ray", "local"], True), (["--ray", "auto"], False)])
def test_a_drill_in_a_cluster_asks_no_more_of_this_machine_than_a_launch_there(
    where: list[str], here: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"train: {{steps: 9, run_dir: {tmp_path}/run}}\n")
    asked: list[bool] = []

    def check_job(loaded: Loaded, workers: int, *, to_run: bool) -> None:
        asked.append(to_run)
        raise ConfigError("seen enough")

    monkeypatch.setattr("windlass.launch.check.check_job", check_job)
    for command in (["drill", str(job), "--kill", "rank=0@step=3"], ["launch", str(job)]):
        if where or command[0] == "drill":
            with pytest.raises(SystemExit):
                main([*command, *where])
    assert asked == [here] * (1 + bool(where))
