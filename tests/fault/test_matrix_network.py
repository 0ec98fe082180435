"""Two hosts under torchrun, each in a network namespace of its own, whose link is cut for a while.

The ranks wait for one another in silence, as they do when a switch goes: no connection is reset. The watchdogs end
them, torchrun starts them again, and they go on from memory once the link is back. Needs root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fault.commands import WINDLASS, Commands, commands_of
from tests.fault.memory_runs import Lab
from tests.fault.oracle import EXACT, Told
from tests.leftovers import end_all
from tests.waiting import until
from windlass.checkpoint.memory.heartbeat import is_alive

STEPS = 150


@dataclass
class Hosts:
    """Two namespaces and the link between them."""

    names: tuple[str, str]

    def ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    def begin(self) -> None:
        a, b = self.names
        for name in self.names:
            self.ip("netns", "add", name)
        self.ip("link", "add", "veth0", "netns", a, "type", "veth", "peer", "name", "veth0", "netns", b)
        for number, name in enumerate(self.names, 1):
            self.ip("-n", name, "address", "add", f"10.77.7.{number}/24", "dev", "veth0")
            for device in ("lo", "veth0"):
                self.ip("-n", name, "link", "set", device, "up")

    def set_link(self, state: str) -> None:
        self.ip("-n", self.names[1], "link", "set", "veth0", state)

    def end(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and ip")
    hosts = Hosts((f"windlass-{os.getpid()}-a", f"windlass-{os.getpid()}-b"))
    try:
        hosts.begin()
    except subprocess.CalledProcessError as error:
        hosts.end()
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
    yield hosts
    hosts.end()


@pytest.fixture
def commands(lab: Lab, tmp_path: Path) -> Iterator[Commands]:
    with commands_of(lab, tmp_path) as commands:
        yield commands


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_a_link_that_is_cut_for_a_while_costs_time_and_nothing_else(lab: Lab, commands: Commands, hosts: Hosts) -> None:
    memory = lab.new_memory()
    started = []
    for number, name in enumerate(hosts.names):
        torchrun = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=5"]
        torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=10.77.7.1:29577", "--rdzv-id=cut"]
        torchrun += [f"--rdzv-conf=is_host={1 - number},timeout=120", f"--local-addr=10.77.7.{number + 1}"]
        started.append(
            commands.start(
                "snapshot.redundancy=xor",
                "recovery.hang_s=8",
                "recovery.start_s=60",
                "parallelism.timeout_s=40",
                program=[*torchrun, *WINDLASS],
                before=["ip", "netns", "exec", name],
                steps=STEPS,
                variables={"WINDLASS_NODE": name, "GLOO_SOCKET_IFNAME": "veth0"},
                memory=memory,
            )
        )
    first = started[0]
    first.until(10, timeout_s=90)
    hosts.set_link("down")
    cut_at = first.last_step()
    beats = [beat for rank in range(2) if (beat := first.beat(rank)) is not None]
    until(lambda: not any(is_alive(beat.pid, beat.started) for beat in beats), 90)
    hosts.set_link("up")
    codes = [command.process.wait(150) for command in started]
    said = first.output()
    assert codes == [0, 0], said
    told = Told(first.run, 0, said, STEPS, lab.left(memory))
    assert told.leftovers == []
    right = lab.undisturbed(**{"train.steps": STEPS}).history
    assert [[e[key] for key in EXACT] for e in told.history] == [[e[key] for key in EXACT] for e in right]
    resumed = first.events("resume")
    assert resumed and all(event["folder"].startswith("ram") for event in resumed)
    assert resumed[0]["step"] >= cut_at - 2
    end_all(memory)
