"""Lines for people: written as far as that is possible, and never a reason to fail."""

from __future__ import annotations

import io
import sys

import pytest

from windlass.launch.failure import Exit
from windlass.launch.lines import say
from windlass.launch.local import prefixed
from windlass.launch.supervisor import StopRequests, conclude


def test_a_full_disk_behind_the_output_takes_the_lines_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    code = 0
    with pytest.raises(OSError, match="No space left"), open("/dev/full", "w") as full:  # as it is closed
        monkeypatch.setattr(sys, "stderr", full)
        say("first")
        say("second", full)
        prefixed(1, full)("a line of a worker")
        code = conclude([Exit(0, -9, 0.0, None, stopped=False)], StopRequests())
    assert code == 137


def test_what_an_encoding_lacks_is_an_escape() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    say("no file '\udcff', \u2192", stream)
    assert stream.buffer.getvalue() == b"no file '\\udcff', \\u2192\n"  # type: ignore[attr-defined]
    text = io.StringIO()
    say("two\nlines", text)
    assert text.getvalue() == "two\nlines\n"


def test_without_an_output_nothing_is_said(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    say("nobody reads this")
    assert capfd.readouterr() == ("", "")
