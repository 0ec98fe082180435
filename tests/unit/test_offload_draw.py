"""Pictures of a step: every lane has its row, names stand where they fit, and shares of busy time are right."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from windlass.offload.draw import busy_s, ordered_lanes, svg, text
from windlass.offload.simulate import Span

SPANS = [
    Span("file write", "write x", 2.0, 4.0),
    Span("compute", "forward embed", 0.0, 1.0),
    Span("compute", "backward embed", 1.0, 2.0),
    Span("file read 1", "read <y>", 0.0, 0.5),
    Span("snapshots", "copy", 3.0, 3.5),
]


def test_lanes_are_in_the_order_of_the_runtime_and_others_last() -> None:
    assert ordered_lanes(SPANS) == ["compute", "file read 1", "file write", "snapshots"]


def test_overlapping_spans_count_once() -> None:
    assert busy_s([Span("a", "", 0, 2), Span("a", "", 1, 3), Span("b", "", 0, 9)], "a") == pytest.approx(3)


def test_text_is_to_scale() -> None:
    lines = text(SPANS, columns=8).splitlines()
    assert lines[0].startswith("compute     |####....|") and lines[0].endswith("busy  50%")
    assert "|....####|" in lines[2] and lines[-1].endswith("4 s")


def test_the_document_is_well_formed_and_names_what_fits() -> None:
    root = ElementTree.fromstring(svg(SPANS, "a & b"))
    words = [element.text or "" for element in root.iter() if element.tag.endswith("text")]
    assert {"a & b", "compute", "forward embed", "read <y>"} <= set(words)
    assert any(word.startswith("busy 50.0%, idle 2 s") for word in words)
    many = [Span("h2d", f"part {i}", i / 1000, (i + 0.5) / 1000) for i in range(50_000)]
    assert svg(many, "narrow").count('class="lane"') < 10_000


def test_nothing_can_be_drawn() -> None:
    assert "0 µs" in text([]) and "<svg" in svg([], "empty")
