"""A folder and a URL behave alike towards those who save and read; what goes wrong is an OSError with the name."""

import errno
import os
import stat
import threading

import pytest

from tests.persist_doubles import PLACES, place_for_checkpoints
from windlass.checkpoint import storage as storage_module
from windlass.checkpoint.storage import (
    LocalStorage,
    Storage,
    check_url,
    exists,
    file_hash,
    files_of,
    opened,
    read_file,
    storage_of,
    write_new,
)
from windlass.checkpoint.url_storage import FsspecStorage
from windlass.dist.errors import ConfigError


@pytest.fixture(params=PLACES)
def storage(request, tmp_path, monkeypatch):
    found = storage_of(place_for_checkpoints(request.param, tmp_path, monkeypatch))
    found.make_folder()
    return found


def test_what_is_written_in_parts_is_read_at_offsets(storage):
    file = storage.start("a")
    file.write(b"0123", bytearray(b"45"), memoryview(b"67"))
    file.write(b"")
    file.write(b"89")
    file.finish()
    assert storage.size("a") == 10 and read_file(storage, "a") == b"0123456789"
    buffer = memoryview(bytearray(4))
    with opened(storage, "a") as file:
        assert file.read_into(buffer, 3) == 4 and bytes(buffer) == b"3456"
        assert file.read_into(buffer, 8) == 2 and bytes(buffer[:2]) == b"89"
        assert file.read_into(buffer, 10) == 0
        assert file.read_into(buffer[:0], 0) == 0


def test_threads_may_read_one_file_at_once(storage):
    write_new(storage, "a", bytes(range(256)) * 16)
    wrong = []

    with opened(storage, "a") as file:

        def read(first):
            buffer = memoryview(bytearray(64))
            for offset in range(first, 4000, 8):
                count = file.read_into(buffer, offset)
                if bytes(buffer[:count]) != (bytes(range(256)) * 16)[offset : offset + 64]:
                    wrong.append(offset)

        threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_file_is_created_only_where_there_is_none(storage):
    storage.create("mark", b"first")
    with pytest.raises(FileExistsError) as found:
        storage.create("mark", b"second")
    assert "mark" in str(found.value) and read_file(storage, "mark") == b"first"
    assert storage.names() == ["mark"]


def test_of_many_creators_in_a_folder_at_once_one_wins(tmp_path):
    storage = LocalStorage(tmp_path)
    won, start = [], threading.Barrier(8)

    def create(number):
        start.wait(60)
        try:
            storage.create("mark", b"%d" % number)
            won.append(number)
        except FileExistsError:
            pass_on.append(number)

    pass_on: list[int] = []
    threads = [threading.Thread(target=create, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(pass_on) == 7 and read_file(storage, "mark") == b"%d" % won[0]
    assert storage.names() == ["mark"]


def test_folders_are_listed_and_removed_with_all_in_them(storage):
    assert storage.names("nowhere") == [] and storage.sizes("nowhere") == {}
    storage.make_folder("b")
    for name in ("b/2", "b/1", "a"):
        write_new(storage, name, name.encode())
    assert storage.names() == ["a", "b"] and storage.names("b") == ["1", "2"]
    assert storage.sizes() == {"a": 1} and storage.sizes("b") == {"1": 3, "2": 3}
    inner = storage.inside("b")
    assert inner.names() == ["1", "2"] and read_file(inner, "1") == b"b/1"
    assert storage_of(inner.address).names() == ["1", "2"] and inner.place.endswith("/b")
    storage.remove("b")
    storage.remove("b")
    storage.remove("a")
    assert storage.names() == [] and not exists(storage, "b/1")


def test_what_is_not_there_is_named(storage):
    for act in (
        storage.open,
        storage.size,
        lambda name: read_file(storage, name),
        lambda name: file_hash(storage, name),
    ):
        with pytest.raises(FileNotFoundError) as found:
            act("missing")
        assert "missing" in str(found.value) and found.value.strerror
    assert not exists(storage, "missing")


def test_hashes_are_those_of_the_whole_file(storage, monkeypatch):
    import xxhash

    data = os.urandom(1000)
    write_new(storage, "a", data)
    monkeypatch.setattr(storage_module, "READ_BYTES", 64)
    assert file_hash(storage, "a") == xxhash.xxh3_64_hexdigest(data)


def test_a_file_given_up_is_no_obstacle(storage):
    file = storage.start("a")
    file.write(b"half")
    file.abandon()
    storage.remove("a")
    write_new(storage, "a", b"whole")
    assert read_file(storage, "a") == b"whole"


def test_both_are_storages_and_a_url_never_renames(storage):
    assert isinstance(storage, Storage) and files_of(storage) is storage and storage_of(storage) is storage
    if storage.renames:
        return
    write_new(storage, "a", b"x")
    with pytest.raises(OSError, match="nothing is renamed") as found:
        storage.rename("a", "b")
    assert found.value.errno == errno.ENOTSUP and storage.free_bytes() is None


def test_a_place_is_a_path_or_a_url(tmp_path):
    assert isinstance(storage_of(tmp_path), LocalStorage) and isinstance(storage_of(str(tmp_path)), LocalStorage)
    assert storage_of(f"file://{tmp_path}").address == tmp_path
    assert isinstance(storage_of("memory://x"), FsspecStorage) and storage_of("memory://x/y/").address == "memory://x/y"


def test_a_folder_is_not_renamed_over_another_that_holds_something(tmp_path):
    storage = LocalStorage(tmp_path)
    for name in ("a", "b"):
        storage.make_folder(name)
        write_new(storage, f"{name}/file", name.encode())
    with pytest.raises(OSError, match="not empty"):
        storage.rename("a", "b")
    assert read_file(storage, "a/file") == b"a" and read_file(storage, "b/file") == b"b"


def test_many_small_parts_and_short_writes_arrive_in_order(tmp_path, monkeypatch):
    real = os.writev
    monkeypatch.setattr(os, "writev", lambda file, parts: real(file, [b"".join(parts)[:1000]]))
    monkeypatch.setattr(storage_module, "START_BYTES", 500)
    storage = LocalStorage(tmp_path)
    parts = [bytes([i % 251]) * (i % 7) for i in range(3000)]
    file = storage.start("a")
    file.write(*parts)
    file.finish()
    assert read_file(storage, "a") == b"".join(parts)


def test_a_file_keeps_what_it_was_if_it_cannot_be_made_anew(tmp_path):
    storage = LocalStorage(tmp_path)
    write_new(storage, "a", b"old")
    with pytest.raises(FileExistsError, match="a"):
        write_new(storage, "a", b"new")
    assert read_file(storage, "a") == b"old"


def test_errors_of_other_libraries_become_errors_of_the_file(monkeypatch):
    storage = storage_of("memory://broken")

    class Refused(Exception):
        pass

    def refuse(*args, **options):
        raise Refused("403 Forbidden")

    for name in ("ls", "info", "open", "pipe_file", "rm", "cat_file"):
        monkeypatch.setattr(type(storage._system), name, refuse)
    actions = (storage.names, lambda: storage.size("a"), lambda: storage.start("a"), lambda: storage.create("a", b""))
    for act in (*actions, lambda: storage.remove("a")):
        with pytest.raises(OSError, match="Refused: 403 Forbidden") as found:
            act()
        assert "memory://broken" in str(found.value.filename)


def test_a_url_is_tried_before_training(tmp_path, storage, monkeypatch):
    check_url(str(storage.address))
    assert storage.names() == []
    (tmp_path / "blocked").write_text("")
    with pytest.raises(ConfigError, match=r"checkpoint\.url = .*cannot be written"):
        check_url(f"file://{tmp_path}/blocked/run")
    with pytest.raises(ConfigError, match="nosuch"):
        check_url("nosuch://bucket/run")
    monkeypatch.setattr(storage_module, "read_file", lambda *a: b"other")
    with pytest.raises(ConfigError, match="is not what is read back"):
        check_url(str(storage.address))
    assert storage.names() == []


def test_only_listing_and_reading_costs_no_torch_and_no_fsspec():
    import subprocess
    import sys

    code = "import sys, windlass.checkpoint.store, windlass.checkpoint.persist, windlass.checkpoint.retention\n"
    code += "heavy = [name for name in ('torch', 'fsspec', 'ray') if name in sys.modules]; assert not heavy, heavy"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_files_of_the_user_alone_stay_so(tmp_path):
    before = os.umask(0o077)
    try:
        write_new(LocalStorage(tmp_path), "a", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
