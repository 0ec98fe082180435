"""DeepSpeed's operators are refused at once where their build could not end well."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from windlass.dist import deepspeed_ops
from windlass.dist.deepspeed_ops import load_op, missing_for_op
from windlass.dist.errors import OffloadError


@pytest.fixture(autouse=True)
def build_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(deepspeed_ops, "_load", lambda name: pytest.fail("would have built"))
    (tmp_path / "cpu_adam").mkdir()
    return tmp_path / "cpu_adam"


def tools(monkeypatch: pytest.MonkeyPatch, *there: str) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name in there else None)


def test_a_missing_tool_is_named_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    tools(monkeypatch, "ninja")
    assert "no compiler c++" in str(missing_for_op("cpu_adam"))
    tools(monkeypatch, "c++")
    assert "no ninja" in str(missing_for_op("cpu_adam"))
    tools(monkeypatch, "c++", "ninja")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert "python3-dev" in str(missing_for_op("cpu_adam"))
    monkeypatch.setattr(deepspeed_ops, "find_spec", lambda _: None)
    assert "pip install deepspeed" in str(missing_for_op("cpu_adam"))
    with pytest.raises(
        OffloadError, match=r"offload.adam = 'deepspeed'.*pip install deepspeed, or use offload.adam=torch"
    ):
        load_op("cpu_adam", "offload.adam = 'deepspeed'", "offload.adam=torch")


def test_the_lock_of_a_killed_build_is_told_from_that_of_a_live_one(
    build_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools(monkeypatch, "c++", "ninja", "g++")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        monkeypatch.setattr(sysconfig, "get_path", lambda _: str(build_folder))
        (build_folder / "Python.h").write_text("")
    lock = build_folder / "lock"
    assert missing_for_op("cpu_adam") is None
    with lock.open("w"):
        assert missing_for_op("cpu_adam") is None
    assert f"left {lock}" in str(missing_for_op("cpu_adam"))


def test_a_failed_build_gives_its_first_line(build_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise RuntimeError(f"Unable to JIT load the {name} op.\nlong output")

    monkeypatch.setattr(deepspeed_ops, "missing_for_op", lambda name: None)
    monkeypatch.setattr(deepspeed_ops, "_load", fail)
    with pytest.raises(OffloadError) as caught:
        load_op("cpu_adam", "offload.adam = 'deepspeed'", "offload.adam=torch")
    assert "Unable to JIT load the cpu_adam op." in str(caught.value) and "long output" not in str(caught.value)


def test_deepspeed_is_not_imported_by_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    before = "deepspeed" in sys.modules
    missing_for_op("cpu_adam")
    assert ("deepspeed" in sys.modules) == before
