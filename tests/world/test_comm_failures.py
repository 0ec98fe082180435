"""What the comm door says when ranks disagree, die, hang or never come: who, in which operation, and at once."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.harness import COMM_S, outcomes, run_world
from windlass.dist.comm import Comm
from windlass.dist.device import Device
from windlass.dist.env import ProcessEnv
from windlass.dist.errors import CommError
from windlass.dist.group_transport import GlooChannel
from windlass.launch.ports import free_port

TRANSPORTS = ["shm", "group"]


def different_operations(comm: Comm) -> None:
    buffer = comm.world.symmetric(100, torch.float32, full=True, name="unit")
    if comm.rank == 1:
        buffer.reduce_scatter(buffer.mine, label="grad blocks.2").wait()
    else:
        buffer.all_gather(label="param head").wait()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_ranks_in_different_operations_are_both_named_on_both_sides(transport: str) -> None:
    for outcome in outcomes(2, different_operations, transport=transport):
        assert isinstance(outcome.error, CommError), outcome.text
        message = str(outcome.error)
        assert "rank 1 is in reduce_scatter 'grad blocks.2' (op 2)" in message or outcome.rank == 1
        assert "rank 1 in reduce_scatter 'grad blocks.2' (op 2)" in message or outcome.rank == 0
        assert "all_gather 'param head' (op 2)" in message and "rank 0" in message


def different_sizes(comm: Comm) -> None:
    comm.world.all_reduce(torch.zeros(10 + comm.rank), label="norm").wait()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_ranks_with_different_sizes_are_told_both_sizes(transport: str) -> None:
    for outcome in outcomes(2, different_sizes, transport=transport):
        assert isinstance(outcome.error, CommError), outcome.text
        assert "10 x float32" in str(outcome.error) and "11 x float32" in str(outcome.error)


def killed_in_the_middle(comm: Comm) -> tuple[float, str]:
    buffer = comm.world.symmetric(1000, torch.float32, full=True, name="unit")
    buffer.reduce_scatter(buffer.mine, label="first").wait()
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(CommError) as caught:
        buffer.wait_free()
        buffer.reduce_scatter(buffer.mine, label="second").wait()
    with pytest.raises(CommError) as again:
        comm.world.barrier("afterwards")
    assert "rank 1" in str(again.value) or "lost" in str(again.value)
    return time.monotonic() - start, str(caught.value)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_killed_peer_is_reported_at_once_with_its_rank_and_the_operation(transport: str) -> None:
    first, second = outcomes(2, killed_in_the_middle, transport=transport)
    assert "SIGKILL" in str(second.error)
    assert first.error is None, first.text
    waited_s, message = first.value
    assert waited_s < COMM_S / 2
    assert "lost rank 1 in" in message and ("'second'" in message or "wait_free" in message or "'first'" in message)


def killed_while_its_child_lives(comm: Comm, fifo: str) -> None:
    if comm.rank == 1:
        if os.fork() == 0:  # a data worker, say
            signal.alarm(60)
            with open(fifo, "rb"):
                os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(CommError, match="lost rank 1"):
        comm.world.barrier("after")
    with open(fifo, "wb"):  # the child is there still: it ends now
        return


def test_a_child_of_a_killed_rank_does_not_hide_its_death(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "child")
    first, _ = outcomes(2, killed_while_its_child_lives, str(tmp_path / "child"), transport="shm")
    assert first.error is None, first.text


def give_up_after(comm: Comm, seconds: float) -> None:
    """Let this rank wait no longer for its peers from now on; the world itself has formed with patience."""
    if comm._world.hub is not None:
        comm._world.hub.timeout_s = seconds
    if isinstance(comm.world._host, GlooChannel):
        comm.world._host.timeout_s = seconds


def missing_in_action(comm: Comm, fifo: str) -> str:
    if comm.rank == 1:
        with open(fifo, "rb"):  # until rank 0 has given up
            return ""
    give_up_after(comm, 1.0)
    with pytest.raises(CommError) as caught:
        comm.world.all_reduce(torch.zeros(1), label="norm").wait()
    with open(fifo, "wb"):
        return str(caught.value)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_timeout_says_who_waited_for_whom_in_which_operation(transport: str, tmp_path: Path) -> None:
    fifo = tmp_path / "given-up"
    os.mkfifo(fifo)
    message, _ = run_world(2, missing_in_action, str(fifo), transport=transport)
    assert re.search(r"rank 0 waited \d+\.\d s in all_reduce 'norm' \(op 1\)", message)
    assert "for rank 1, which did not come" in message and "parallelism.timeout_s" in message


def leaves_early(comm: Comm) -> None:
    if comm.rank == 0:
        comm.world.barrier("last")


def test_a_peer_that_closed_in_peace_is_told_from_one_that_died() -> None:
    first, second = outcomes(2, leaves_early, transport="shm")
    assert second.error is None
    assert "waits in barrier 'last' (op 1) of group 'world' for rank 1, which has closed" in str(first.error)


def starts_alone(env: ProcessEnv) -> str:
    if env.rank == 1:
        return ""
    with pytest.raises(CommError) as caught:
        Comm.start(env, Device("cpu"), timeout_s=0.5)
    return str(caught.value)


def test_a_world_that_does_not_form_names_the_meeting_point_the_seconds_and_who_is_missing() -> None:
    message, _ = run_world(2, starts_alone, with_env=True)
    assert "did not form at file:///" in message and "missing ranks [1]" in message and "within" in message


def knocks_at_a_closed_port(env: ProcessEnv) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # and kept, so that nobody else answers there
        port = probe.getsockname()[1]
        alone = replace(env, rank=1, world_size=2, rendezvous=None, master_addr="127.0.0.1", master_port=port)
        with pytest.raises(CommError) as caught:
            Comm.start(alone, Device("cpu"), timeout_s=1.0)
    return f"{port} {caught.value}"


def test_a_rendezvous_that_nobody_answers_names_its_address() -> None:
    (text,) = run_world(1, knocks_at_a_closed_port, with_env=True)
    port, message = text.split(" ", 1)
    assert f"could not meet the others at 127.0.0.1:{port} (waited" in message and "Is rank 0 running there" in message


def over_tcp(env: ProcessEnv, port: int) -> float:
    env = replace(env, rendezvous=None, master_addr="127.0.0.1", master_port=port)
    with Comm.start(env, Device("cpu"), transport="group", timeout_s=COMM_S) as comm:
        value = torch.ones(1)
        comm.world.all_reduce(value).wait()
        return value.item()


def test_ranks_meet_over_an_address_and_port_as_well() -> None:
    assert run_world(2, over_tcp, free_port(), with_env=True) == [2.0, 2.0]


def with_its_own_transport(env: ProcessEnv) -> str:
    with pytest.raises(CommError) as caught:
        Comm.start(env, Device("cpu"), transport="shm" if env.rank else "group", timeout_s=COMM_S)
    return str(caught.value)


def test_ranks_with_different_transports_are_told_so_at_the_start() -> None:
    for message in run_world(2, with_its_own_transport, with_env=True):
        assert "ranks disagree on the transport" in message and "'shm'" in message and "'group'" in message
