"""The segments of a node as its snapshot process holds them: mapped, mapped again, let go."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.snapshot_nodes import JOB
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.header import SlotHeader, State
from windlass.checkpoint.memory.segment import Segment, Slot
from windlass.checkpoint.memory.slots import NodeSlots
from windlass.dist.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> NodeFolder:
    return NodeFolder(tmp_path, JOB, "node-0").create("22" * 32)


@pytest.fixture
def segment(folder: NodeFolder) -> Iterator[Segment]:
    segment = Segment.create(folder.segment_path("data", 0, 64, 2, 1), "data", 0, 64, 2, 64, 1)
    yield segment
    segment.close()


def test_a_segment_that_cannot_be_mapped_now_keeps_what_it_holds(
    segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*arguments: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    inode = segment.path.stat().st_ino
    monkeypatch.setattr(mmap, "mmap", no_room)
    with pytest.raises(CheckpointError, match="cannot be mapped"):
        Segment.ensure(segment.path, "data", 0, 64, 2, 64, 1)
    assert segment.path.stat().st_ino == inode


def test_a_slot_that_is_freed_while_somebody_looks_at_it_stays_free(
    folder: NodeFolder, segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment.slots[0].write(SlotHeader(JOB, 1, 5, 0, 1, "data", "", 64, 64, State.COPIED))
    slots, wipe = NodeSlots(folder, print), Slot._wipe
    slots.refresh()
    slot = slots.shelves()[0].segment.slots[0]

    def looked_at(slot: Slot, sequence: int) -> None:
        slots.header(slot)
        wipe(slot, sequence)
        slots.header(slot)

    monkeypatch.setattr(Slot, "_wipe", looked_at)
    assert slot.free(slot.header())
    assert slots.header(slot) is None and slot.header() is None


@pytest.mark.parametrize(("wiped", "holds"), [(1, True), (2, False)])
def test_a_slot_whose_freeing_was_cut_off_holds_what_it_held_or_nothing(
    segment: Segment, monkeypatch: pytest.MonkeyPatch, wiped: int, holds: bool
) -> None:
    class Killed(BaseException):
        pass

    def cut_off(slot: Slot, sequence: int) -> None:
        wipe(slot, sequence)
        done.append(sequence)
        if len(done) == wiped:
            raise Killed

    slot, wipe, done = segment.slots[0], Slot._wipe, list[int]()
    held = SlotHeader(JOB, 1, 5, 0, 1, "data", "", 64, 64, State.COPIED)
    assert slot.write(held)
    with monkeypatch.context() as patch:
        patch.setattr(Slot, "_wipe", cut_off)
        with pytest.raises(Killed):
            slot.free()
    assert (slot.header() is not None) == holds
    assert slot.write(held) and slot.free() and slot.header() is None


def test_only_who_fills_a_segment_has_all_its_pages_mapped(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Map(mmap.mmap):
        def __new__(cls, fd: int, size: int, flags: int, protection: int) -> mmap.mmap:
            asked.append(flags)
            return super().__new__(cls, fd, size, flags, protection)

    monkeypatch.setattr(mmap, "mmap", Map)
    Segment.open(segment.path, writable=True).close()
    Segment.ensure(segment.path, "data", 0, 64, 2, 64, 1).close()
    assert asked == [mmap.MAP_SHARED, mmap.MAP_SHARED | mmap.MAP_POPULATE]


def test_the_memory_of_a_segment_that_goes_while_somebody_looks_at_it_is_let_go(folder: NodeFolder) -> None:
    fill(folder)
    slots = NodeSlots(folder, print)
    slots.refresh()
    looking = slots.held()
    next(looking)
    assert slots.discard(2)
    list(looking)
    del looking
    slots.refresh()
    mapped = Path("/proc/self/maps").read_text().splitlines()
    assert not [line for line in mapped if str(folder.path) in line]


def fill(folder: NodeFolder) -> None:
    segment = Segment.create(folder.segment_path("data", 0, 64, 2, 1), "data", 0, 64, 2, 64, 1)
    for step, slot in enumerate(segment.slots):
        assert slot.write(SlotHeader(JOB, 1, step, 0, 1, "data", "", 64, 64, State.ENCODED))
    segment.close()


def test_a_segment_that_could_not_be_mapped_is_looked_at_again(
    folder: NodeFolder, segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    slots = NodeSlots(folder, said.append)
    with monkeypatch.context() as short:
        short.setattr(Segment, "open", fails)
        slots.refresh()
        slots.refresh()
    assert slots.shelves() == [] and len(said) == 1
    slots.refresh()
    assert len(slots.shelves()) == 1
    slots.close()


def fails(*arguments: object, **options: object) -> Segment:
    raise CheckpointError("no address space")
