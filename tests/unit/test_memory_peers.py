"""Where the snapshot processes of other nodes are, when they are not where the membership says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from windlass.checkpoint.memory.folder import NodeFolder, SnapshotProcess
from windlass.checkpoint.memory.membership import Member, Membership
from windlass.checkpoint.memory.peers import Peers, kept_moves, moves_name
from windlass.dist.errors import CheckpointError
from windlass.launch.resume_memory import _absent

JOB = "a" * 16


@pytest.fixture
def folder(tmp_path: Path) -> NodeFolder:
    return NodeFolder(tmp_path, JOB, "node-0").create("secret")


def world(generation: int) -> Membership:
    members = tuple(Member(r, f"node-{r}", f"node-{r}", "10.0.0.1", 100 + r, "", 8) for r in range(3))
    return Membership(JOB, generation, 3, "xor", 1, ((0, 1, 2),), members, False, 256)


def peers(folder: NodeFolder, generation: int = 1) -> Peers:
    return Peers(world(generation), folder, lambda verb, fields, payload: ({}, None), 1.0)


def test_moves_outlive_the_process_that_heard_of_them_and_the_later_one_counts(folder: NodeFolder) -> None:
    mine = peers(folder)
    mine.exchange_moves(json.dumps({"node-1": ["10.0.0.2", 7, 20], "node-9": ["10.0.0.9", 9, 1]}).encode())
    mine.exchange_moves(json.dumps({"node-1": ["10.0.0.3", 8, 10]}).encode())  # of an earlier process
    assert peers(folder).address_of("node-1") == ("10.0.0.2", 7) == mine.address_of("node-1")
    assert kept_moves(folder, world(1)) == {"node-1": ("10.0.0.2", 7, 20)}
    assert peers(folder, 2).address_of("node-1") == ("10.0.0.1", 101)  # of another generation


def test_a_process_that_is_where_it_should_be_tells_nobody(folder: NodeFolder) -> None:
    assert not peers(folder).moved(SnapshotProcess(1, 5, "10.0.0.1", 100))
    assert peers(folder).moved(SnapshotProcess(1, 5, "10.0.0.1", 555))
    assert peers(folder).moved(SnapshotProcess(2, 6, "10.0.0.1", 100)), "it is back, and the others look elsewhere"


@pytest.mark.parametrize("text", [b"no json", b"[1]", b'{"node-1": ["h"]}', b'{"node-1": 3}'])
def test_what_is_malformed_is_refused_and_what_is_kept_of_it_ignored(folder: NodeFolder, text: bytes) -> None:
    with pytest.raises(CheckpointError, match="malformed"):
        peers(folder).exchange_moves(text)
    (folder.path / moves_name(1)).write_bytes(text)
    assert kept_moves(folder, world(1)) == {}


def test_a_node_without_ranks_is_asked_where_it_moved(folder: NodeFolder) -> None:
    peers(folder, 2).exchange_moves(json.dumps({"node-1": ["10.0.0.2", 7, 20]}).encode())
    asked = _absent({1: world(1), 2: world(2)}, {"node-0": 0}, folder)
    assert asked == [("node-1", "10.0.0.2", 7), ("node-2", "10.0.0.1", 102)]
