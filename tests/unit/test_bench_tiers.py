"""`windlass bench tiers`: figures of this machine that no cache and no unwritten extent can improve."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from windlass.dist.device import Device
from windlass.dist.errors import OffloadError
from windlass.launch import calibrate as measuring
from windlass.launch import cli
from windlass.launch.calibrate import Calibration, Figure, calibrate
from windlass.launch.config import load_dataclass
from windlass.launch.file_probe import FileProbe
from windlass.offload.engines import BLOCK_BYTES, ThreadEngine

MIB = 1 << 20


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small buffers and a moment per sample, so that the whole takes tenths of a second."""
    monkeypatch.setattr(measuring, "_working_bytes", lambda: 8 * MIB)
    monkeypatch.setattr(measuring, "PIECE_BYTES", MIB)
    monkeypatch.setattr(measuring, "CHUNK", 1 << 14)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        cli.main(["bench", "tiers", "--device", "cpu", "--seconds", "0.2", "--size", "16MiB", *arguments])
    out = capsys.readouterr()
    return int(left.value.code or 0), out.out, out.err


def test_the_rate_of_a_figure_is_that_of_all_its_steps_together_with_what_completes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def takes(seconds: float) -> None:
        clock[0] += seconds

    def step(_: int) -> float:
        takes(0.5)
        return 1.0

    assert Figure("one", "x/s", [step]).sample(2.0) == 2.0, "four steps in two seconds"
    once: list[Any] = [lambda _: 3.0, lambda _: 5.0]
    assert Figure("two", "x/s", once, finish=lambda: takes(4.0)).sample(0.0) == 2.0, "eight units, completed in four"


def test_a_machine_is_measured_without_a_trace_on_its_drives(tmp_path: Path, small: None) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    seen: list[float] = []
    found = calibrate(
        Device("cpu"),
        [tmp_path / "a", tmp_path / "b"],
        file_bytes=16 * MIB,
        seconds=0.3,
        progress=lambda share, _: seen.append(share),
    )
    assert not list(tmp_path.rglob("*windlass*")) and seen == sorted(seen) and seen[-1] == 1
    assert all(len(f.samples) == measuring.ROUNDS and f.rate > 0 for f in found.figures)
    facts = found.cluster
    assert facts["nvme_paths"] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert sum(facts["nvme_weights"]) == pytest.approx(1, abs=0.01)
    assert facts["cpu_adam"] == "torch" and facts["device_update_per_s"] == facts["cpu_update_per_s"]
    rates = [key for key in facts if key.endswith("_per_s")]
    assert set(rates) == {
        "host_memory_bytes_per_s",
        *("h2d_bytes_per_s", "d2h_bytes_per_s", "duplex_bytes_per_s"),
        *("nvme_read_bytes_per_s", "nvme_write_bytes_per_s", "nvme_mixed_bytes_per_s"),
        *("cpu_update_per_s", "device_update_per_s", "cpu_cast_per_s"),
    }
    assert any("on one file system" in note for note in found.notes)
    assert any("No accelerator" in note for note in found.notes)


def test_every_block_is_written_before_the_first_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    for name in ("read", "write"):
        real = getattr(ThreadEngine, name)

        def recorded(self: Any, offset: int, data: Any, name: str = name, real: Any = real) -> None:
            calls.append((name, offset // BLOCK_BYTES))
            real(self, offset, data)

        monkeypatch.setattr(ThreadEngine, name, recorded)
    with FileProbe(tmp_path, 4 * BLOCK_BYTES) as probe:
        assert calls == [("write", n) for n in range(4)] + [("read", n) for n in range(4)]
        calls.clear()
        for index in range(4):
            assert probe.read(index) == probe.write(index) == BLOCK_BYTES
    # What is written while it is read lies in the other half.
    assert {n for name, n in calls if name == "read"} == {0, 1} and {n for name, n in calls if name == "write"} == {
        2,
        3,
    }
    assert not list(tmp_path.iterdir())


def test_a_drive_that_forgets_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ThreadEngine.write
    monkeypatch.setattr(ThreadEngine, "write", lambda self, at, data: None if at else real(self, at, data))
    with (
        pytest.raises(OffloadError, match="block 1 of a file just written reads back as other bytes"),
        FileProbe(tmp_path, 2 * BLOCK_BYTES),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_without_direct_transfers_the_figures_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)
    with FileProbe(tmp_path, 2 * BLOCK_BYTES) as probe:
        assert "page cache" in probe.how and "direct transfers are refused" in probe.notes[0]
    assert not list(tmp_path.iterdir())


def test_a_full_drive_is_told_with_a_size_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 100 * MIB))
    with (
        pytest.raises(OffloadError, match=r"536870912 bytes is needed .* 104857600 are free.*--size 50331648"),
        FileProbe(tmp_path, 512 * MIB),
    ):
        pass


def test_the_command_prints_units_and_writes_keys_that_load(
    tmp_path: Path, small: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cluster.yaml"
    out.write_text("# ours\nnodes: 4  # racks\nnvme_paths:\n  - /old\n  - /older\nh2d_bytes_per_s: 1.0e+3\n")
    code, text, err = run(capsys, "--path", str(tmp_path), "--out", str(out))
    assert (code, err) == (0, "")
    for words in (
        "host to device",
        "GB/s",
        "M parameters/s",
        "M elements/s",
        "between two buffers",
        "direct, 8 MiB blocks",
    ):
        assert words in text, words
    kept = out.read_text()
    assert kept.startswith("# ours\nnodes: 4  # racks\n") and "/old" not in kept
    cluster = load_dataclass(out, "cluster")
    assert cluster.nodes == 4 and cluster.nvme_paths == [str(tmp_path)] and cluster.nvme_weights == []
    assert cluster.h2d_bytes_per_s > 1e6 and cluster.cpu_update_per_s > 0 and cluster.nvme_mixed_bytes_per_s > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cluster.yaml"]


def test_a_busy_machine_is_told(monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    for percent, told in ((90.0, True), (5.0, False)):
        monkeypatch.setattr(measuring.psutil, "cpu_percent", lambda interval, percent=percent: percent)
        notes = calibrate(Device("cpu"), seconds=0.1).notes
        assert any("90 % busy" in note for note in notes) == told


def test_without_a_drive_the_rest_is_measured(small: None, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys)
    assert code == 0 and "give --path FOLDER" in text and "AdamW, CPU, torch" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--path", "{0}/nvm"], "did you mean '{0}/nvme'?"),
        (["--path", "{0}/nvme", "--path", "{0}/nvme/"], "given twice"),
        (["--size", "4MiB"], "at least 16MiB"),
        (["--device", "gpu"], "must be auto, cpu or cuda"),
        (["--size", "much"], "such as 512MiB"),
        (["--out", "{0}/no/cluster.yaml"], "no such folder"),
        (["--out", "{0}/bad.yaml"], "did you mean 'cluster.nodes'"),
    ],
)
def test_what_cannot_be_measured_or_written_is_said_before(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "nvme").mkdir()
    (tmp_path / "bad.yaml").write_text("node: 4\n")
    monkeypatch.setattr(measuring, "calibrate", lambda *_, **__: pytest.fail("measured"))
    code, _, err = run(capsys, *(a.format(tmp_path) for a in arguments))
    assert code == 2 and words.format(tmp_path) in err and err.count("\n") == 1
    assert not (tmp_path / "nvm").exists()


def test_deepspeed_that_cannot_be_built_is_said_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(measuring, "calibrate", lambda *_, **__: pytest.fail("measured"))
    code, _, err = run(capsys, "--deepspeed")
    assert code == 2 and "no compiler no-such-compiler" in err and "leave --deepspeed out" in err


def test_the_faster_kernel_and_its_rate_belong_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def figure(name: str, rate: float) -> Figure:
        return Figure(name, "parameters/s", [], "cpu_update_per_s", samples=[rate])

    found = Calibration([figure("AdamW, CPU, torch", 1e9), figure("AdamW, CPU, DeepSpeed", 1.2345e9)], {}, [])
    facts = measuring._facts(Device("cuda"), found.figures, [])
    assert facts == {"cpu_adam": "deepspeed", "cpu_update_per_s": 1.23e9}
