"""The event stream and its views: JSON lines, log lines, TensorBoard."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from windlass.dist.errors import DataError
from windlass.launch.events import Ended, Evaluated, Event, EventStream, Resumed, Saved, Started, Stepped, Warned
from windlass.launch.metrics import (
    AppendFile,
    JsonLines,
    LogLines,
    MetricsConfig,
    TensorBoard,
    as_json,
    build_sinks,
    read_metrics,
)
from windlass.launch.report import duration, line_of, size, step_line


def stepped(step: int, **changes: Any) -> Stepped:
    base = Stepped(
        step=step,
        loss=2.8996,
        bits_per_byte=1.234,
        grad_norm=0.95731,
        lr=3e-4,
        tokens=1000,
        samples=(8 * (step - 1), 8 * step),
        skipped=False,
        step_s=0.5,
        data_s=0.001,
        stall_s=0.003,
        seconds={"forward_backward": 0.4},
        tokens_per_s=7375.0,
        tflops=0.53,
        mfu=0.0017,
        memory_peak_bytes=int(1.2 * 2**30),
        memory_share=0.05,
        bytes_by_tier={"device": 10},
        comm_bytes=64,
        eta_s=75.2,
    )
    return dataclasses.replace(base, **changes)


def started(step: int, total: int = 100) -> Started:
    return Started(step, total, 1_000_000, 2, "CPU", 8, 128, {"model": 0.5, "data": 0.25}, {"torch": "2"})


def test_the_step_line_has_the_usual_form() -> None:
    assert step_line([stepped(20)]) == (
        "step: 20 loss: 2.8996 bpb: 1.2340 grad_norm: 0.9573 lr: 3.0e-04 memory: 1.20GiB(5.0%) tps: 7,375 "
        "tflops: 0.53 mfu: 0.17% data_ms: 1 stall_ms: 3 eta: 0:01:15"
    )
    assert "bpb" not in step_line([stepped(20, bits_per_byte=None)])
    assert step_line([stepped(20, skipped=True)]).endswith("(skipped)")


def test_speeds_of_a_line_are_time_weighted_means_over_its_window() -> None:
    fast, slow = stepped(1, step_s=1.0, tokens_per_s=3000.0), stepped(2, step_s=3.0, tokens_per_s=1000.0)
    assert "tps: 1,500 " in step_line([fast, slow])


def test_a_step_is_one_json_object_without_an_event_key_and_other_events_name_themselves(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "m.jsonl")
    for event in (stepped(1), Evaluated(1, 3.0, None, 10, 0.1), Saved(1, "x", 5, 0.1), Warned(1, "careful")):
        sink.write(event)
    sink.close()
    entries = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [entry.get("event") for entry in entries] == [None, "eval", "checkpoint", "warning"]
    assert entries[0]["samples"] == [0, 8]
    assert entries[0]["seconds"] == {"forward_backward": 0.4}
    assert set(entries[0]) == {f.name for f in dataclasses.fields(Stepped)} | {"time"}


def test_numbers_that_json_cannot_say_are_null() -> None:
    entry = as_json(stepped(3, loss=float("nan"), grad_norm=float("inf"), seconds={"step": float("-inf")}))
    assert entry["loss"] is None
    assert entry["grad_norm"] is None
    assert entry["seconds"] == {"step": None}
    json.dumps(entry, allow_nan=False)


def test_history_takes_redone_steps_from_the_last_start_and_leaves_out_half_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path)
    for event in (started(0), *(stepped(n, loss=1.0) for n in range(1, 8))):
        first.write(event)
    first.close()
    with open(path, "a") as file:
        file.write('{"step": 8, "lo')  # killed here
    second = JsonLines(path)
    for event in (Resumed(5, "step-5", 40, 0.1), started(5), *(stepped(n, loss=2.0) for n in range(6, 9))):
        second.write(event)
    second.close()
    history = read_metrics(path)
    steps = [(entry["step"], entry["loss"]) for entry in history if "event" not in entry]
    assert steps == [(n, 1.0) for n in range(1, 6)] + [(n, 2.0) for n in range(6, 9)]
    assert [entry["event"] for entry in history if "event" in entry] == ["start", "resume", "start"]
    with pytest.raises(DataError, match="No such file"):
        read_metrics(tmp_path / "none.jsonl")


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=6))
def test_history_of_any_starts_has_every_step_once_and_in_order(
    tmp_path_factory: Any, starts: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.mktemp("history") / "m.jsonl"
    sink = JsonLines(path)
    expected: dict[int, int] = {}
    for number, (back, count) in enumerate(starts):
        begin = max(0, len(expected) - back)
        expected = {step: owner for step, owner in expected.items() if step <= begin}
        sink.write(started(begin))
        for step in range(begin + 1, begin + count + 1):
            sink.write(stepped(step, tokens=number))
            expected[step] = number
    sink.close()
    steps = [(entry["step"], entry["tokens"]) for entry in read_metrics(path) if "event" not in entry]
    assert steps == sorted(expected.items())


def test_text_that_a_full_disk_refused_is_written_later_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = AppendFile(tmp_path / "m")
    real, full = os.write, [False]

    def write(fd: int, data: bytes) -> int:
        if full[0] and len(data) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[:2])  # and the file system takes little at a time

    monkeypatch.setattr(os, "write", write)
    file.write("one")
    full[0] = True
    with pytest.raises(OSError, match="No space left") as caught:
        file.write("two")
    assert caught.value.filename == str(tmp_path / "m")
    full[0] = False
    file.write("three")
    file.close()
    assert (tmp_path / "m").read_text() == "one\ntwo\nthree\n"


class Broken:
    """A sink on a full disk."""

    def __init__(self) -> None:
        self.full = True

    def write(self, event: Event) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device", "m.jsonl")

    def close(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "m.jsonl")


class Memory:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def write(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.events.append(Warned(0, "closed"))


def test_a_sink_that_fails_is_reported_once_per_failure_and_stops_nothing() -> None:
    broken, memory = Broken(), Memory()
    stream = EventStream([broken, memory])
    for step in (1, 2):
        stream.emit(stepped(step))
    broken.full = False
    stream.emit(stepped(3))
    broken.full = True
    stream.emit(stepped(4))
    stream.close()
    assert [event.step for event in memory.events if isinstance(event, Stepped)] == [1, 2, 3, 4]
    told = [event for event in memory.events if isinstance(event, Warned)]
    assert [event.step for event in told] == [1, 4, 0]
    assert "m.jsonl" in told[0].message
    assert len(stream.warnings) == 3


def test_lines_appear_for_the_first_every_nth_and_the_last_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = LogLines(tmp_path / "log.txt", log_every=3)
    sink.write(started(0, total=8))
    for step in range(1, 9):
        sink.write(stepped(step))
    sink.close()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("training 1,000,000 parameters on 2 x CPU: steps 1 to 8, 8 x 128 tokens each")
    assert [line.split()[1] for line in printed[1:]] == ["1", "3", "6", "8"]
    logged = (tmp_path / "log.txt").read_text().splitlines()
    assert [line[20:] for line in logged] == printed


def test_other_ranks_show_warnings_only_on_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = {"metrics": tmp_path / "m", "log": tmp_path / "l", "tensorboard": tmp_path / "t"}
    (sink,) = build_sinks(MetricsConfig(), 3, **places)
    sink.write(stepped(1))
    sink.write(Warned(1, "odd"))
    sink.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "rank 3: WARNING (step 1): odd\n"
    assert not any(tmp_path.iterdir())


def test_tensorboard_gets_the_scalars_and_redone_steps_are_purged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for begin, end, loss in ((0, 4, 1.0), (2, 5, 2.0)):
        sink = TensorBoard(tmp_path)
        sink.write(started(begin))
        for step in range(begin + 1, end + 1):
            sink.write(stepped(step, loss=loss, grad_norm=float("nan")))
        sink.write(Evaluated(end, 2.5, 1.1, 100, 0.1))
        sink.close()
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert {event.step: event.value for event in read.Scalars("train/loss")} == {1: 1.0, 2: 1.0, 3: 2.0, 4: 2.0, 5: 2.0}
    assert read.Scalars("validation/bits_per_byte")[-1].value == pytest.approx(1.1)
    assert "train/grad_norm" not in read.Tags()["scalars"]


def test_the_summary_names_peaks_predictions_warnings_and_files() -> None:
    text = line_of(
        Ended(
            30, "SIGTERM", True, 1234567, 65.0, 0.9,
            peak_bytes={"device": 3 * 2**20, "nvme": 0},
            predicted_bytes={"param": 2**20}, measured_bytes={"param": 2**20, "grad": 2**19},
            warnings=["step 3: disk full"], files=["run/metrics.jsonl"],
        )
    )  # fmt: skip
    assert text is not None
    lines = text.splitlines()
    assert lines[0].startswith("stopped (SIGTERM) at step 30: 1,234,567 tokens in 0:01:05, goodput 90.0%")
    assert lines[1] == "peak per rank: device 3.00 MiB"
    assert lines[3].split() == ["grad", "-", "512.00", "KiB"]
    assert lines[4].split() == ["param", "1.00", "MiB", "1.00", "MiB"]
    assert lines[5:] == ["WARNING (again): step 3: disk full", "written: run/metrics.jsonl"]


def test_resuming_tells_what_was_passed_over() -> None:
    text = line_of(Resumed(5, "runs/x/step-5", 40, 0.25, ["step-6: truncated"], ["world size was 2, is 4"]))
    assert text == (
        "resumed at step 5 from 'runs/x/step-5' (0.2 s)\n"
        "  passed over step-6: truncated\n"
        "  note: world size was 2, is 4"
    )


def test_bytes_and_seconds_read_well() -> None:
    assert [size(n) for n in (0, 1023, 1024, 5 * 2**30, 2**51)] == [
        "0 B",
        "1023 B",
        "1.00 KiB",
        "5.00 GiB",
        "2048.00 TiB",
    ]
    assert duration(3661.4) == "1:01:01"
