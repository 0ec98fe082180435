"""The doctor finds what is there, what is missing and how to get it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from windlass.launch import cli, doctor
from windlass.launch.doctor import MISSING, OK, WARNING, Check, examine


def found(checks: list[Check], name: str) -> Check:
    return next(c for c in checks if c.name == name)


def test_this_machine_is_examined_quickly(tmp_path: Path) -> None:
    examine(str(tmp_path))  # imports
    began, computed = time.perf_counter(), time.process_time()
    checks = examine(str(tmp_path / "runs" / "new"))
    assert time.process_time() - computed < 3
    assert time.perf_counter() - began < 60, "it waits for nothing, but others may be busy here"
    assert {c.topic for c in checks} == {"versions", "devices", "memory", "limits", "disk", "network", "optional"}
    assert found(checks, "torch").status == OK
    assert found(checks, "run folder").status == OK
    assert found(checks, "ports").status == OK
    assert all(c.remedy for c in checks if c.status != OK)


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda p: None if p in ("pyarrow", "ray") else real(p))
    checks = examine()
    assert (found(checks, "pyarrow").status, found(checks, "pyarrow").remedy) == (MISSING, "pip install pyarrow")
    assert (found(checks, "ray").status, found(checks, "ray").remedy) == (WARNING, "pip install ray")


def test_an_old_package_is_named_with_the_version_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda p: "2.1.0+cpu" if p == "torch" else real(p))
    assert found(examine(), "torch") == Check("versions", "torch", MISSING, "2.1.0+cpu", "pip install 'torch>=2.11'")


def test_a_run_folder_that_is_a_file_is_missing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert found(examine(str(tmp_path / "file" / "run")), "run folder").status == MISSING


def test_folders_on_nvme_are_looked_at(tmp_path: Path) -> None:
    check = found(examine(str(tmp_path), nvme_paths=[str(tmp_path)]), "NVMe")
    assert check.status in (OK, WARNING) and "GiB free" in check.found
    missing = found(examine(str(tmp_path), nvme_paths=[f"{tmp_path}/nowhere"]), "NVMe")
    assert missing.status == MISSING and "no such folder" in missing.found and "mount the drive" in missing.remedy


@pytest.mark.parametrize(
    ("kind", "direct", "status", "words"),
    [("xfs", True, OK, ""), ("tmpfs", True, WARNING, "host memory"), ("nfs", False, WARNING, "page cache")],
)
def test_what_would_be_no_drive_is_a_warning(
    kind: str, direct: bool, status: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "file_system", lambda _: kind)
    monkeypatch.setattr(doctor, "takes_direct", lambda _: direct)
    check = found(examine(nvme_paths=[str(tmp_path)]), "NVMe")
    assert check.status == status and words in check.remedy and kind in check.found


def test_an_interface_that_is_not_up_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    check = found(examine(), "interface")
    assert check.status == MISSING and "nowhere0" in check.found


@pytest.mark.parametrize(("missing", "code", "word"), [((), 0, "Ready"), (("pyarrow",), 1, "Not ready: pyarrow")])
def test_the_command_says_whether_the_machine_is_ready(
    missing: tuple[str, ...],
    code: int,
    word: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda p: None if p in missing else real(p))
    with pytest.raises(SystemExit) as left:
        cli.main(["doctor", "quickstart", "train.run_dir=runs/x"])
    assert (left.value.code or 0) == code
    assert word in capsys.readouterr().out
