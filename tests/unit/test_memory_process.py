"""The snapshot process of a node: real processes, trainers played by the test."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.snapshot_nodes import CHUNK, JOB, PEER_S, Fleet, Node, data_of, fleet_of
from tests.waiting import until
from windlass.checkpoint.memory import pids
from windlass.checkpoint.memory.base import Base
from windlass.checkpoint.memory.client import SnapshotClient
from windlass.checkpoint.memory.duty import Duty
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.header import SlotHeader, State
from windlass.checkpoint.memory.heartbeat import is_alive, process_started
from windlass.checkpoint.memory.membership import Member, Membership
from windlass.checkpoint.memory.persisting import Cadence
from windlass.checkpoint.memory.protect import check_headers, check_room
from windlass.checkpoint.memory.segment import Segment
from windlass.checkpoint.memory.settings import Settings
from windlass.checkpoint.memory.slots import NodeSlots
from windlass.checkpoint.memory.supervise import ensure_snapshot_process
from windlass.checkpoint.memory.votes import Report
from windlass.checkpoint.reader import CheckpointReader
from windlass.dist.errors import CheckpointError

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fleet_of(tmp_path_factory.mktemp("nodes"), 2) as fleet:
        yield fleet


@pytest.fixture
def fleet(two_nodes: Fleet) -> Fleet:
    """Two nodes at the beginning of a generation of their own."""
    two_nodes.begin()
    return two_nodes


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path, "node-0", 1, 1)
    yield node
    node.end()


# -- generations -----------------------------------------------------------------------------------------------------


def test_a_process_that_knows_no_generation_serves_nothing(tmp_path: Path) -> None:
    folder = NodeFolder(tmp_path, JOB, "node-0").create("22" * 32)
    served = ensure_snapshot_process(folder)
    try:
        with SnapshotClient.of(folder, 3) as client:
            with pytest.raises(CheckpointError, match="knows no generation yet"):
                client.inventory()
            assert client.fence(3) == []
            assert client.inventory().generation == 3
    finally:
        pids.kill([(served.pid, served.started)], 5.0)


def test_what_an_older_generation_asks_is_refused(fleet: Fleet) -> None:
    old = fleet.nodes[0].client
    over, now = fleet.generation, fleet.generation + 1
    membership = fleet.membership
    fleet.nodes[0].folder.raise_generation(now)
    with pytest.raises(CheckpointError, match=f"generation {over} is over: node node-0 is at {now}"):
        old.inventory()
    with pytest.raises(CheckpointError, match=f"generation {over} is over"):
        old.adopt(membership)
    with pytest.raises(CheckpointError, match=f"is at generation {now}: {over} is over"):
        old.fence(over)


def test_a_client_without_a_generation_speaks_for_the_one_the_node_is_at(fleet: Fleet) -> None:
    with SnapshotClient.of(fleet.nodes[0].folder) as client:
        assert client.inventory().generation == fleet.generation
        fleet.begin()
        assert client.inventory().generation == fleet.generation


def test_fencing_kills_the_trainers_of_older_generations_and_no_others(node: Node) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom windlass.checkpoint.memory.heartbeat import Heartbeat\n"
        "Heartbeat(Path(sys.argv[1]), int(sys.argv[2]))\nprint('on', flush=True)\ntime.sleep(600)\n"
    )
    trainers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(node.folder.beat_path(rank)), str(generation)],
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        for rank, generation in ((0, 1), (1, 2))
    ]
    try:
        for trainer in trainers:
            assert trainer.stdout is not None and trainer.stdout.readline() == b"on\n"
        assert node.client.fence(2) == [trainers[0].pid]
        assert trainers[0].wait(60) == -signal.SIGKILL
        assert trainers[1].poll() is None
    finally:
        for trainer in trainers:
            trainer.kill()
            trainer.communicate()


def test_adopting_twice_is_nothing_and_other_members_in_one_generation_are_refused(fleet: Fleet) -> None:
    client = fleet.nodes[0].client
    client.adopt(fleet.membership, None, fleet.settings)
    other = replace(fleet.membership, scheme="none")
    with pytest.raises(CheckpointError, match=f"generation {fleet.generation} began with other members"):
        client.adopt(other, None, fleet.settings)


def test_memory_that_does_not_suffice_for_parity_is_refused_before_the_first_step(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fleet.nodes[0].folder
    slots = NodeSlots(folder, print)
    slots.refresh()
    made = {file.path for file in folder.segments()}
    larger = replace(fleet.membership, members=tuple(replace(m, num_bytes=1 << 20) for m in fleet.membership.members))
    monkeypatch.setattr(NodeFolder, "room", lambda self: 9 << 20)
    with pytest.raises(CheckpointError, match=r"parity of ranks \[0\] need"):
        check_room(folder, slots, larger)
    until(lambda: any(file.role == "parity" for file in folder.segments()))
    check_room(folder, slots, fleet.membership)
    assert made <= {file.path for file in folder.segments()}
    slots.close()


def test_the_next_generation_keeps_what_was_restored_until_it_has_committed(fleet: Fleet) -> None:
    fleet.commit(3)
    fleet.commit(4)
    old = fleet.generation
    fleet.begin(restored=(old, 4))
    assert all(node.states()[old, r.rank, 4] == "COMMITTED" for node in fleet.nodes for r in node.ranks)
    fleet.commit(4)
    until(lambda: all(set(node.states()) == {(old + 1, r.rank, 4) for r in node.ranks} for node in fleet.nodes))
    until(lambda: all(node.folder.memberships() == [old + 1] for node in fleet.nodes))


# -- snapshots -------------------------------------------------------------------------------------------------------


def test_snapshots_are_hashed_protected_committed_and_only_then_are_older_ones_freed(fleet: Fleet) -> None:
    for step in (1, 2, 3):
        fleet.commit(step)
        for node in fleet.nodes:
            node.check(step)
    now, status = fleet.generation, fleet.nodes[1].client.status
    until(lambda: all(set(node.states()) == {(now, r.rank, 3) for r in node.ranks} for node in fleet.nodes))
    until(lambda: status().last_error == "" and status().degraded == [])
    assert status().newest["ram"] == status().newest["peers"] == 3
    assert status().leader == "node-0" and status().lag == 0


def test_bytes_of_a_slot_are_read_over_the_network_with_their_hashes(fleet: Fleet) -> None:
    fleet.commit(1)
    client, now = fleet.nodes[1].client, fleet.generation
    header = client.header(1, "data", 1, now)
    assert header is not None and header.state >= State.ENCODED and len(header.hashes[1]) == header.num_chunks
    got = np.empty(header.num_bytes - CHUNK, np.uint8)
    client.read(1, "data", 1, now, CHUNK, got.data)
    assert np.array_equal(got, data_of(1, 1, header.num_bytes)[CHUNK:])
    assert client.header(1, "data", 9, now) is None
    with pytest.raises(CheckpointError, match="does not hold data of rank 1, step 9"):
        client.read(1, "data", 9, now, 0, got.data)
    with pytest.raises(CheckpointError, match="were asked for"):
        client.read(1, "data", 1, now, header.num_bytes, got.data)
    assert client.layout(header.layout).num_bytes == header.num_bytes
    assert client.membership(now) == fleet.membership
    assert {(h["rank"], h["role"], h["step"], h["ok"]) for h in client.inventory().held if h["generation"] == now} == {
        (1, "data", 1, True),
        (1, "parity", 1, True),
    }


def test_a_snapshot_that_is_half_copied_is_listed_as_not_whole_and_never_committed(fleet: Fleet) -> None:
    fleet.commit(1)
    fleet.ranks[0].snapshot(2)
    fleet.ranks[1].snapshot(2, copied=CHUNK)
    until(lambda: fleet.nodes[0].client.status().newest["ram"] == 2)
    held = fleet.nodes[1].client.inventory().held
    listed = {h["step"]: h for h in held if h["role"] == "data" and h["tier"] == "ram"}
    assert not listed[2]["ok"] and "FILLING" in listed[2]["why"] and listed[1]["ok"]
    assert fleet.nodes[0].client.status().newest["peers"] == 1
    fleet.nodes[1].check(1)


def test_several_ranks_of_a_node_are_committed_together_and_segments_of_the_world_before_go(fleet: Fleet) -> None:
    fleet.commit(1)
    before = {file.path for file in fleet.nodes[1].folder.segments()}
    fleet.begin(seats=[0, 0, 1, 1])
    for rank in fleet.ranks[:3]:
        assert rank.snapshot(1)
    until(lambda: fleet.nodes[0].client.status().newest["ram"] == 1)
    assert fleet.nodes[0].client.status().newest["peers"] == -1
    assert before <= {file.path for file in fleet.nodes[1].folder.segments()}
    assert fleet.ranks[3].snapshot(1)
    until(lambda: fleet.committed(1))
    fleet.nodes[0].check(1)
    until(lambda: {file.rank for file in fleet.nodes[1].folder.segments()} == {2, 3})


def test_a_node_that_does_not_answer_is_named_and_the_job_is_degraded(fleet: Fleet) -> None:
    fleet.commit(1)
    fleet.nodes[1].kill()
    status = fleet.nodes[0].client.status
    fleet.ranks[0].snapshot(2)
    until(lambda: "node-1" in status().silent)
    until(lambda: "node-1" in status().last_error)
    until(lambda: status().degraded == [0, 1])
    assert status().newest["peers"] == 1
    fleet.nodes[1].respawn()
    fleet.ranks[1].snapshot(2)
    until(lambda: fleet.committed(2))
    until(lambda: status().silent == {} and status().degraded == [])


def test_a_step_that_can_never_be_protected_is_given_up_with_its_parity(tmp_path: Path) -> None:
    folder = NodeFolder(tmp_path, JOB, "node-0").create()
    states = {"data": (State.FILLED, State.COMMITTED), "parity": (State.ENCODED, State.COMMITTED)}
    for role, found in states.items():
        segment = Segment.create(folder.segment_path(role, 0, 64, 2, 1), role, 0, 64, 2, 64, 1)
        for slot, state, step in zip(segment.slots, found, (8, 7), strict=True):
            slot.write(SlotHeader(JOB, 1, step, 0, 1, role, "", 64, 64, state))
    slots = NodeSlots(folder, print)
    slots.refresh()
    assert slots.abort(1, 8, [0]) == [0]
    assert slots.abort(1, 7, [0]) == [], "a step that this node has voted for stays"
    assert {(h.role, h.step) for _, h in slots.held()} == {("data", 7), ("parity", 7)}


def test_a_write_under_way_that_outlives_the_last_decree_gives_its_slot_back(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        adopt = SnapshotClient.adopt

        def adopt_with_a_drive(client: SnapshotClient, membership: Membership, *given: Any, **named: Any) -> None:
            first = client is fleet.nodes[0].client  # the other node has none, so each step is given up
            own = Settings(
                peer_timeout_s=PEER_S,
                local_every=1000,
                local_dir=str(tmp_path / "drive") if first else "/proc/nope",
                bandwidth_bytes_per_s=100.0,  # minutes, unless somebody is in a hurry
            )
            adopt(client, membership, None, own)

        patch.setattr(SnapshotClient, "adopt", adopt_with_a_drive)
        fleet.begin()
    fleet.commit(1000)
    until(fleet.ready)
    fleet.snapshot(1001)
    until(lambda: all(node.client.status().newest["peers"] == 1001 for node in fleet.nodes))
    until(lambda: "1000" in fleet.nodes[0].client.status().last_error)
    fleet.commit(1002)  # though node-0 is still writing step 1000
    assert (fleet.generation, 0, 1000) not in fleet.nodes[0].states() and fleet.committed(1002)
    fleet.nodes[0].client._request("hurry", {})


def test_a_slot_that_moved_on_while_it_was_to_be_freed_goes_all_the_same(tmp_path: Path) -> None:
    folder = NodeFolder(tmp_path, JOB, "node-0").create()
    members = tuple(Member(rank, f"node-{rank}", "", "127.0.0.1", 9, "0" * 32, 64) for rank in range(2))
    membership = Membership(JOB, 1, 2, "none", 1, ((0,), (1,)), members, False, 64)
    segment = Segment.create(folder.segment_path("data", 0, 64, 2, 1), "data", 0, 64, 2, 64, 1)
    segment.slots[0].write(SlotHeader(JOB, 1, 5, 0, 2, "data", "", 64, 64, State.COPIED))
    slots = NodeSlots(folder, print)
    slots.refresh()
    slot = next(slot for slot, _ in slots.held())
    free, tries = slot.free, []

    def free_too_late(header: SlotHeader, wait_s: float = 1.0) -> bool:
        tries.append(header)
        if len(tries) == 1:
            slot.write(replace(header, state=State.FILLED))
        return free(header, wait_s)

    slot.free = free_too_late  # type: ignore[method-assign]
    no_persister: Any = None
    duty = Duty(folder, slots, membership, Settings(), Base(), no_persister, lambda *request: ({}, None), print).start()
    try:
        duty.term.hear(Report("node-1", 1, 1, {1: {}}, {1: 5}))
        until(lambda: len(tries) > 1 and not list(slots.held()))
    finally:
        duty.stop()
    assert slot.header() is None


def test_headers_that_no_answer_carries_are_refused_before_anything_is_freed(fleet: Fleet) -> None:
    fleet.commit(1)
    large = tuple(replace(member, num_bytes=40 << 30) for member in fleet.membership.members)
    membership = replace(fleet.membership, generation=fleet.generation + 1, members=large, chunk_bytes=8192)
    with pytest.raises(CheckpointError, match=r"chunk_bytes = 8192: .* 125829120 bytes .*chunk_bytes=16384"):
        fleet.nodes[0].client.adopt(membership)
    check_headers(replace(membership, chunk_bytes=16384))
    assert fleet.nodes[0].states()[fleet.generation, 0, 1] == "COMMITTED"


def test_a_process_that_was_killed_takes_its_old_port_and_goes_on(fleet: Fleet) -> None:
    fleet.commit(1)
    for node in fleet.nodes:  # the leader first
        before = node.served
        node.kill()
        node.respawn()
        assert (node.served.host, node.served.port) == (before.host, before.port) and node.served.pid != before.pid
        assert node.client.inventory().held, "a client notices nothing but a broken connection"
        node.check(1)
    fleet.commit(2)
    assert all(is_alive(node.served.pid, process_started(node.served.pid) or 0) for node in fleet.nodes)


# -- making steps durable --------------------------------------------------------------------------------------------


def test_a_level_is_due_at_the_first_committed_step_after_each_multiple_and_counts_what_it_leaves_out() -> None:
    cadence = Cadence(10, last=25)
    assert [step for step in (26, 29, 31, 32, 39, 40) if cadence.due(step, busy=False)] == [31, 40]
    assert not cadence.due(50, busy=True) and cadence.skipped == 1
    assert not cadence.due(51, busy=False), "the one that was left out is not made up for"
    assert cadence.due(60, busy=False)
    assert not Cadence(0, 0).due(100, busy=False)


def test_due_steps_are_written_to_storage_and_to_drives_by_all_nodes(fleet: Fleet, tmp_path: Path) -> None:
    wishes = Settings(
        mode="lazy",
        every=2,
        storage=str(tmp_path / "checkpoints"),
        local_every=2,
        local_dir=str(tmp_path / "drive"),
        peer_timeout_s=PEER_S,
    )
    fleet.begin(num_slots=3, settings=wishes)
    fleet.commit(1)
    fleet.commit(2)
    client, now = fleet.nodes[1].client, fleet.generation
    until(lambda: (client.status().newest["storage"], client.status().newest["local"]) == (2, 2))
    fleet.commit(3)
    assert [p.name for p in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000002"]
    reader = CheckpointReader(tmp_path / "checkpoints" / "step-00000002")
    assert reader.manifest.extra["generation"] == now and reader.manifest.extra["step"] == 2
    listed = {(h["tier"], h["role"], h["step"]) for h in client.inventory().held}
    assert {("local", "data", 2), ("local", "parity", 2), ("ram", "data", 3)} <= listed
    header = client.header(1, "data", 2, now, tier="local")
    assert header is not None
    got = np.empty(header.num_bytes, np.uint8)
    client.read(1, "data", 2, now, 0, got.data, tier="local")
    assert np.array_equal(got, data_of(1, 2, header.num_bytes))


def test_a_flush_makes_the_newest_protected_step_durable_and_waits_for_one_that_is_asked_for(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("windlass.checkpoint.memory.client.ANSWER_S", 60.0)  # the refusals of a busy machine
    fleet.begin(settings=Settings(storage=str(tmp_path / "checkpoints"), peer_timeout_s=PEER_S))
    ask = fleet.nodes[1].client  # not the leader
    with pytest.raises(CheckpointError, match=f"no step of generation {fleet.generation} is committed yet"):
        ask.flush(0.5)
    fleet.commit(1)
    done = ask.flush(60.0)
    assert done.step == 1 and Path(done.place).name == "step-00000001" and done.num_bytes > 0
    assert ask.flush(60.0) == done, "what is durable is not written again"
    fleet.ranks[0].snapshot(2)
    with pytest.raises(CheckpointError, match=r"step 2 was not protected within .* waiting for .*rank 1 on node-1"):
        ask.flush(0.3, at_least=2)
    fleet.ranks[1].snapshot(2)
    assert ask.flush(60.0, at_least=2).step == 2


def test_a_step_that_cannot_be_written_is_reported_and_training_goes_on(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    fleet.begin(settings=Settings(mode="async", every=1, storage=str(tmp_path / "checkpoints"), peer_timeout_s=PEER_S))
    fleet.commit(1)
    until(lambda: "step 1" in fleet.nodes[1].client.status().last_error)
    assert fleet.nodes[0].client.status().newest["storage"] == -1
    fleet.commit(2)
    with pytest.raises(CheckpointError, match="step 2"):
        fleet.nodes[0].client.flush(60.0)


def test_settings_that_are_unknown_or_of_another_kind_are_named() -> None:
    with pytest.raises(CheckpointError, match="lease = 3"):
        Settings.parse({"lease": 3})
    with pytest.raises(CheckpointError, match="every = '2'"):
        Settings.parse({"every": "2"})
    assert Settings.parse(json.loads(json.dumps({"hang_s": 3}))).hang_s == 3


def test_a_client_that_learns_the_generation_does_so_without_assertions_too(node: Node) -> None:
    script = (
        "import sys; from windlass.checkpoint.memory.client import SnapshotClient as Client; "
        "from windlass.checkpoint.memory.folder import NodeFolder as Folder; "
        "print(Client.of(Folder.at(sys.argv[1])).inventory().generation)"
    )
    said = subprocess.run(
        [sys.executable, "-O", "-c", script, str(node.folder.path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert said.stdout.strip() == "1", said.stderr
