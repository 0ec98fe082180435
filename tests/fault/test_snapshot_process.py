"""Snapshot processes killed at every point of the protocol: nothing is lost, and training never waits for them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.snapshot_nodes import CHUNK, PEER_S, Fleet, Node, fleet_of
from tests.waiting import until
from windlass.checkpoint.memory.folder import SnapshotProcess
from windlass.checkpoint.memory.peers import Peers
from windlass.checkpoint.memory.settings import Settings
from windlass.checkpoint.memory.supervise import Supervisor, ensure_snapshot_process

POINTS = ("smp.checksum", "smp.encode", "smp.encoded", "smp.vote", "smp.commit", "smp.freed")


@pytest.fixture(scope="module")
def three_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fleet_of(tmp_path_factory.mktemp("nodes"), 3) as fleet:
        yield fleet


@pytest.fixture
def fleet(three_nodes: Fleet) -> Fleet:
    for node in three_nodes.nodes:
        node.respawn()
    three_nodes.begin()
    return three_nodes


def with_fault(node: Node, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace a node's process by one in which a fault is going to happen."""
    node.kill()
    with monkeypatch.context() as patch:
        patch.setenv("WINDLASS_FAULT", fault)
        node.respawn(faults=True)


@pytest.mark.parametrize("role", ["leader", "member"])
@pytest.mark.parametrize("point", POINTS)
def test_a_process_killed_anywhere_loses_nothing_and_its_successor_goes_on(
    point: str, role: str, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.commit(1)
    victim = fleet.nodes[0 if role == "leader" else 1]
    with_fault(victim, f"kill:{point}:rank={victim.ranks[0].rank}:step=2", monkeypatch)
    until(fleet.ready)
    fleet.snapshot(2)
    until(lambda: not victim.served.alive)
    for node in fleet.nodes:
        held = {h["step"] for h in node.client.inventory().held} if node is not victim else None
        if held is None or 1 in held:
            continue
        # A node frees step 1 only when step 2 is protected everywhere.
        assert {h["state"] for h in node.client.inventory().held if h["step"] == 2} == {5}
    assert Supervisor(victim.folder).check(), "it was dead"
    until(lambda: fleet.committed(2))
    for node in fleet.nodes:
        node.check(2)
    fleet.commit(3)


def test_all_processes_killed_at_once_go_on_from_what_is_in_memory(fleet: Fleet) -> None:
    fleet.commit(1)
    until(fleet.ready)
    fleet.snapshot(2)
    for node in fleet.nodes:
        os.kill(node.served.pid, signal.SIGKILL)
    for node in fleet.nodes:
        until(lambda node=node: not node.served.alive)  # type: ignore[misc]
        node.respawn()
    until(lambda: fleet.committed(2))
    for node in fleet.nodes:
        node.check(2)


def test_training_does_not_wait_for_a_process_that_is_away_it_skips(fleet: Fleet) -> None:
    fleet.commit(1)
    until(fleet.ready)
    away = fleet.nodes[1]
    away.kill()
    taken = [[rank.snapshot(step) for rank in fleet.ranks] for step in (2, 3)]
    assert taken[0] == [True] * 3, "there was a slot for one more"
    assert not any(taken[1]), "then there is none until it is protected"
    away.respawn()
    until(lambda: fleet.committed(2))
    fleet.commit(4)


def test_data_that_was_changed_in_memory_before_it_was_protected_is_never_committed(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.commit(1)
    for node in fleet.nodes:
        with_fault(node, "hang:smp.encode:step=2", monkeypatch)  # hashed, not yet protected
    until(fleet.ready)
    fleet.snapshot(2)
    until(lambda: all(node.client.status().newest["ram"] == 2 for node in fleet.nodes))
    victim = fleet.ranks[1]
    slot = next(s for s in victim.segment.slots if (h := s.header()) is not None and h.step == 2)
    slot.data[CHUNK + 5] ^= 1
    for node in fleet.nodes:
        node.kill()
        node.respawn()
    until(lambda: any("damaged" in node.log() for node in fleet.nodes))
    for rank in fleet.ranks:
        rank.beats.beat(rank.beats.read().phase, 6)  # everybody has passed step 2
    until(lambda: fleet.nodes[0].client.status().dropped > 0)
    assert fleet.nodes[0].client.status().newest["peers"] == 1
    fleet.commit(5)
    for node in fleet.nodes:
        node.check(5)


@pytest.mark.parametrize("role", ["leader", "member"])
def test_a_process_killed_while_it_writes_a_checkpoint_is_asked_again(
    role: str, fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "checkpoints"
    fleet.begin(num_slots=3, settings=Settings(mode="lazy", every=2, storage=str(place), peer_timeout_s=PEER_S))
    victim = fleet.nodes[0 if role == "leader" else 1]
    fleet.commit(1)
    with_fault(victim, f"kill:persist.fsync:rank={victim.ranks[0].rank}:step=2", monkeypatch)
    until(fleet.ready)
    fleet.snapshot(2)
    until(lambda: not victim.served.alive)
    assert not list(place.glob("step-*")), "nothing is visible before it is complete"
    victim.respawn()
    until(lambda: fleet.nodes[0].client.status().newest["storage"] >= 2)
    assert [path.name for path in place.glob("step-*")] == ["step-00000002"]
    fleet.commit(3)


# -- processes that come back elsewhere -------------------------------------------------------------------------------


@pytest.fixture
def movers(fleet: Fleet) -> Fleet:
    """Nodes that do not wait long for whoever has taken the port of another one, and does not answer."""
    fleet.begin(settings=Settings(peer_timeout_s=1.0))
    fleet.commit(1)
    return fleet


@contextmanager
def killed_without_its_port(*nodes: Node) -> Iterator[None]:
    """Kill processes and take their ports, so that their successors listen elsewhere."""
    with contextlib.ExitStack() as blockers:
        for node in nodes:
            node.kill()

            def taken(served: SnapshotProcess = node.served) -> bool:
                with contextlib.suppress(OSError):  # threads of the killed process still hold it
                    blockers.enter_context(socket.create_server((served.host, served.port)))
                    return True
                return False

            until(taken)
        yield


def elsewhere(node: Node) -> None:
    before = node.served
    node.respawn()
    assert node.served.port != before.port
    node.meet_again()


BOTH = [(1, 0), (0, 1)]  # the member or the leader moves


@pytest.mark.parametrize(("moved", "other"), BOTH)
def test_a_node_that_moved_is_known_to_the_successor_of_another_one(moved: int, other: int, movers: Fleet) -> None:
    mover, replaced = movers.nodes[moved], movers.nodes[other]
    with killed_without_its_port(mover):
        elsewhere(mover)
        movers.commit(2)
        replaced.kill()
        replaced.respawn()
        movers.commit(3)
        assert movers.committed(3)


@pytest.mark.soak
@pytest.mark.parametrize(("moved", "other"), BOTH)
def test_a_node_that_moves_while_another_one_is_replaced_is_found(moved: int, other: int, movers: Fleet) -> None:
    mover, replaced = movers.nodes[moved], movers.nodes[other]
    replaced.kill()
    with killed_without_its_port(mover):
        elsewhere(mover)
        replaced.respawn()
        movers.commit(2)
        assert movers.committed(2)


@pytest.mark.soak
def test_two_nodes_that_move_at_once_find_each_other_by_a_third(movers: Fleet) -> None:
    first, second = movers.nodes[:2]
    with killed_without_its_port(first, second):
        elsewhere(first)
        elsewhere(second)
        movers.commit(2)
        assert movers.committed(2)


@pytest.mark.soak
def test_a_node_that_moves_again_is_found_where_it_was_last(movers: Fleet) -> None:
    mover = movers.nodes[1]
    with killed_without_its_port(mover):
        elsewhere(mover)
        movers.commit(2)
        with killed_without_its_port(mover):
            elsewhere(mover)
            movers.commit(3)
            known = [Peers(movers.membership, node.folder, nobody, 1.0).address_of(mover.name) for node in movers.nodes]
            assert known == [(mover.served.host, mover.served.port)] * 3


def nobody(verb: str, fields: dict[str, object], payload: memoryview) -> tuple[dict[str, object], None]:
    raise AssertionError(verb)


def test_a_node_whose_process_comes_back_at_another_port_is_found_again(movers: Fleet) -> None:
    mover = movers.nodes[1]
    with killed_without_its_port(mover):
        elsewhere(mover)
        until(movers.ready)
        movers.snapshot(2)
        until(lambda: movers.nodes[0].client.status().newest["peers"] == 2)
    assert ensure_snapshot_process(mover.folder).port == mover.served.port
