"""The quick start's care with folders, and that every benchmark explains itself. `make quickstart` tells the story."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from windlass.dist.errors import ConfigError, NumericsError
from windlass.launch.quickstart import MARKER, Quickstart, claim

BENCHMARKS = sorted((Path(__file__).resolve().parents[2] / "benchmarks").glob("*.py"))


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="not from an earlier quick start"):
        claim(tmp_path)
    assert (tmp_path / "run" / "thesis.txt").read_text() == "precious"


def test_an_earlier_quick_start_is_cleared_but_keeps_its_tokens(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    claim(folder)
    for name in ("run", "hf", "tokens"):
        (folder / name).mkdir()
    claim(folder)
    assert sorted(p.name for p in folder.iterdir()) == [MARKER, "tokens"]


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="this is a file"):
        claim(tmp_path / "file")


@pytest.mark.parametrize(("last", "learned"), [(2.0, True), (2.1, False)])
def test_a_loss_that_fell_by_less_than_a_third_fails(tmp_path: Path, last: float, learned: bool) -> None:
    story = Quickstart(tmp_path)
    story.run_folder.mkdir()
    events = [
        {"event": "start", "step": 0},
        {"event": "eval", "step": 0, "bits_per_byte": 3.1},
        {"event": "resume", "step": 5},
        {"event": "start", "step": 5},
        {"event": "eval", "step": 10, "bits_per_byte": last},
    ]
    (story.run_folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, events)))
    if learned:
        assert story._losses() == (3.1, 2.0)
    else:
        with pytest.raises(NumericsError, match="less than the third"):
            story._losses()


@pytest.mark.parametrize("script", [p for p in BENCHMARKS if "\ndef main" in p.read_text()], ids=lambda p: p.stem)
def test_every_benchmark_explains_itself(script: Path) -> None:
    if script.stem.endswith("_sides"):  # one rank of a benchmark, not a command
        assert "Not meant to be started by hand" in " ".join(script.read_text().split())
        return
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and f"python benchmarks/{script.name}" in done.stdout
