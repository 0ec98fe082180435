"""The actor of one worker, called as Ray calls it: from several threads. And the question which nodes are gone."""

from __future__ import annotations

import shutil
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.waiting import until
from windlass.launch import ports
from windlass.launch.forkserver import ForkServer
from windlass.launch.local import WorkerCommand
from windlass.launch.ray.places import Place, refusing
from windlass.launch.ray.worker_actor import Job, WorkerActor

LONG_S = 150.0
SLEEP = "import time; print('here', flush=True); time.sleep(150)"
ANSWER_S = 60.0
REPORT = """
import sys
from windlass.dist.env import ProcessEnv
from windlass.dist.errors import DataError
from windlass.launch.failure import report_failure
report_failure(DataError("shard 3 is damaged"), ProcessEnv())
sys.exit(3)
"""


@pytest.fixture(params=[False, True], ids=["new", "forked"])
def actor(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerActor]:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("windlass.launch.ray.worker_actor.ForkServer", partial(ForkServer, preload=()))
    actor = WorkerActor(fork_server=request.param)
    yield actor
    actor.clean()


def start(actor: WorkerActor, code: str, generation: int = 1) -> None:
    actor.start(WorkerCommand(("-c", code)), {}, ".", ("stdout", "stderr"), Job(0, generation))


def test_who_waits_hears_at_once_of_a_line_and_of_the_end(actor: WorkerActor) -> None:
    with ThreadPoolExecutor() as others:
        start(actor, SLEEP)
        said = actor.poll(LONG_S, generation=1)
        assert ([line.text for line in said.lines], said.code) == (["here"], None)
        waiting = others.submit(actor.poll, LONG_S, said.lines[-1].number, 0, 1)
        until(lambda: len(actor._changed._waiters) > 0)  # type: ignore[attr-defined]
        assert not waiting.done()
        began = time.monotonic()
        actor.send(signal.SIGKILL)
        assert waiting.result(timeout=ANSWER_S).code == -signal.SIGKILL
        assert time.monotonic() - began < ANSWER_S


def test_what_a_worker_said_last_is_there_with_its_end(actor: WorkerActor) -> None:
    start(actor, "import sys; print('\\n'.join(map(str, range(5000)))); sys.exit(3)")
    lines: list[str] = []
    last, polled = 0, None
    while polled is None or polled.code is None:
        polled = actor.poll(LONG_S, last, last, generation=1)
        lines += [line.text for line in polled.lines]
        last = max([last, *(line.number for line in polled.lines)])
    assert polled.code == 3
    assert lines == [str(number) for number in range(5000)]


def test_a_start_ends_the_worker_before_and_those_who_wait_for_that(actor: WorkerActor) -> None:
    with ThreadPoolExecutor() as others:
        start(actor, SLEEP)
        seen = actor.poll(LONG_S, generation=1).lines[-1].number
        waiting = others.submit(actor.poll, LONG_S, seen, 0, 1)
        both = [others.submit(start, actor, SLEEP, generation) for generation in (2, 2)]
        assert waiting.result(timeout=ANSWER_S).code == -signal.SIGKILL
        for call in both:
            call.result(timeout=ANSWER_S)
        assert actor.poll(0.0, seen, generation=1).code == -signal.SIGKILL
        assert actor.poll(0.0, seen, generation=2).code is None


def test_a_signal_reaches_only_the_worker_of_the_generation_that_it_is_for(actor: WorkerActor) -> None:
    assert not actor.send(signal.SIGKILL)
    start(actor, SLEEP, generation=2)
    assert not actor.send(signal.SIGKILL, 1), "of a controller that was fenced off"
    assert actor.poll(LONG_S, generation=2).code is None
    assert actor.send(signal.SIGKILL, 2)
    polled = actor.poll(LONG_S, 10_000, generation=2)
    assert polled.code == -signal.SIGKILL
    assert not actor.send(signal.SIGKILL, 2), "it has ended"


def test_ranks_meet_at_a_port_that_the_system_gives_to_nobody_by_itself(
    actor: WorkerActor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_out = tmp_path / "ip_local_port_range"
    monkeypatch.setattr(ports, "GIVEN_OUT", given_out)
    given_out.write_text("20001\t60999\n")
    found = {actor.rendezvous(generation)[1] for generation in range(20)}
    assert len(found) > 10 and all(20_001 - ports.BELOW <= port <= 20_000 for port in found)
    given_out.write_text("1025 60999")  # one is left, which is taken
    monkeypatch.setattr(ports, "_bind", lambda port, bind=ports._bind: bind(port) if port != 1024 else bind(taken))
    with socket.socket() as listening:
        listening.bind(("", 0))
        taken = listening.getsockname()[1]
        assert actor.rendezvous()[1] not in (taken, 1024)
    given_out.unlink()
    assert actor.rendezvous()[1] > 0


def test_only_a_host_that_refuses_has_lost_its_node() -> None:
    def place(name: str, host: str, port: int) -> Place:
        return Place(name, name, name, host, port, {})

    with socket.socket() as listening, socket.socket() as closed:
        for each in (listening, closed):
            each.bind(("127.0.0.1", 0))
        listening.listen()
        ports = listening.getsockname()[1], closed.getsockname()[1]
        places = [place("there", "127.0.0.1", ports[0]), place("gone", "127.0.0.1", ports[1])]
        assert [found.name for found in refusing(places)] == ["gone"]
    assert refusing([]) == []


def test_a_worker_starts_and_reports_after_somebody_has_tidied_up(actor: WorkerActor, tmp_path: Path) -> None:
    shutil.rmtree(actor._files)
    store, _ = actor.rendezvous(1)
    assert Path(store.removeprefix("file://")).parent.is_dir()
    shutil.rmtree(actor._files)
    start(actor, REPORT)
    polled = actor.poll(LONG_S, generation=1)
    while polled.code is None:
        polled = actor.poll(LONG_S, after=1 << 30, generation=1)
    assert polled.code == 3 and polled.failure is not None and "damaged" in polled.failure.message
