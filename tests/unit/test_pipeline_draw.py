"""Pictures: to scale, nothing on top of each other, well-formed; and measured runs drawn like simulated ones."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from windlass.dist.errors import DataError, PlanError
from windlass.dist.trace import Event, Tracer
from windlass.parallel.pipeline.action import Action
from windlass.parallel.pipeline.builders import BUILDERS, build
from windlass.parallel.pipeline.costs import Costs
from windlass.parallel.pipeline.draw import svg, text_grid, timeline_from_trace
from windlass.parallel.pipeline.passes import lower
from windlass.parallel.pipeline.simulate import simulate
from windlass.parallel.pipeline.timeline import Span, Timeline

SVG = "{http://www.w3.org/2000/svg}"


def simulated(name: str = "1f1b", p: int = 2, m: int = 2, vocab: int = 0, latency: float = 0.0) -> Timeline:
    schedule = lower(build(name, p, m, vocab=vocab), gather="run")
    return simulate(schedule, Costs.uniform(schedule.layout, head=1.0, embedding=0.2, latency_s=latency))


def rectangles(picture: str) -> list[dict[str, str]]:
    return [
        e.attrib | {"label": e.findtext(f"{SVG}title") or ""}
        for e in ElementTree.fromstring(picture).iter(f"{SVG}rect")
    ]


# -- text ------------------------------------------------------------------------------------------------------------


def test_a_text_grid_is_to_scale_with_facts_at_the_end() -> None:
    schedule = build("1f1b", 2, 2)
    assert text_grid(simulate(schedule, Costs.uniform(schedule.layout))).splitlines() == [
        "rank 0  | F0 F1       B0---    B1--- | idle  33%, 2 in flight",
        "rank 1  |    F0 B0--- F1 B1---       | idle  33%, 1 in flight",
    ]


def test_a_text_grid_names_stages_where_a_rank_has_several() -> None:
    schedule = build("interleaved", 2, 2)
    first = text_grid(simulate(schedule, Costs.uniform(schedule.layout))).splitlines()[0]
    assert "0F0 0F1 2F0 2F1" in first


def test_a_long_step_is_squeezed_into_the_columns() -> None:
    lines = text_grid(simulated(p=4, m=64), columns=40).splitlines()
    assert len({line.index("| idle") for line in lines}) == 1 and max(map(len, lines)) < 40 * 4 + 45


def test_a_step_in_which_nothing_runs_can_be_drawn() -> None:
    empty = Timeline.of("empty", [[], []])
    assert text_grid(empty).count("idle   0%, 0 in flight") == 2
    ElementTree.fromstring(svg(empty, "empty"))


# -- SVG -------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(BUILDERS)),
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(0, 2),
    st.sampled_from([0.0, 0.3]),
)
def test_no_boxes_overlap_and_all_compute_is_drawn(name: str, p: int, m: int, vocab: int, latency: float) -> None:
    timeline = simulated(name, p, m, vocab, latency)
    picture = svg(timeline, "title")
    size = ElementTree.fromstring(picture).attrib
    rows: defaultdict[tuple[str, str], list[tuple[float, float, str]]] = defaultdict(list)
    tops: list[tuple[float, float]] = []
    for box in rectangles(picture):
        assert float(box["x"]) + float(box["width"]) <= float(size["width"]) + 0.1
        assert float(box["y"]) + float(box["height"]) <= float(size["height"]) + 0.1
        if "class" in box:
            rows[box["class"], box["y"]].append((float(box["x"]), float(box["width"]), box["label"]))
            tops.append((float(box["y"]), float(box["height"])))
    for row in rows.values():
        row.sort()
        for (x, width, label), (following, _, other) in pairwise(row):
            assert x + width <= following + 0.02, f"{label} reaches into {other}"
    stacked = sorted(set(tops))
    assert all(y + height <= below + 0.01 for (y, height), (below, _) in pairwise(stacked))
    drawn = sorted(label.split(":")[0] for (kind, _), row in rows.items() if kind == "compute" for *_, label in row)
    assert drawn == sorted(str(s.action) for lanes in timeline.spans for s in lanes["compute"])


def test_boxes_are_to_scale_and_carry_micro_batches() -> None:
    picture = svg(simulated(), "title")
    width = {
        box["label"].split(":")[0]: float(box["width"]) for box in rectangles(picture) if box.get("class") == "compute"
    }
    assert width["0B1"] == pytest.approx(2 * width["0F0"], abs=0.05)
    texts = [e.text for e in ElementTree.fromstring(picture).iter(f"{SVG}text")]
    assert texts.count("0") >= 4 and {"rank 0", "rank 1", "F forward", "B backward"} <= set(texts)


def test_titles_units_and_facts_are_written_safely() -> None:
    timeline = simulated()
    picture = svg(timeline, "a < b & 'c'", unit="forwards")
    texts = [e.text or "" for e in ElementTree.fromstring(picture).iter(f"{SVG}text")]
    assert "a < b & 'c'" in texts and "forwards" in texts
    assert any(text.startswith(f"idle {timeline.idle[0]:.1%}") and "2 in flight" in text for text in texts)


def test_later_stages_of_a_rank_are_paler_and_transfers_have_strips() -> None:
    boxes = rectangles(svg(simulated("vhalf", 2, 2, vocab=2, latency=0.4), "v"))
    fill = {box["label"].split(":")[0]: box["fill"] for box in boxes if "class" in box}
    assert fill["0F0"] != fill["3F0"] and fill["0F0"] == fill["1F0"]
    assert {box["class"] for box in boxes if "class" in box} == {"compute", "strip p2p", "strip collective"}


def test_seconds_are_written_in_the_unit_that_fits() -> None:
    for end, unit in ((3.0, "s"), (3e-3, "ms"), (3e-6, "µs")):
        timeline = Timeline.of("x", [[Span(Action(0, "F", 0), 0.0, end)]])
        texts = [e.text for e in ElementTree.fromstring(svg(timeline, "x")).iter(f"{SVG}text")]
        assert unit in texts and "2" in texts


def test_bytes_are_shown_where_they_are_counted() -> None:
    timeline = Timeline.of("x", [[Span(Action(0, "F", 0), 0.0, 1.0)]], peak_bytes=(3.5 * 2**30,))
    assert "3.5 GiB" in svg(timeline, "x")


# -- measured --------------------------------------------------------------------------------------------------------


def record(path: Path, rank: int, spans: list[tuple[str, str, float, float]], clock: float = 0.0) -> Path:
    """Write a trace of spans (name, lane, start, end); names of compute and p2p spans are actions."""
    tracer = Tracer(enabled=True)
    tracer.epoch_s = clock
    for name, lane, start, end in spans:
        args = {"action": name} if lane in ("compute", "p2p") else {}
        tracer.events.append(Event("X", name, lane, start - clock, end - start, args))
    tracer.write_chrome(path, rank)
    return path


def test_a_measured_step_is_drawn_like_a_simulated_one(tmp_path: Path) -> None:
    first = [("step 1", "step", 0, 9), ("0F0", "compute", 0, 9), ("step 2", "step", 10, 20)]
    first += [("0F0", "compute", 11, 12), ("0SEND_F0", "p2p", 12, 12.5), ("0B0", "compute", 12.5, 19)]
    first += [("receive 1SEND_B0", "comm", 12.75, 16.75), ("evaluate", "parts", 11, 12)]
    second = [("step 2", "step", 10, 19), ("1F0", "compute", 12, 14), ("1B0", "compute", 14, 17)]
    paths = [
        record(tmp_path / "a.json", 0, first, clock=5.0),
        record(tmp_path / "b.json.gz", 3, second, clock=7.0),
    ]
    timeline = timeline_from_trace(paths, "run")
    assert [[str(s.action) for s in lanes["compute"]] for lanes in timeline.spans] == [["0F0", "0B0"], ["1F0", "1B0"]]
    backward = timeline.spans[0]["compute"][1]
    assert (backward.start_s, backward.end_s) == pytest.approx((5.5, 8)), "4 of its 6.5 seconds were waiting"
    assert [str(s.action) for s in timeline.spans[0]["p2p"]] == ["0SEND_F0"]
    assert timeline.total_s == pytest.approx(8) and timeline.idle == pytest.approx((1 - 3.5 / 8, 1 - 5 / 8))
    assert timeline.peak_in_flight == (1, 1) and timeline.name == "run"
    ElementTree.fromstring(svg(timeline, "measured"))


def test_a_trace_without_the_step_or_without_actions_is_refused(tmp_path: Path) -> None:
    good = record(tmp_path / "a.json", 0, [("step 4", "step", 0, 1), ("0F0", "compute", 0, 1)])
    bare = record(tmp_path / "b.json", 1, [("step 4", "step", 0, 1), ("forward", "parts", 0, 1)])
    with pytest.raises(PlanError, match="step 3 is not in all of them; common steps: 4"):
        timeline_from_trace([good], step=3)
    with pytest.raises(PlanError, match=r"b.json: step 4 holds no pipeline action"):
        timeline_from_trace([good, bare])
    with pytest.raises(PlanError, match=r"step None is not in all of them; common steps: none"):
        timeline_from_trace([record(tmp_path / "c.json", 0, [])])


@pytest.mark.parametrize(
    ("name", "data"),
    [("x.json", b"{"), ("x.json.gz", b"not gzip"), ("x.json", json.dumps({"other": 1}).encode()), ("y.json", None)],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, name: str, data: bytes | None) -> None:
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{name} cannot be read"):
        timeline_from_trace([path])
    cut = tmp_path / "cut.json.gz"
    cut.write_bytes(gzip.compress(b'{"traceEvents": []}')[:-6])
    with pytest.raises(DataError, match=r"cut\.json\.gz cannot be read"):
        timeline_from_trace([cut])
