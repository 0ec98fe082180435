"""The tracer: events, totals and the Chrome file."""

import gzip
import json
import threading
from pathlib import Path

import pytest

from windlass.dist.trace import Tracer


def test_a_disabled_tracer_keeps_totals_but_no_events() -> None:
    tracer = Tracer()
    with tracer.span("gather", "comm"):
        pass
    tracer.instant("start", "comm")
    tracer.counter("bytes", device=1)
    busy = tracer.take_busy()
    assert not tracer.events and busy["comm"] > 0 and tracer.take_busy() == {}


def test_a_span_is_recorded_even_when_its_code_raises() -> None:
    tracer = Tracer(enabled=True)
    with pytest.raises(ValueError, match="inside"), tracer.span("forward", "compute", unit=3):
        raise ValueError("inside")
    (event,) = tracer.events
    assert (event.name, event.lane, event.args) == ("forward", "compute", {"unit": 3}) and event.duration_s > 0


def test_the_ring_forgets_the_oldest_events() -> None:
    tracer = Tracer(enabled=True, capacity=3)
    for i in range(5):
        tracer.instant(str(i), "lane")
    assert [e.name for e in tracer.events] == ["2", "3", "4"]


@pytest.mark.parametrize("name", ["trace.json", "deep/trace.json.gz"])
def test_a_written_trace_is_chromes_format(tmp_path: Path, name: str) -> None:
    tracer = Tracer(enabled=True)
    with tracer.span("gather", "comm", op=1):
        tracer.instant("start", "compute")
    tracer.counter("memory", device=5)
    path = tmp_path / name
    tracer.write_chrome(path, rank=2)
    text = gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes()
    rows = json.loads(text)["traceEvents"]
    assert {r["pid"] for r in rows} == {2} and [p.name for p in path.parent.iterdir() if "tmp" in p.name] == []
    by_phase = {r["ph"]: r for r in rows if r["ph"] != "M"}
    assert by_phase["X"]["dur"] > 0 and by_phase["X"]["args"] == {"op": 1}
    assert by_phase["i"]["s"] == "t" and by_phase["C"]["args"] == {"device": 5}
    names = {r["tid"]: r["args"]["name"] for r in rows if r["name"] == "thread_name"}
    assert names[by_phase["X"]["tid"]] == "comm" and names[by_phase["i"]["tid"]] == "compute"
    assert by_phase["X"]["ts"] <= by_phase["i"]["ts"] <= by_phase["X"]["ts"] + by_phase["X"]["dur"]


def test_threads_may_share_a_lane_while_another_writes_the_trace(tmp_path: Path) -> None:
    tracer = Tracer(enabled=True)

    def work() -> None:
        for _ in range(2000):
            with tracer.span("read", "file read"):
                pass

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    busy = 0.0
    while any(thread.is_alive() for thread in threads):
        busy += tracer.take_busy().get("file read", 0.0)
        tracer.write_chrome(tmp_path / "trace.json", rank=0)
    busy += tracer.take_busy().get("file read", 0.0)
    events = tracer.recorded()
    assert len(events) == 6000 and busy == pytest.approx(sum(e.duration_s for e in events))
