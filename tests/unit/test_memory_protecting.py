"""How a node protects its part of a step, with its snapshot process as threads of the test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.snapshot_nodes import CHUNK, Fleet, NodeInThreads, data_of, fleet_of
from tests.waiting import until
from windlass.checkpoint.memory.header import State
from windlass.checkpoint.memory.protect import ATTEMPTS, Protector
from windlass.checkpoint.memory.settings import Settings


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with fleet_of(tmp_path, 2, kind=NodeInThreads) as fleet:
        yield fleet


def test_a_step_that_one_rank_copies_slowly_is_waited_for(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    protect, tried = Protector.protect, []

    def counted(protector: Protector, step: int) -> bool:
        tried.append(protect(protector, step))
        return tried[-1]

    monkeypatch.setattr(Protector, "protect", counted)
    fleet.begin(settings=Settings(peer_timeout_s=0.3))
    quick, slow = fleet.ranks
    quick.snapshot(1)
    slow.snapshot(1, copied=CHUNK)
    until(lambda: "rank 1 on node-1 is still taking" in fleet.nodes[0].client.status().last_error)
    until(lambda: tried.count(False) > ATTEMPTS)  # more often than a step may fail
    slot = next(s for s in slow.segment.slots if (h := s.header()) is not None and h.step == 1)
    header = slot.header()
    assert header is not None
    slot.data[:] = data_of(1, 1, slow.num_bytes)
    slot.progress = slow.num_bytes
    slot.write(replace(header, state=State.COPIED))
    until(lambda: fleet.committed(1))
    until(lambda: fleet.nodes[0].client.status().last_error == "")
