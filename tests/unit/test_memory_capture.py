"""Snapshots of a rank: what they hold, what they wait for, and what is left when a process dies while one is taken."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.snapshot_state import JOB, HeldState, capturer, hashed, mixed_tensors, same, slots, whole_steps
from tests.waiting import until
from windlass.checkpoint.memory import capture, copier
from windlass.checkpoint.memory import folder as folder_module
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.segment import State, parity_hashes, segment_bytes
from windlass.checkpoint.memory.stripes import Stripes
from windlass.dist.errors import CheckpointError, WorkerError

FACTS = {"step": 1, "cursor": {"consumed": 96}, "loss": 0.1}


def flat(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor.reshape(-1).clone() for key, tensor in tensors.items()}


class Link:
    """In place of a pace: the buckets that a test lets through have had the time to pass."""

    def __init__(self):
        self.rate, self._passed = None, threading.Semaphore(0)

    def __call__(self, bytes_per_s):
        self.rate = bytes_per_s
        return self

    def spend(self, num_bytes):
        assert self._passed.acquire(timeout=60)

    def let(self, num_buckets):
        self._passed.release(num_buckets)


@pytest.fixture
def link(monkeypatch):
    made = Link()
    monkeypatch.setattr(capture, "Pace", made)
    return made


def whole_headers(taker):
    """Return the steps of the slots that are filled."""
    return [header.step for slot in slots(taker.folder) if (header := slot.header()) and header.state == State.COPIED]


# -- what is taken -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("movable", [False, True])
def test_a_snapshot_holds_the_state_and_the_facts_of_its_step(tmp_path, eager, movable):
    source = HeldState(mixed_tensors(), movable=movable)
    taker = capturer(tmp_path, source)
    assert taker.ready() and taker.snapshot(1, FACTS, eager=eager)
    taker.gate()
    header = hashed(slots(taker.folder)[0])
    assert (header.step, header.generation, header.rank, header.facts) == (1, 1, 0, FACTS)
    assert header.num_bytes == taker.layout.num_bytes == slots(taker.folder)[0].progress
    assert same(whole_steps(taker.folder)[1], flat(source.tensors))
    assert taker.counters.taken == 1 and taker.counters.bytes == sum(t.nbytes for t in source.tensors.values())
    taker.close()


def test_what_changes_after_the_gate_is_not_in_the_snapshot(tmp_path):
    source = HeldState({"model.w": torch.zeros(1 << 16)})
    taker = capturer(tmp_path, source, slots=4)
    for step in range(1, 5):
        source.tensors["model.w"].fill_(step)
        assert taker.snapshot(step, {})
        taker.gate()
    for slot in slots(taker.folder):
        hashed(slot)
    found = whole_steps(taker.folder)
    assert {step: held["model.w"].unique().tolist() for step, held in found.items()} == {s: [s] for s in range(1, 5)}
    taker.close()


def test_state_on_loan_is_opened_in_order_once_and_only_if_it_is_needed(tmp_path):
    tensors = {f"model.{i}": torch.randn(256) for i in range(6)}
    source = HeldState(tensors, replicas=(0, 1), movable=True)
    taker = capturer(tmp_path, source, rank=1)
    taker.snapshot(1, {})
    assert source.opened == ["model.3", "model.4", "model.5"]
    assert taker.gate() == 0.0 and taker.counters.eager_s > 0.0
    hashed(slots(taker.folder)[0])
    assert same(whole_steps(taker.folder)[1], {k: tensors[k] for k in source.opened})
    taker.close()


def test_the_gate_waits_for_the_copy_and_for_nothing_else(tmp_path, link, monkeypatch):
    source = HeldState({"model.w": torch.zeros(1 << 18)})  # 1 MiB: 16 buckets
    taker = capturer(tmp_path, source, link_bytes_per_s=2e6)
    assert link.rate == 2e6
    slot = slots(taker.folder)[0]
    assert taker.snapshot(1, {})
    until(lambda: slot.header() is not None)
    half = slot.header()
    assert half is not None and half.state == State.FILLING and slot.progress < half.num_bytes
    assert not taker.ready()  # one at a time
    assert taker._under_way is not None
    done, wait = taker._under_way.done, taker._under_way.done.wait

    def wait_for_the_link(timeout_s):
        threading.Timer(0.1, link.let, (16,)).start()
        return wait(timeout_s)

    monkeypatch.setattr(done, "wait", wait_for_the_link)
    waited = taker.gate()
    assert waited > 0.1 and taker.counters.gate_s == waited
    whole = slot.header()
    assert whole is not None and whole.state == State.COPIED and slot.progress == whole.num_bytes
    assert taker.gate() == 0.0
    taker.close()


def test_progress_grows_in_order_so_that_chunks_can_be_hashed_as_they_land(tmp_path, link):
    source = HeldState({f"model.{i}": torch.full((16 << 10,), float(i)) for i in range(8)})
    taker = capturer(tmp_path, source)
    taker.snapshot(1, {})
    slot, seen, chunk = slots(taker.folder)[0], [0], 64 << 10
    while seen[-1] < taker.layout.num_bytes:
        until(lambda: slot.progress > seen[-1])
        seen.append(slot.progress)
        assert np.all(
            slot.data[: seen[-1] // chunk * chunk].view(np.float32)[:: chunk // 4] == np.arange(seen[-1] // chunk)
        )
        link.let(1)
    assert seen == [i * chunk for i in range(9)] and taker.gate() >= 0.0
    taker.close()


def test_without_a_free_slot_a_snapshot_is_skipped_counted_and_waits_for_nobody(tmp_path):
    source = HeldState(mixed_tensors())
    taker = capturer(tmp_path, source)
    for step in (1, 2):
        assert taker.snapshot(step, {})
        taker.gate()
    before = [slot.header() for slot in slots(taker.folder)]
    assert not taker.ready() and not taker.snapshot(3, {})
    taker.skip()
    assert taker.counters.skipped == 2 and taker.counters.taken == 2
    assert [slot.header() for slot in slots(taker.folder)] == before
    assert slots(taker.folder)[0].free() and taker.ready()
    assert taker.snapshot(4, {}) and taker.gate() >= 0
    assert sorted(h.step for h in (s.header() for s in slots(taker.folder)) if h) == [2, 4]
    taker.close()


@pytest.mark.parametrize("eager", [False, True])
def test_training_does_not_wait_for_a_slot_that_somebody_is_writing(tmp_path, monkeypatch, eager):
    monkeypatch.setattr(copier, "HEADER_S", 0.05)
    taker = capturer(tmp_path, HeldState(mixed_tensors()))
    slot = slots(taker.folder)[0]
    with slot._alone(0.0) as alone:
        assert alone
        assert taker.snapshot(1, {}, eager=eager) != eager  # lazily it turns out later
        until(lambda: taker.counters.skipped == 1)
        assert taker.gate() == 0.0 or not eager
    assert slot.header() is None and taker.counters.taken == 0 and taker.newest is None
    assert taker.snapshot(2, {}, eager=eager) and taker.gate() >= 0
    assert taker.newest == 2 and taker.counters.taken == 1 and sorted(whole_headers(taker)) == [2]
    taker.close()


def test_facts_that_are_worked_out_later_are_of_the_moment_the_snapshot_was_taken(tmp_path):
    source = HeldState(mixed_tensors())
    taker, threads = capturer(tmp_path, source), list[str]()

    def later():
        threads.append(threading.current_thread().name)
        return {"drawn": 7}

    assert taker.snapshot(1, {"step": 1}, later=later)
    taker.gate()
    assert threads == ["snapshot of rank 0"]
    header = slots(taker.folder)[0].header()
    assert header is not None and header.facts == {"step": 1, "drawn": 7}
    taker.close()


def test_a_restarted_rank_finds_its_slots_and_takes_over_what_was_half_filled(tmp_path):
    source = HeldState(mixed_tensors())
    first = capturer(tmp_path, source)
    first.snapshot(1, FACTS)
    first.gate()
    kept = hashed(slots(first.folder)[0])
    first.close()
    half = slots(first.folder)[1]
    assert half.write(replace(kept, state=State.FILLING, step=2, hashes={}, sequence=-1))
    again = capturer(tmp_path, source, generation=2)
    assert len(again.folder.segments()) == 1
    assert slots(again.folder)[0].header() == kept  # opening frees nothing
    assert again.snapshot(2, {}) and again.gate() >= 0
    found = half.header()
    assert found is not None and (found.generation, found.state) == (2, State.COPIED)
    again.close()


def test_state_of_another_size_goes_into_another_segment_beside_the_old_one(tmp_path):
    first = capturer(tmp_path, HeldState({"model.w": torch.ones(5000)}))
    first.snapshot(1, {})
    first.close()
    hashed(slots(first.folder)[0])
    second = capturer(tmp_path, HeldState({"model.w": torch.ones(9000)}), generation=2)
    assert sorted(file.slot_bytes for file in second.folder.segments()) == [20032, 36032]
    second.close()


def test_gaps_between_fragments_hold_zeros_whatever_was_there(tmp_path):
    source = HeldState({"model.a": torch.ones(3), "model.b": torch.ones(5)})
    taker = capturer(tmp_path, source)
    slot = slots(taker.folder)[0]
    slot.data[:] = 0xFF
    taker.snapshot(1, {})
    taker.gate()
    assert slot.data[12:64].tolist() == [0] * 52 and slot.data[84:128].tolist() == [0] * 44
    taker.close()


# -- bad input and failures --------------------------------------------------------------------------------------------


def test_too_little_memory_is_said_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "_memory_left", lambda: folder_module.SPARE_BYTES + (1 << 20))
    with pytest.raises(CheckpointError, match=r"2 snapshots of rank 0 .*need 9\.\d MiB, 1\.0 MiB can be had"):
        capturer(tmp_path, HeldState({"model.w": torch.zeros(1 << 20)}))
    assert NodeFolder(tmp_path, JOB, "node-0").segments() == []


@pytest.mark.parametrize("parity", [False, True])
def test_the_memory_that_is_wanted_is_what_opening_takes(tmp_path, parity):
    source = HeldState(mixed_tensors(), replicas=(0, 1))
    taker = capturer(tmp_path, source, parity=parity, opened=False)
    pulled = None if parity else Stripes((0, 1), (taker.layout.num_bytes, 9000), 1, 4096)
    wanted, more = taker.wanted_bytes(), taker.wanted_bytes(pulled)
    assert taker.folder.segments() == []
    taker.open()
    assert wanted == sum(file.path.stat().st_size for file in taker.folder.segments()) > taker.layout.num_bytes
    assert taker.wanted_bytes() == 0 and taker.wanted_bytes(pulled) == more - wanted
    if pulled is not None:
        assert more - wanted == segment_bytes(pulled.parity_bytes, 2, parity_hashes(pulled))
    taker.close()


def test_memory_that_is_there_already_is_not_asked_for_again(tmp_path, monkeypatch):
    source = HeldState({"model.w": torch.zeros(1 << 20)})
    capturer(tmp_path, source).close()
    monkeypatch.setattr(folder_module, "_memory_left", lambda: folder_module.SPARE_BYTES)
    again = capturer(tmp_path, source, generation=2)
    assert again.ready()
    again.close()


@pytest.mark.parametrize("point", ["snapshot.chunk", "snapshot.filled"])
@pytest.mark.parametrize(("action", "error"), [("raise", WorkerError), ("eio", CheckpointError)])
def test_a_copy_that_fails_is_raised_at_the_gate_and_leaves_the_others_whole(
    tmp_path, monkeypatch, point, action, error
):
    source = HeldState(mixed_tensors())
    taker = capturer(tmp_path, source)
    taker.snapshot(1, {})
    taker.gate()
    hashed(slots(taker.folder)[0])
    monkeypatch.setenv("WINDLASS_FAULT", f"{action}:{point}:step=2")
    assert taker.snapshot(2, {})
    with pytest.raises(error, match=r"injected at " + point):
        taker.gate()
    assert whole_steps(taker.folder).keys() == {1} and slots(taker.folder)[1].header() is None
    assert taker.snapshot(3, {}) and taker.gate() >= 0
    taker.close()


@pytest.mark.parametrize("point", ["snapshot.eager", "snapshot.chunk", "snapshot.filled"])
def test_an_eager_copy_that_fails_is_raised_at_once_and_frees_its_slot(tmp_path, monkeypatch, point):
    taker = capturer(tmp_path, HeldState(mixed_tensors(), movable=True))
    monkeypatch.setenv("WINDLASS_FAULT", f"enospc:{point}:step=1")
    with pytest.raises(OSError, match="No space left"):
        taker.snapshot(1, {})
    assert [slot.header() for slot in slots(taker.folder)] == [None, None]
    assert taker.counters.taken == 0 and taker.snapshot(2, {})
    taker.close()


def test_state_that_moves_without_saying_so_is_noticed(tmp_path):
    source = HeldState({"model.w": torch.ones(1000)})
    taker = capturer(tmp_path, source)
    taker.snapshot(1, {})
    taker.gate()
    source.tensors["model.w"] = torch.ones(1000)
    taker.snapshot(2, {})
    with pytest.raises(CheckpointError, match="must say that it is movable"):
        taker.gate()
    taker.close()


def test_state_that_has_other_pieces_than_its_layout_is_refused(tmp_path):
    source = HeldState({"model.w": torch.ones(1000)}, movable=True)
    taker = capturer(tmp_path, source)
    source.tensors["model.v"] = torch.ones(3)
    with pytest.raises(CheckpointError, match="no longer has the pieces"):
        taker.snapshot(1, {})
    assert taker.ready()
    taker.close()


def test_a_gate_that_never_opens_says_who_and_how_far(tmp_path, link, monkeypatch):
    monkeypatch.setattr(capture, "GATE_S", 0.01)
    taker = capturer(tmp_path, HeldState({"model.w": torch.ones(1 << 16)}))
    taker.snapshot(1, {})
    with pytest.raises(CheckpointError, match=r"rank 0: the snapshot of step 1 was not copied .*of 262144 bytes"):
        taker.gate()
    link.let(4)
    monkeypatch.undo()
    taker.close()


def test_a_slot_that_somebody_else_wrote_meanwhile_is_not_said_to_be_whole(tmp_path, link):
    taker = capturer(tmp_path, HeldState({"model.w": torch.ones(1 << 16)}))
    taker.snapshot(1, {})
    until(lambda: slots(taker.folder)[0].header() is not None)
    assert slots(taker.folder)[0].free()
    link.let(4)
    with pytest.raises(CheckpointError, match="somebody else wrote slot 0"):
        taker.gate()
    assert slots(taker.folder)[0].header() is None
    taker.close()
