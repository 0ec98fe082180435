"""Slots of segments: a header torn or flipped anywhere is the old one or none, never a wrong one."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.waiting import until
from windlass.checkpoint.memory import segment as module
from windlass.checkpoint.memory.header import FACTS_BYTES, OWN_PARITY, SlotHeader, State
from windlass.checkpoint.memory.segment import (
    PAGE,
    Segment,
    Slot,
    hash_chunks,
    num_chunks,
    pick_slot,
    segment_bytes,
    verify,
)
from windlass.dist.errors import CheckpointError

SIZE, CHUNK = 1000, 64
NEW = SlotHeader("job", 2, 7, 3, 4, "data", "ab" * 16, SIZE, CHUNK, State.FILLING, {"cursor": [1, 2]})


def new_segment(path: Path, num_slots: int = 2) -> Segment:
    return Segment.create(path, "data", 3, SIZE, num_slots, CHUNK, 64)


@pytest.fixture
def segment(tmp_path) -> Iterator[Segment]:
    made = new_segment(tmp_path / "a.seg")
    yield made
    made.close()


@pytest.fixture(scope="module")
def reused(tmp_path_factory) -> Iterator[Segment]:
    """One segment for all examples of a property; `restart` brings its first slot back."""
    made = new_segment(tmp_path_factory.mktemp("segment") / "a.seg")
    yield made
    made.close()


def restart(segment: Segment) -> Slot:
    slot = segment.slots[0]
    segment.memory[PAGE : PAGE + segment.stride] = 0
    return slot


def head_region(slot: Slot) -> np.ndarray:
    """All bytes of a slot but its data: words and both copies of the header."""
    segment = slot.segment
    start = PAGE + slot.index * segment.stride
    return segment.memory[start : start + PAGE + 2 * segment.header_bytes]


def written(slot: Slot, header: SlotHeader) -> SlotHeader:
    assert slot.write(header)
    back = slot.header()
    assert back is not None
    return back


def filled(slot: Slot, **changes: object) -> SlotHeader:
    """Take a slot through FILLING, COPIED and FILLED."""
    header = written(slot, replace(NEW, **changes))
    slot.data[:] = np.arange(SIZE, dtype=np.uint64).astype(np.uint8) + header.step
    header = written(slot, replace(header, state=State.COPIED))
    hashes = {header.own_key: hash_chunks(slot.data, SIZE, CHUNK)}
    return written(slot, replace(header, state=State.FILLED, hashes=hashes))


def test_fresh_slots_hold_nothing_and_are_full_size(segment):
    assert [slot.header() for slot in segment.slots] == [None, None]
    assert [slot.data.shape for slot in segment.slots] == [(SIZE,), (SIZE,)]
    assert segment.path.stat().st_size == segment_bytes(SIZE, 2, 64)
    assert segment.path.stat().st_blocks * 512 >= segment_bytes(SIZE, 2, 64)  # allocated, not promised


def test_what_one_process_writes_another_reads(segment):
    header = filled(segment.slots[1], layouts={5: "cd"})
    other = Segment.open(segment.path)
    found = other.slots[1].header()
    assert found == header and found.sequence == 3
    assert np.array_equal(found.hashes[3], header.hashes[3])
    assert np.array_equal(other.slots[1].data, segment.slots[1].data)
    assert (other.role, other.rank, other.slot_bytes, other.num_slots) == ("data", 3, SIZE, 2)
    with pytest.raises(ValueError, match="read-only"):
        other.slots[1].data[0] = 1
    other.close()


def test_a_header_travels_as_json_and_tables(segment):
    header = filled(segment.slots[0])
    header = replace(header, hashes={**header.hashes, 9: np.arange(5, dtype=np.uint64)})
    values, tables = header.dump()
    back = SlotHeader.parse(json.loads(json.dumps(values)), tables)
    assert back == header and back.sequence == -1
    assert {k: v.tolist() for k, v in back.hashes.items()} == {k: v.tolist() for k, v in header.hashes.items()}


@pytest.mark.parametrize(
    "change",
    [
        {"role": "other"},
        {"step": -1},
        {"rank": "0"},
        {"state": 17},
        {"tables": [[0, 99]]},
        {"chunk_bytes": 0},
        {"layouts": 4},
        {"job": None, "generation": True},
    ],
)
def test_what_is_no_header_is_refused(change):
    values, tables = NEW.dump()
    with pytest.raises(CheckpointError, match="not the header of a slot"):
        SlotHeader.parse({**values, **change}, tables)
    with pytest.raises(CheckpointError, match="not the header of a slot"):
        SlotHeader.parse({"job": "j"}, b"")


def test_a_writer_who_has_not_seen_the_last_header_changes_nothing(segment):
    slot = segment.slots[0]
    seen = filled(slot)
    refilled = written(slot, replace(NEW, step=9))
    assert not slot.write(replace(seen, state=State.ENCODED))
    assert not slot.free(seen)
    assert slot.header() == refilled
    assert slot.free(refilled) and slot.header() is None


def test_another_writer_at_work_is_waited_for_no_longer_than_asked(segment):
    slot, other = segment.slots[0], Segment.open(segment.path, writable=True)
    header = written(slot, NEW)
    with other.slots[0]._alone(0.0) as alone:  # another process: its own open file
        assert alone
        assert not slot.write(replace(header, state=State.COPIED), wait_s=0)
        assert not slot.free(wait_s=0.01)
        assert segment.slots[1].write(NEW, wait_s=0)  # another slot is nobody's business
    assert slot.write(replace(header, state=State.COPIED), wait_s=0)
    other.close()


def test_threads_that_write_one_slot_take_turns(segment):
    slot = segment.slots[0]
    header = written(slot, NEW)
    outcomes: list[bool] = []

    def advance() -> None:
        outcomes.append(slot.write(replace(header, state=State.COPIED)))

    threads = [threading.Thread(target=advance) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [False] * 7 + [True]
    assert slot.sequence == header.sequence + 1


def test_a_fill_starts_with_no_progress(segment):
    slot = segment.slots[0]
    header = written(slot, NEW)
    slot.progress = 640
    assert slot.progress == 640
    written(slot, replace(header, state=State.COPIED))
    assert slot.progress == 640
    written(slot, replace(NEW, step=8))
    assert slot.progress == 0


# -- torn, flipped, lost -------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(data=st.data())
def test_a_header_torn_anywhere_while_it_is_written_leaves_the_old_one(reused, data):
    """Until the word is stored, any subset of the bytes of the new header may have reached memory."""
    slot = restart(reused)
    old = filled(slot)
    before = head_region(slot).copy()
    new = replace(old, state=data.draw(st.sampled_from([State.ENCODED, State.FILLING])), step=8)
    assert slot.write(new)
    after = head_region(slot).copy()
    changed = np.flatnonzero(before[PAGE:] != after[PAGE:]) + PAGE
    low, high = sorted(data.draw(st.tuples(*[st.integers(0, len(changed))] * 2)))
    torn = before.copy()
    # The wipe of the old copy comes after the word: before it, only the copy that does not hold has changed.
    copy = PAGE + (old.sequence + 1) % 2 * reused.header_bytes
    mine = changed[low:high]
    mine = mine[(mine >= copy) & (mine < copy + reused.header_bytes)]
    torn[mine] = after[mine]
    head_region(slot)[:] = torn
    assert slot.header() == old


@settings(max_examples=100)
@given(data=st.data())
def test_a_header_with_flipped_bytes_is_the_one_before_or_none(reused, data):
    slot = restart(reused)
    steps = [filled(slot)]
    steps.append(written(slot, replace(steps[-1], state=State.ENCODED)))
    region = head_region(slot)
    used = np.flatnonzero(region)  # where bytes matter, and some where they do not
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.sampled_from(used.tolist()) | st.integers(0, len(region) - 1))
        region[at] ^= data.draw(st.integers(1, 255))
    found = slot.header()
    assert found is None or found in steps


@settings(max_examples=60)
@given(data=st.data())
def test_a_fill_with_flipped_bytes_is_never_taken_for_the_snapshot_before_it(reused, data):
    slot = restart(reused)
    filled(slot)
    filling = written(slot, replace(NEW, step=8))
    slot.data[:] = 0
    region = head_region(slot)
    at = data.draw(st.sampled_from(np.flatnonzero(region).tolist()) | st.integers(0, len(region) - 1))
    region[at] ^= data.draw(st.integers(1, 255))
    assert slot.header() in (None, filling)


@settings(max_examples=60)
@given(st.integers(0, PAGE + 2 * 300_000))
def test_headers_truncated_to_zeros_are_the_one_before_or_none(reused, at):
    slot = restart(reused)
    steps = [filled(slot)]
    steps.append(written(slot, replace(steps[-1], state=State.COMMITTED)))
    head_region(slot)[at:] = 0
    assert slot.header() in (None, *steps)


@pytest.mark.parametrize("then", ["fill", "free"])
def test_a_killed_writer_that_did_not_wipe_leaves_the_old_or_the_new(segment, monkeypatch, then):
    slot = segment.slots[0]
    old = filled(slot)
    monkeypatch.setattr(Slot, "_wipe", lambda self, sequence: None)  # the kill comes before
    if then == "fill":
        new = written(slot, replace(NEW, step=8))
        assert slot.header() == new
    else:
        assert slot.free()
        assert slot.header() == old  # its data is whole: nobody has been told that the slot is free


def test_a_reader_meanwhile_sees_one_header_or_the_next(segment):
    slot, reader = segment.slots[0], Segment.open(segment.path).slots[0]
    stop, seen = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            seen.append(reader.header())

    header = written(slot, NEW)
    thread = threading.Thread(target=read)
    thread.start()
    until(lambda: bool(seen), 60.0)
    for step in range(8, 308):
        header = written(slot, replace(header, step=step, facts={"step": step}))
    stop.set()
    thread.join()
    steps = [h.step for h in seen if h is not None]
    assert steps == sorted(steps) and all(h is None or h.step == 7 or h.facts == {"step": h.step} for h in seen)
    assert steps


# -- what does not fit, what is damaged ------------------------------------------------------------------------------


def test_facts_that_are_too_large_are_refused_and_the_slot_stays(segment):
    old = filled(segment.slots[0])
    with pytest.raises(CheckpointError, match=r"facts of snapshot 7 take \d+ bytes.*has room for"):
        segment.slots[0].write(replace(old, facts={"much": "x" * FACTS_BYTES}))
    assert segment.slots[0].header() == old


def test_tables_and_data_that_do_not_fit_are_refused(segment):
    with pytest.raises(CheckpointError, match="larger table_chunks"):
        segment.slots[0].write(replace(NEW, hashes={0: np.zeros(65, np.uint64)}))
    with pytest.raises(CheckpointError, match="or slot_bytes"):
        segment.slots[0].write(replace(NEW, num_bytes=SIZE + 1))
    assert segment.slots[0].header() is None


def test_memory_that_cannot_be_had_is_said_with_its_size_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match=rf"{segment_bytes(SIZE, 2, 64)} bytes \(2 slots of 1000\).*No space"):
        new_segment(tmp_path / "a.seg")
    assert list(tmp_path.iterdir()) == []


def test_a_segment_is_never_written_over(segment):
    filled(segment.slots[0])
    with pytest.raises(CheckpointError, match="File exists"):
        new_segment(segment.path)
    assert segment.slots[0].header() is not None
    assert [p.name for p in segment.path.parent.iterdir()] == [segment.path.name]


def mapped_bytes(path: Path) -> int:
    """Return how much of a file this process has mapped pages of."""
    entries = Path("/proc/self/smaps").read_text().split("VmFlags:")
    return sum(int(entry.split("Rss:")[1].split()[0]) << 10 for entry in entries if str(path) in entry)


def test_opening_a_segment_to_read_its_headers_does_not_read_its_data(tmp_path):
    path, size = tmp_path / "a.seg", 8 << 20
    made = Segment.create(path, "data", 3, size, 1, 1 << 20, 8)
    assert mapped_bytes(path) > size  # a trainer's copy is not slowed by a first touch
    header = replace(NEW, num_bytes=size, chunk_bytes=1 << 20, state=State.COPIED)
    assert made.slots[0].write(header)
    made.close()
    found = Segment.open(path)
    assert found.slots[0].header().step == header.step and mapped_bytes(path) < size // 8
    found.close()


def test_ensure_finds_what_is_there_and_replaces_what_nobody_can_read(segment):
    header = filled(segment.slots[0])
    again = Segment.ensure(segment.path, "data", 3, SIZE, 2, CHUNK, 64)
    assert again.slots[0].header() == header
    again.memory[3] ^= 1
    again.close()
    fresh = Segment.ensure(segment.path, "data", 3, SIZE, 2, CHUNK, 64)
    assert [slot.header() for slot in fresh.slots] == [None, None]
    fresh.close()


@pytest.mark.parametrize("length", [0, 10, PAGE, PAGE + 1, segment_bytes(SIZE, 2, 64) - 1])
def test_a_truncated_file_is_refused(segment, length):
    with segment.path.open("r+b") as stream:
        stream.truncate(length)
    with pytest.raises(CheckpointError, match="not a whole segment"):
        Segment.open(segment.path)


def test_closing_twice_is_closing_once(tmp_path):
    made = new_segment(tmp_path / "b.seg")
    data = made.slots[0].data
    made.close()
    made.close()
    data[:] = 5  # still mapped, because it is still held
    assert np.fromfile(tmp_path / "b.seg", np.uint8).max() == 5 or data.max() == 5


# -- hashes and choices ----------------------------------------------------------------------------------------------


@given(at=st.integers(0, SIZE - 1), change=st.integers(1, 255))
def test_a_flipped_byte_damages_exactly_its_chunk(reused, at, change):
    slot = restart(reused)
    header = filled(slot)
    assert verify(slot, header) == []
    slot.data[at] ^= change
    assert verify(slot, header) == [at // CHUNK]


def test_hashes_may_be_made_as_chunks_land():
    data = np.random.default_rng(1).integers(0, 256, SIZE, dtype=np.uint8)
    whole = hash_chunks(data, SIZE, CHUNK)
    assert len(whole) == num_chunks(SIZE, CHUNK) == 16
    assert np.array_equal(hash_chunks(data, SIZE, CHUNK, first=9), whole[9:])
    assert np.array_equal(hash_chunks(data, 9 * CHUNK, CHUNK), whole[:9])
    assert len(hash_chunks(data, 0, CHUNK)) == 0


def test_what_was_never_hashed_is_not_vouched_for(segment):
    header = written(segment.slots[0], replace(NEW, state=State.COPIED))
    with pytest.raises(CheckpointError, match=r"rank 3, data of step 7 \(COPIED\): not hashed"):
        verify(segment.slots[0], header)


def test_a_slot_that_was_filled_again_has_nothing_left_of_the_old_snapshot(segment):
    slot = segment.slots[0]
    header = filled(slot)
    written(slot, replace(NEW, step=8))
    assert verify(slot, header) == list(range(16))


def test_parity_has_its_own_table(segment):
    header = filled(segment.slots[0], role="parity", layout="", hashes={})
    assert header.own_key == OWN_PARITY and verify(segment.slots[0], header) == []


def test_the_next_slot_is_one_that_holds_nothing(segment):
    first, second = segment.slots
    assert pick_slot(segment, generation=2) == (first, 0)
    filled(first)
    assert pick_slot(segment, generation=2) == (second, 0)
    filled(second, step=8)
    assert pick_slot(segment, generation=2) is None
    assert first.free()
    assert pick_slot(segment, generation=2) == (first, 4)


def test_a_half_filled_slot_is_taken_from_a_dead_generation_only(segment):
    first, second = segment.slots
    filled(second)
    written(first, NEW)
    assert pick_slot(segment, generation=2) is None
    assert pick_slot(segment, generation=3) == (first, 1)


def test_whoever_picked_an_older_state_of_a_slot_cannot_claim_it(segment):
    picked = pick_slot(segment, generation=2)
    assert picked is not None
    slot, sequence = picked
    newer = filled(slot)
    assert not slot.write(replace(NEW, step=9, sequence=sequence))
    assert slot.header() == newer
