"""The state file moves bytes: what was written is read, what is not whole is refused, errors say where and why."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.state_files import Drive, pages, read
from windlass.dist.errors import OffloadError
from windlass.offload.engines import PAGE, ThreadEngine, build_engine, page_buffer
from windlass.offload.extents import Extent
from windlass.offload.ranges import Piece, Ranges


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Drive]:
    with Drive(tmp_path) as drive:
        yield drive


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_slots_and_keys_keep_their_own_bytes(drive: Drive) -> None:
    file = drive.create()
    assert file.num_bytes == 2 * 3 * PAGE + 2 * PAGE == file.path.stat().st_size
    for n, (key, slot, count) in enumerate([("a", 0, 3), ("a", 1, 3), ("b", 0, 2)]):
        file.write(key, slot, 0, pages(count, n))
    file.write("a", 1, PAGE, pages(1, 9))
    assert torch.equal(read(file, "a", 0, 3), pages(3, 0))
    expected = torch.cat([pages(3, 1)[:PAGE], pages(1, 9), pages(3, 1)[2 * PAGE :]])
    assert torch.equal(read(file, "a", 1, 3), expected)
    assert torch.equal(read(file, "b", 0, 1, PAGE), pages(2, 2)[PAGE:])
    assert (file.written_bytes, file.read_bytes) == (9 * PAGE, 7 * PAGE)


@pytest.mark.parametrize("checksums", [False, True])
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 1), st.integers(0, 9), st.integers(1, 9)), max_size=12))
def test_any_order_of_reads_and_writes_gives_what_was_written_last(
    tmp_path_factory: pytest.TempPathFactory, checksums: bool, trace: list[tuple[bool, int, int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("drive")
    file = Drive(folder).create([Extent("k", 10 * PAGE, 2)], checksums=checksums)
    model: dict[tuple[int, int], torch.Tensor] = {}
    for n, (writes, slot, start, count) in enumerate(trace):
        count = min(count, 10 - start)
        if writes:
            file.write("k", slot, start * PAGE, data := pages(count, n))
            model |= {(slot, start + i): data[i * PAGE : (i + 1) * PAGE] for i in range(count)}
        elif all((slot, start + i) in model for i in range(count)):
            expected = torch.cat([model[slot, start + i] for i in range(count)])
            assert torch.equal(read(file, "k", slot, count, start * PAGE), expected)
        else:
            with pytest.raises(OffloadError, match="never written"):
                read(file, "k", slot, count, start * PAGE)
    file.close(remove=True)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20), st.integers(1, 8), st.booleans()), max_size=20))
def test_ranges_know_exactly_what_was_put_and_not_removed(trace: list[tuple[bool, int, int, bool]]) -> None:
    ranges, model = Ranges(), set[int]()
    for puts, start, count, hashed in trace:
        span = range(start, start + count)
        if puts:
            ranges.put(Piece(start, start + count, f"{start}" if hashed else ""))
            model |= set(span)
        else:
            ranges.remove(start, start + count)
            model -= set(span)
        assert [n for piece in ranges.pieces for n in range(piece.start, piece.end)] == sorted(model)
        lacking = sorted(set(range(5, 25)) - model)
        gap = ranges.missing(5, 25)
        assert (gap is None) == (not lacking) and (gap is None or gap[0] == lacking[0])
        assert Ranges.from_lists(ranges.as_lists()).pieces == ranges.pieces


def test_an_engine_that_is_not_known_is_named() -> None:
    with pytest.raises(OffloadError, match=r"offload.engine = 'tape': must be one of threads, deepspeed, gds"):
        build_engine("tape")
    assert isinstance(build_engine("threads"), ThreadEngine)


@pytest.mark.parametrize(
    ("key", "slot", "offset", "data", "words"),
    [
        ("c", 0, 0, page_buffer(PAGE), "'c' slot 0 in .*: there are 0 slots"),
        ("b", 1, 0, page_buffer(PAGE), "'b' slot 1 in .*: there are 1 slots"),
        ("a", 0, 512, page_buffer(PAGE), "'a' slot 0 .* offset 512 is no multiple of 4096"),
        ("a", 0, 0, page_buffer(PAGE)[:100], "length 100 is no multiple"),
        ("a", 0, 0, page_buffer(2 * PAGE)[64 : 64 + PAGE], "address of the buffer .* is no multiple"),
        ("a", 0, 0, page_buffer(4 * PAGE).view(torch.float32), "the buffer is torch.float32"),
        ("a", 0, 2 * PAGE, page_buffer(2 * PAGE), "bytes 8192..16384 in .*: the extent ends at byte 12288"),
    ],
)
def test_what_cannot_be_transferred_is_refused_before_it_begins(
    drive: Drive, key: str, slot: int, offset: int, data: torch.Tensor, words: str
) -> None:
    file = drive.create()
    for call in (file.read, file.write):
        with pytest.raises(OffloadError, match=words):
            call(key, slot, offset, data)


def test_bytes_that_were_never_written_are_not_read(drive: Drive) -> None:
    file = drive.create()
    file.write("a", 0, 0, pages(1))
    with pytest.raises(OffloadError, match=r"read of 'a' slot 0 bytes 0..12288 in .*: bytes 4096..12288 were never"):
        read(file, "a", 0, 3)


# -- short transfers and errors ----------------------------------------------------------------------------------------


def test_short_transfers_are_continued_and_interruptions_repeated(
    drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, really = drive.create(), {"preadv": os.preadv, "pwritev": os.pwritev}
    for name, call in really.items():
        turns = iter(
            [InterruptedError(), BlockingIOError(errno.EAGAIN, "again"), PAGE + 100, 700, 2 * PAGE] + [PAGE] * 9
        )

        def short(fd: int, buffers: list[memoryview], offset: int, turns: Any = turns, call: Any = call) -> int:
            turn = next(turns)
            if isinstance(turn, OSError):
                raise turn
            return (
                call(fd, [buffers[0][:turn]], offset) if turn % PAGE == 0 else _partly(call, fd, buffers, offset, turn)
            )

        monkeypatch.setattr(os, name, short)
    file.write("a", 0, 0, pages(3))
    assert torch.equal(read(file, "a", 0, 3), pages(3))


def _partly(call: Any, fd: int, buffers: list[memoryview], offset: int, turn: int) -> int:
    """Transfer what a drive can, whole pages, and report an odd count."""
    if turn > PAGE:
        call(fd, [buffers[0][: turn - turn % PAGE]], offset)
    return turn


@pytest.mark.parametrize(("verb", "code"), [("read", errno.ENODATA), ("write", errno.EIO)])
def test_no_progress_ends_in_an_error_that_says_how_far_it_came(
    drive: Drive, monkeypatch: pytest.MonkeyPatch, verb: str, code: int
) -> None:
    file = drive.create()
    file.write("a", 0, 0, pages(3))
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    monkeypatch.setattr(os, "pwritev", lambda *_: 100)
    with pytest.raises(
        OffloadError, match=rf"{verb} of 'a' slot 0 bytes 0..12288 at byte 0 of .*: the .* after 1?0?0 of 12288 bytes"
    ) as e:
        getattr(file, verb)("a", 0, 0, page_buffer(3 * PAGE))
    assert isinstance(e.value.__cause__, OSError) and e.value.__cause__.errno == code


@pytest.mark.parametrize(
    ("action", "words"),
    [("enospc", "No space left.*the drive is full: free space"), ("eio", "Input/output error.*the drive failed")],
)
def test_injected_errors_name_key_and_file_and_leave_the_bytes_unreadable(
    drive: Drive, monkeypatch: pytest.MonkeyPatch, action: str, words: str
) -> None:
    file = drive.create()
    file.write("a", 1, 0, pages(3))
    monkeypatch.setenv("WINDLASS_FAULT", f"{action}:nvme.write:step=2")
    with pytest.raises(
        OffloadError, match=f"rank 0: write of 'a' slot 1 bytes 4096..8192 at byte .* of .*state.bin failed: {words}"
    ):
        file.write("a", 1, PAGE, pages(1))
    with pytest.raises(OffloadError, match=r"bytes 4096..8192 were never written, or their write failed"):
        read(file, "a", 1, 3)
    assert torch.equal(read(file, "a", 1, 1, 2 * PAGE), pages(3)[2 * PAGE :])
    file.write("a", 1, PAGE, pages(1))
    assert torch.equal(read(file, "a", 1, 1, PAGE), pages(1))


def test_a_refusal_of_direct_access_is_said_once_and_the_page_cache_is_used(
    drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setenv("WINDLASS_FAULT", "einval:nvme.open")
    file = drive.create(warn=said.append)
    assert not file.direct and len(said) == 1 and "direct access is refused (Invalid argument" in said[0]
    file.write("a", 0, 0, pages(3))
    file.sync()
    assert torch.equal(read(file, "a", 0, 3), pages(3))


def test_a_full_device_is_reported(drive: Drive) -> None:
    class Full(ThreadEngine):
        def open(self, path: Path, num_bytes: int, *, direct: bool = True) -> None:
            super().open(Path("/dev/full"), 0, direct=False)

    file = drive.create(engine=Full())
    with pytest.raises(OffloadError, match=r"write of 'a' slot 0 .*No space left on device after 0 of 12288 bytes"):
        file.write("a", 0, 0, pages(3))


def test_a_file_that_was_cut_short_is_reported(drive: Drive) -> None:
    file = drive.create()
    file.write("b", 0, 0, pages(2))
    os.truncate(file.path, file.num_bytes - PAGE - 100)
    with pytest.raises(OffloadError, match=r"read of 'b' slot 0 .*: the file ends after 3996 of 8192 bytes.*cut short"):
        read(file, "b", 0, 2)
    os.truncate(file.path, file.num_bytes - PAGE)
    with pytest.raises(OffloadError, match="the file ends after 4096 of 8192 bytes"):
        read(file, "b", 0, 2)


def test_a_flipped_byte_is_found_wherever_it_is_read_from(drive: Drive) -> None:
    file = drive.create(checksums=True)
    file.write("a", 1, 0, pages(3))
    with open(file.path, "r+b") as raw:
        raw.seek(4 * PAGE + 10)
        byte = raw.read(1)
        raw.seek(-1, os.SEEK_CUR)
        raw.write(bytes([byte[0] ^ 1]))
        os.fsync(raw.fileno())
    for offset in (0, PAGE, 2 * PAGE):
        with pytest.raises(OffloadError, match=r"'a' slot 1 .* bytes 0..12288 are damaged .*Resume from a checkpoint"):
            read(file, "a", 1, 1, offset)
    with pytest.raises(OffloadError, match="damaged"):
        file.write("a", 1, 0, pages(1))  # what is left of the old piece would be hashed anew
    file.write("a", 1, 0, pages(3, 5))
    assert torch.equal(read(file, "a", 1, 3), pages(3, 5))
