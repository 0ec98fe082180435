"""How the cause of a failed run is found and written."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from windlass.dist.env import ProcessEnv
from windlass.dist.errors import CommError, DataError
from windlass.launch.failure import (
    ERROR_FILE,
    Exit,
    Failure,
    describe_exception,
    format_failures,
    format_ranks,
    guarded,
    order_failures,
    read_failure,
)


def ended(rank: int, exc: Exception | None = None, *, code: int = 1, when: float = 0.0, stopped: bool = False) -> Exit:
    return Exit(rank, code, when, None if exc is None else describe_exception(exc, rank), stopped)


def test_a_real_error_is_the_cause_even_when_a_lost_peer_was_reported_before_it() -> None:
    lost = ended(0, CommError("rank 1 is gone"))
    real = ended(1, ValueError("bad value"))
    assert [failure.rank for failure in order_failures([lost, real])] == [1, 0]
    text = format_failures([lost, real])
    assert text.index("rank 1 failed first: ValueError: bad value") < text.index("rank 0 then failed: CommError")


def test_a_killed_rank_is_the_cause_of_lost_peers_and_its_signal_gives_the_exit_code() -> None:
    exits = [ended(0, CommError("rank 1 is gone")), ended(1, code=-signal.SIGKILL, when=1e12)]
    first = order_failures(exits)[0]
    assert (first.rank, first.exit_code) == (1, 128 + signal.SIGKILL)
    assert "killed by SIGKILL" in first.message


def test_a_rank_that_surely_hung_comes_before_one_that_may_have_waited_for_it() -> None:
    waited = Failure(0, 1.0, "hung in STEP", "", 137, False, "hang", sure=False)
    stopped = Failure(1, 2.0, "hung in STEP (stopped by a signal)", "", 137, False, "hang")
    exits = [Exit(failure.rank, -signal.SIGKILL, failure.when, failure, stopped=False) for failure in (waited, stopped)]
    assert [failure.rank for failure in order_failures(exits)] == [1, 0]


def test_equal_errors_are_shown_once_with_all_their_ranks() -> None:
    text = format_failures([ended(rank, DataError(f"shard {rank} is damaged")) for rank in (0, 1, 2, 5)])
    assert text.count("damaged") == 1
    assert "ranks 0-2, 5 failed first" in text


def test_ranks_that_the_launcher_stopped_are_not_causes() -> None:
    exits = [ended(0, code=-signal.SIGTERM, stopped=True), ended(1, ValueError("bad value"))]
    assert [failure.rank for failure in order_failures(exits)] == [1]
    assert "rank 0 stopped by the launcher" in format_failures(exits)


def test_errors_raised_on_purpose_have_no_traceback_and_others_have_one() -> None:
    def fail() -> None:
        raise KeyError("lost")

    with pytest.raises(KeyError) as caught:
        fail()
    assert "in fail" in describe_exception(caught.value, 0).traceback
    assert describe_exception(DataError("damaged"), 0).traceback == ""


def test_the_report_file_is_the_one_torchrun_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    def fail() -> int:
        raise ValueError("bad value")

    file = tmp_path / "error.json"
    monkeypatch.delenv(ERROR_FILE, raising=False)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert guarded(fail, ProcessEnv(rank=1, world_size=2)) == 1
    seen = ProcessFailure(local_rank=1, pid=1, exitcode=1, error_file=str(file))
    assert "ValueError: bad value" in seen.message["extraInfo"]["py_callstack"]  # type: ignore[index]
    failure = read_failure(file)
    assert failure is not None and failure.rank == 1 and abs(failure.when - seen.timestamp) <= 1


def test_without_a_launcher_the_message_goes_to_stderr_with_the_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise DataError("shard 3 is damaged")

    for name in (ERROR_FILE, "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert guarded(fail, ProcessEnv(rank=1, world_size=2)) == DataError.exit_code
    assert "[rank 1]" in (text := capsys.readouterr().err) and "Traceback" not in text


def test_a_report_survives_json_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        raise CommError("rank 1 is gone")

    file = tmp_path / "error.json"
    monkeypatch.setenv(ERROR_FILE, str(file))
    assert guarded(fail, ProcessEnv(rank=2, world_size=4)) == CommError.exit_code
    failure = read_failure(file)
    assert failure is not None and failure.secondary and failure.rank == 2
    assert json.loads(file.read_text())["message"]["message"] == failure.message
    assert read_failure(tmp_path / "none.json") is None


@given(st.sets(st.integers(0, 40), min_size=1))
def test_ranks_are_written_as_spans_that_hold_exactly_those_ranks(ranks: set[int]) -> None:
    spans = format_ranks(list(ranks)).split(" ", 1)[1].split(", ")
    back = [n for span in spans for n in range(int(span.split("-")[0]), int(span.split("-")[-1]) + 1)]
    assert back == sorted(ranks)


def test_a_report_is_written_also_after_somebody_has_tidied_up_and_shown_where_it_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise DataError("shard 3 is damaged")

    file = tmp_path / "gone" / "2" / "error.json"
    monkeypatch.setenv(ERROR_FILE, str(file))
    assert guarded(fail, ProcessEnv()) == DataError.exit_code
    failure = read_failure(file)
    assert failure is not None and "shard 3" in failure.message
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "a file" / "error.json"))
    assert guarded(fail, ProcessEnv()) == DataError.exit_code
    assert "error: shard 3 is damaged" in capsys.readouterr().err
