"""Every file engine keeps the same promises: all bytes moved or an error that says how many, pages only, no surprises.

DeepSpeed's member takes part where its operator has been built before, as building takes minutes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.state_files import Drive, pages, read
from windlass.dist import env
from windlass.dist.errors import OffloadError
from windlass.offload import deepnvme, engines, gds
from windlass.offload.engines import BLOCK_BYTES, PAGE, FileEngine, ThreadEngine, page_buffer
from windlass.offload.gds import GdsEngine

SIZE = BLOCK_BYTES + 3 * PAGE


class FakeCuFile:
    """libcufile as far as it is called, on a file and host memory. `limit`: most bytes that it moves at a time."""

    def __init__(self, limit: int = 1 << 30, status: int = 0, result: int | None = None) -> None:
        self.limit, self.status, self.result, self.fd = limit, status, result, -1

    def cuFileDriverOpen(self) -> Any:
        return SimpleNamespace(err=self.status, cu_err=0)

    def cuFileHandleRegister(self, handle: Any, descriptor: Any) -> Any:
        self.fd = descriptor._obj.fd
        handle._obj.value = 7
        return SimpleNamespace(err=0, cu_err=0)

    def cuFileHandleDeregister(self, handle: Any) -> None:
        assert handle.value == 7

    def cuFileRead(self, handle: Any, base: Any, size: Any, offset: int, at: int) -> int:
        return self._move(os.preadv, base, size, offset, at)

    def cuFileWrite(self, handle: Any, base: Any, size: Any, offset: int, at: int) -> int:
        return self._move(os.pwritev, base, size, offset, at)

    def _move(self, call: Any, base: Any, size: Any, offset: int, at: int) -> int:
        if self.result is not None:
            return self.result
        memory = (ctypes.c_char * min(size.value, self.limit)).from_address(base.value + at)
        return call(self.fd, [memory], offset)


def gds_engine(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> GdsEngine:
    monkeypatch.setattr(gds, "on_host", lambda tensor: False)
    return GdsEngine(FakeCuFile(**settings))


def deepspeed_engine(monkeypatch: pytest.MonkeyPatch) -> FileEngine:
    """Return the engine on the operator that an earlier build has left: loading it the usual way may build it again."""
    folder = Path(env.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    built = {path.stem: path for path in folder.rglob("*.so") if path.stem in ("pin_memory", "async_io")}
    if len(built) < 2:
        pytest.skip("DeepSpeed's async_io has not been built on this machine")
    flags = sys.getdlopenflags()
    sys.setdlopenflags(flags | os.RTLD_GLOBAL)  # the second finds symbols of the first
    try:
        modules = [_extension(name, built[name]) for name in ("pin_memory", "async_io")]
    finally:
        sys.setdlopenflags(flags)
    monkeypatch.setattr(deepnvme, "_load", lambda: modules[1])
    return engines.build_engine("deepspeed")


@lru_cache
def _extension(name: str, path: Path) -> Any:
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["threads", "gds", "deepspeed"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FileEngine:
    match request.param:
        case "threads":
            return ThreadEngine()
        case "gds":
            return gds_engine(monkeypatch, limit=3 * PAGE // 2 * PAGE)
    return deepspeed_engine(monkeypatch)


@pytest.fixture
def opened(engine: FileEngine, tmp_path: Path) -> Iterator[FileEngine]:
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, 2 * SIZE)
    engine.open(path, 2 * SIZE)
    yield engine
    engine.close()


def test_an_engine_moves_exactly_the_bytes_it_is_asked_for(opened: FileEngine, tmp_path: Path) -> None:
    data = pages(SIZE // PAGE, 3)
    opened.write(PAGE, data)
    opened.sync()
    opened.read(PAGE, out := page_buffer(SIZE))
    assert torch.equal(out, data)
    content = (tmp_path / "file").read_bytes()
    assert len(content) == 2 * SIZE and content[PAGE : PAGE + SIZE] == data.numpy().tobytes()
    assert not any(content[:PAGE]) and not any(content[PAGE + SIZE :])
    assert opened.direct


def test_an_engine_serves_several_threads(opened: FileEngine) -> None:
    parts = [pages(2, seed) for seed in range(8)]
    outs = [page_buffer(2 * PAGE) for _ in parts]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: opened.write(2 * i * PAGE, parts[i]), range(8)))
        list(pool.map(lambda i: opened.read(2 * i * PAGE, outs[i]), range(8)))
    assert all(torch.equal(out, part) for out, part in zip(outs, parts, strict=True))


def test_an_engine_reports_the_end_of_the_file(opened: FileEngine) -> None:
    with pytest.raises(OSError, match=f"the file ends after {PAGE} of {2 * PAGE} bytes") as caught:
        opened.read(2 * SIZE - PAGE, page_buffer(2 * PAGE))
    assert caught.value.errno == errno.ENODATA


def test_an_engine_refuses_what_is_not_whole_pages(opened: FileEngine) -> None:
    for offset, data in ((1, page_buffer(PAGE)), (0, page_buffer(PAGE)[:512]), (0, page_buffer(PAGE)[:0])):
        for call in (opened.read, opened.write):
            with pytest.raises(OffloadError, match="is no multiple of 4096 bytes"):
                call(offset, data)


def test_a_cancelled_engine_moves_nothing_more_and_can_be_closed_twice(opened: FileEngine) -> None:
    opened.cancel()
    with pytest.raises(OSError, match="closed after 0 of 4096 bytes") as caught:
        opened.write(0, page_buffer(PAGE))
    assert caught.value.errno == errno.ECANCELED
    opened.close()


def test_an_engine_does_not_create_its_file(engine: FileEngine, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        engine.open(tmp_path / "file", PAGE)
    assert not (tmp_path / "file").exists()
    engine.close()


def test_what_an_engine_loses_in_silence_is_found_by_checksums_that_it_cannot_be_used_without(tmp_path: Path) -> None:
    class Forgetful(ThreadEngine):
        reports_errors = False

        def write(self, offset: int, data: torch.Tensor) -> None:
            super().write(offset, data[:PAGE])

    with Drive(tmp_path) as drive:
        file = drive.create(engine=Forgetful(), checksums=False)
        file.write("a", 0, 0, pages(3))
        with pytest.raises(OffloadError, match=r"'a' slot 0 .* are damaged"):
            read(file, "a", 0, 3)


# -- members that are not there ----------------------------------------------------------------------------------------


def test_deepspeeds_engine_says_what_it_lacks_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepnvme.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(deepnvme.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(deepnvme.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    with pytest.raises(OffloadError, match=r"needs libaio and its header. apt-get install libaio-dev, or use"):
        engines.build_engine("deepspeed")
    asked = []
    monkeypatch.setattr(deepnvme.shutil, "which", lambda name: None)
    monkeypatch.setattr(deepnvme, "load_op", lambda *given: asked.append(given))
    with pytest.raises(AttributeError):
        engines.build_engine("deepspeed")
    assert asked == [("async_io", "offload.engine=deepspeed", "offload.engine=threads")]


def test_gds_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gds.torch.version, "cuda", None)
    with pytest.raises(OffloadError, match="needs a torch with CUDA"):
        engines.build_engine("gds")
    monkeypatch.setattr(gds.torch.version, "cuda", "13.0")
    monkeypatch.setattr(gds, "_LIBRARY", "libnowhere.so.0")
    with pytest.raises(OffloadError, match=r"needs cuFile \(libnowhere.so.0: cannot open"):
        engines.build_engine("gds")
    with pytest.raises(OffloadError, match=r"cuFileDriverOpen failed \(cuFile error 5001"):
        GdsEngine(FakeCuFile(status=5001))
    with pytest.raises(OffloadError, match="needs direct access"):
        GdsEngine(FakeCuFile()).open(tmp_path / "file", 0, direct=False)


@pytest.mark.parametrize(
    ("result", "words"), [(-5030, "cuFile error 5030 after 0 of 4096"), (-1, "Input/output error")]
)
def test_an_error_of_cufile_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, result: int, words: str
) -> None:
    engine = gds_engine(monkeypatch, result=result)
    (tmp_path / "file").write_bytes(bytes(PAGE))
    engine.open(tmp_path / "file", PAGE)
    with pytest.raises(OSError, match=words):
        engine.read(0, page_buffer(PAGE))
    engine.close()


def test_buffers_on_a_device_are_refused_by_engines_for_host_memory(tmp_path: Path) -> None:
    with Drive(tmp_path) as drive, pytest.raises(OffloadError, match="a buffer on meta was given"):
        drive.create().write("a", 0, 0, torch.empty(PAGE, dtype=torch.uint8, device="meta"))
