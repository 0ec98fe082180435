"""Folders on drives: what holds them, and what a misspelt one meant."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from windlass.launch.drives import file_system, missing_folder, nearest_folder, takes_direct


def test_the_file_system_is_that_of_the_innermost_mount_and_of_two_at_one_place_the_later(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    lines = [
        f"1 0 8:1 / {point} rw - {kind} /dev/sda rw"
        for point, kind in [
            ("/", "ext4"),
            (tmp_path, "xfs"),
            (f"{tmp_path}/a\\040b", "btrfs"),
            (f"{tmp_path}/a\\040b", "tmpfs"),
            (f"{tmp_path}/a", "nfs"),
        ]
    ]
    mounts = tmp_path / "mountinfo"
    mounts.write_text("\n".join(lines))
    assert file_system(tmp_path / "a b" / "c", mounts) == "tmpfs"
    assert file_system(tmp_path / "other", mounts) == "xfs"
    assert file_system(Path("/"), mounts) == "ext4"
    assert file_system(Path("/"), tmp_path / "none") == ""


def test_direct_transfers_are_refused_by_einval_and_unknown_by_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for code, answer in ((errno.EINVAL, False), (errno.EOPNOTSUPP, None)):

        def refuse(*_: Any, code: int = code, **__: Any) -> int:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refuse)
            assert takes_direct(tmp_path) is answer
    takes_direct(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_misspelt_folder_is_guessed_wherever_in_the_path_it_is_misspelt(tmp_path: Path) -> None:
    (tmp_path / "nvme0" / "state").mkdir(parents=True)
    assert nearest_folder(tmp_path / "nvm0" / "state") == tmp_path / "nvme0" / "state"
    assert nearest_folder(tmp_path / "nvm0" / "sate") == tmp_path / "nvme0" / "state"
    assert nearest_folder(tmp_path / "nvme0" / "sate") == tmp_path / "nvme0" / "state"
    assert nearest_folder(tmp_path / "quite" / "other") is None
    text = missing_folder(f"{tmp_path}/nvm0")
    assert text is not None and f"did you mean '{tmp_path}/nvme0'?" in text and "not mounted" in text
    (tmp_path / "file").write_text("")
    assert "a file" in str(missing_folder(str(tmp_path / "file")))
    assert missing_folder(str(tmp_path)) is None
