"""Steps on their way into storage that hangs, is slow to clear up, or has them already: snapshots go on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.snapshot_nodes import PATIENCE_S, PEER_S, Fleet, Node, NodeInThreads, fleet_of
from tests.waiting import until
from windlass.checkpoint import persist as persist_module
from windlass.checkpoint.memory.base import Base
from windlass.checkpoint.memory.inventory import LOCAL, STORAGE
from windlass.checkpoint.memory.persisting import PATIENCE_S as LEAST_PATIENCE_S
from windlass.checkpoint.memory.persisting import Persisting
from windlass.checkpoint.memory.settings import Settings
from windlass.checkpoint.memory.writing import Writing
from windlass.checkpoint.persist import Persister
from windlass.checkpoint.retention import being_read
from windlass.checkpoint.store import list_checkpoints
from windlass.dist.errors import CheckpointError


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    (tmp_path / "nodes").mkdir()
    with fleet_of(tmp_path / "nodes", 2, kind=NodeInThreads) as fleet:
        yield fleet


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What hangs until the test, or its end, opens it."""
    gate = threading.Event()
    yield gate
    gate.set()


def wishes(tmp_path: Path, **more: Any) -> Settings:
    given = {"mode": "lazy", "every": 10, "storage": str(tmp_path / "checkpoints"), "peer_timeout_s": PEER_S}
    return Settings(**{**given, **more})


def leader_of(fleet: Fleet) -> Persisting:
    first = fleet.nodes[0]
    assert isinstance(first, NodeInThreads)
    return first.persisting


def writing_of(node: Node) -> Writing:
    assert isinstance(node, NodeInThreads) and node.service.duty is not None
    return node.service.duty.writing


def saved(tmp_path: Path) -> list[int]:
    return [info.step for info in list_checkpoints(tmp_path / "checkpoints") if info.problem is None]


def newest(fleet: Fleet) -> int:
    return fleet.nodes[1].client.status().newest[STORAGE]


def hangs_at(gate: threading.Event, monkeypatch: pytest.MonkeyPatch, name: str) -> threading.Event:
    """Let a call of every persister wait for the gate; return what tells that one has got there."""
    there, go_on = threading.Event(), getattr(Persister, name)

    def hang(*given: Any) -> Any:
        there.set()
        assert gate.wait(PATIENCE_S)
        return go_on(*given)

    monkeypatch.setattr(Persister, name, hang)
    return there


# -- storage that hangs ----------------------------------------------------------------------------------------------


def test_snapshots_go_on_when_one_node_cannot_write_any_more_and_the_step_counts_as_failed(
    fleet: Fleet, gate: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = threading.Event()

    def fault(point: str, *, rank: int, step: int, generation: int) -> None:
        if (point, rank, step) == ("persist.write", 1, 10):
            there.set()
            assert gate.wait(PATIENCE_S)

    monkeypatch.setattr(persist_module, "fault", fault)
    fleet.begin(settings=wishes(tmp_path))
    fleet.commit(10)
    assert there.wait(PATIENCE_S)
    until(lambda: leader_of(fleet).writing.poll(STORAGE, 10)[0]["done"])
    leader_of(fleet).patience_s = 0.1
    for step in (11, 12, 13):
        fleet.commit(step)  # with two slots 12 finds no room before the slots of 10 are let go
    assert "node node-1 has written nothing more of it" in fleet.nodes[1].client.status().last_error
    assert newest(fleet) == -1
    gate.set()
    until(lambda: leader_of(fleet)._running == {})
    leader_of(fleet).patience_s = PATIENCE_S
    fleet.commit(20)
    until(lambda: newest(fleet) == 20)
    assert saved(tmp_path) == [20]


@pytest.mark.parametrize(("name", "counts"), [("begin", False), ("commit", True)])
def test_snapshots_go_on_when_the_leader_hangs_in_storage_and_what_counts_later_counts(
    fleet: Fleet,
    gate: threading.Event,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    counts: bool,
) -> None:
    there = hangs_at(gate, monkeypatch, name)
    fleet.begin(settings=wishes(tmp_path))
    leader = leader_of(fleet)
    wait = leader._wait

    def then_lose_patience(attempt: Any) -> Any:
        rows = wait(attempt)
        leader.patience_s = 0.1
        return rows

    if name == "begin":
        leader.patience_s = 0.1
    else:  # not before, however busy the machine
        monkeypatch.setattr(leader, "_wait", then_lose_patience)
    fleet.commit(10)
    assert there.wait(PATIENCE_S)
    for step in (11, 12, 13):
        fleet.commit(step)
    assert "the storage hangs" in fleet.nodes[1].client.status().last_error
    assert leader.term.decree.pins == ()
    fleet.commit(20)
    until(lambda: fleet.nodes[1].client.status().skipped == 1)  # the call that hangs keeps the level busy
    leader.patience_s = PATIENCE_S
    monkeypatch.setattr(leader, "_wait", wait)
    gate.set()
    until(lambda: leader._running == {})
    assert saved(tmp_path) == ([10] if counts else [])
    fleet.commit(30)
    until(lambda: newest(fleet) == 30)


def test_storage_that_is_held_to_a_bandwidth_is_given_the_time_a_file_takes(fleet: Fleet, tmp_path: Path) -> None:
    fleet.begin(settings=wishes(tmp_path))
    usual = leader_of(fleet).patience_s
    assert LEAST_PATIENCE_S < 10 * PEER_S <= usual < 10 * PEER_S + 1
    fleet.begin(settings=wishes(tmp_path, bandwidth_bytes_per_s=1000.0))
    assert leader_of(fleet).patience_s == pytest.approx(10 * PEER_S + 2 * fleet.num_bytes / 1000)


# -- processes that end, generations that are over ---------------------------------------------------------------------


def test_a_process_that_is_replaced_before_anybody_hears_that_its_part_counts_is_asked_anew(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, lost = Persister.commit, []

    def unheard(persister: Persister, *given: Any) -> str:
        place = commit(persister, *given)
        if persister.node == "node-1" and not lost:
            lost.append(place)
            writing_of(fleet.nodes[1])._tasks.clear()  # so much its successor knows
            raise CheckpointError("killed")
        return place

    monkeypatch.setattr(Persister, "commit", unheard)
    fleet.begin(settings=Settings(local_every=10, local_dir=str(tmp_path / "drive"), peer_timeout_s=PEER_S))
    fleet.commit(10)
    until(lambda: fleet.nodes[1].client.status().newest[LOCAL] == 10)
    assert lost and fleet.nodes[1].client.status().last_error == ""


def test_a_call_that_comes_back_in_a_later_generation_changes_nothing_there(
    fleet: Fleet, gate: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, begun, there, later = Persister.commit, threading.Event(), threading.Event(), threading.Event()

    def slow(persister: Persister, *given: Any) -> str:
        if given[2] == 1:
            begun.set()
            assert gate.wait(PATIENCE_S)
        return commit(persister, *given)

    def fault(point: str, *, rank: int, step: int, generation: int) -> None:
        if (point, rank, generation) == ("persist.write", 0, 2):
            there.set()
            assert later.wait(PATIENCE_S)

    monkeypatch.setattr(Persister, "commit", slow)
    monkeypatch.setattr(persist_module, "fault", fault)
    fleet.begin(settings=wishes(tmp_path))
    first = leader_of(fleet)
    fleet.commit(10)
    assert begun.wait(PATIENCE_S)
    fleet.begin(restored=(1, 8), settings=wishes(tmp_path), base=Base(8))
    fleet.commit(10)
    assert there.wait(PATIENCE_S)
    gate.set()
    until(lambda: first._running == {})
    assert not writing_of(fleet.nodes[0])._tasks[STORAGE].given_up
    later.set()
    until(lambda: newest(fleet) == 10)


# -- a step that counts ----------------------------------------------------------------------------------------------


def test_a_step_counts_as_durable_before_older_ones_have_been_read_and_removed(
    fleet: Fleet, gate: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.begin(settings=wishes(tmp_path, keep=0))
    for step in (10, 20):
        fleet.commit(step)
        until(lambda step=step: newest(fleet) == step)  # type: ignore[misc]
        until(lambda: leader_of(fleet)._running == {})
    reading, verify = threading.Event(), persist_module.verify

    def slowly(*given: Any) -> Any:
        reading.set()
        assert gate.wait(PATIENCE_S)
        return verify(*given)

    monkeypatch.setattr(persist_module, "verify", slowly)
    fleet.begin(settings=wishes(tmp_path, keep=2), base=Base(20, {STORAGE: 20}))  # its process has read nothing yet
    fleet.commit(30)
    assert reading.wait(PATIENCE_S)
    assert fleet.nodes[1].client.flush(PATIENCE_S).step == 30
    assert leader_of(fleet).term.decree.pins == () and saved(tmp_path) == [30, 20, 10]
    gate.set()
    until(lambda: leader_of(fleet)._running == {})
    assert saved(tmp_path) == [30, 20]


def test_one_that_was_replaced_stays_as_long_as_it_is_read(fleet: Fleet, tmp_path: Path) -> None:
    place = tmp_path / "checkpoints"
    for generation in (1, 2):
        fleet.begin(settings=wishes(tmp_path))
        fleet.commit(10)
        until(lambda: newest(fleet) == 10)
        until(lambda: leader_of(fleet)._running == {})
        if generation == 1:
            reading = being_read(persist_module.storage_of(place / "step-00000010"))
            reading.__enter__()
    (old,) = place.glob(".step-00000010.old*")
    fleet.commit(20)
    until(lambda: newest(fleet) == 20)
    until(lambda: leader_of(fleet)._running == {})
    assert (old / "manifest.json").exists()
    for mark in old.glob(".reading-*"):
        mark.unlink()
    fleet.commit(30)
    until(lambda: newest(fleet) == 30)
    until(lambda: not old.exists())


# -- where a generation begins ---------------------------------------------------------------------------------------


def test_what_was_not_yet_durable_when_a_generation_ended_is_due_at_the_first_commit_of_the_next(
    fleet: Fleet, gate: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        there = hangs_at(gate, patch, "commit")
        fleet.begin(settings=wishes(tmp_path))
        fleet.commit(10)
        assert there.wait(PATIENCE_S)
        old = fleet.generation
        fleet.begin(restored=(old, 12), settings=wishes(tmp_path), base=Base(12))
    assert fleet.nodes[0].client.status().lag == 0
    fleet.commit(12)
    until(lambda: newest(fleet) == 12)


def test_what_is_durable_where_a_generation_begins_is_not_written_once_more(fleet: Fleet, tmp_path: Path) -> None:
    fleet.begin(settings=wishes(tmp_path), base=Base(10, {STORAGE: 10}))
    fleet.commit(10)
    for node in fleet.nodes:
        assert newest(fleet) == 10 and node.client.flush(1.0).step == 10, "nobody waits for what is there"
    fleet.commit(20)
    until(lambda: newest(fleet) == 20)
    assert saved(tmp_path) == [20] and fleet.nodes[0].client.status().skipped == 0


def test_the_base_of_a_generation_is_kept_for_the_process_that_goes_on(fleet: Fleet, tmp_path: Path) -> None:
    base = Base(10, {STORAGE: 10})
    fleet.begin(settings=wishes(tmp_path), base=base)
    first = fleet.nodes[0]
    assert isinstance(first, NodeInThreads) and first.service.duty is not None
    first.service.duty.stop()
    first.service._resume()
    assert first.service.duty.term.base == base


def test_a_base_that_is_malformed_is_refused() -> None:
    malformed: list[Callable[[], Base]] = [
        lambda: Base.parse({}),
        lambda: Base.parse({"step": 1, "durable": {"storage": None}}),
    ]
    for parse in malformed:
        with pytest.raises((KeyError, TypeError, ValueError)):
            parse()
