"""Messages between ranks: order, independence, eagerness, and what is said when the two sides do not fit."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import COMM_S, outcomes, run_world
from tests.world.test_comm_failures import give_up_after
from windlass.dist.comm import Comm, Group
from windlass.dist.errors import CommError
from windlass.dist.nccl import NcclChannel
from windlass.dist.transport import Call

TRANSPORTS = ["shm", "group"]
WORLDS = [("shm", 2), ("shm", 4), ("group", 2), ("group", 4)]
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64)
SIZES = (0, 1, 777, 20_001, 600_000)  # the first three may travel inside letters


def data(salt: int, numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(salt)
    return (torch.randn(numel, generator=generator) * 100).to(dtype)


def everyone_to_everyone(comm: Comm) -> bool:
    group, right = comm.world, True
    others = [i for i in range(group.size) if i != group.rank]
    for dtype in DTYPES:
        for n in SIZES:
            mine = data(group.rank, n, dtype).view(1, -1)
            group.send(mine, others, label="values").wait()
            mine.fill_(7)  # it has been copied
            outs = [torch.full((n,), 5, dtype=dtype) for _ in others]
            pending = [group.receive(out, i, label="values") for out, i in zip(outs, others, strict=True)]
            for operation in reversed(pending):
                operation.wait()
            right &= all(torch.equal(out, data(i, n, dtype)) for out, i in zip(outs, others, strict=True))
    group.barrier("done")
    return right


@pytest.mark.parametrize(("transport", "size"), WORLDS)
def test_every_format_and_size_arrives_when_all_ranks_send_first(transport: str, size: int) -> None:
    assert run_world(size, everyone_to_everyone, transport=transport) == [True] * size


def random_traffic(comm: Comm, *seeds: int) -> tuple[int, bool]:
    """Carry out several lists of messages, one after the other in the same groups."""
    everyone = range(comm.size)
    groups = [comm.world, comm.group(everyone, "F", private=True), comm.group(everyone, "B")]
    results = [random_list(comm, groups, seed) for seed in seeds]
    comm.world.barrier("done")
    return sum(n for n, _ in results), all(right for _, right in results)


def random_list(comm: Comm, groups: list[Group], seed: int) -> tuple[int, bool]:
    """Carry out one random list of messages; every rank merges its edges and its waits in an order of its own."""
    pick, own = random.Random(seed), random.Random(1000 * seed + comm.rank)
    size = comm.size
    lines: dict[tuple[int, str, int], list[tuple[int, int, int, list[int]]]] = {}
    for number in range(120):
        g, source = pick.randrange(3), pick.randrange(size)
        to = sorted(pick.sample([i for i in range(size) if i != source], pick.choice([1, 1, size - 1])))
        message = (number, pick.choice([0, 3, 500, 5_000, 30_000]), source, to)
        me = groups[g].rank
        if source == me:
            lines.setdefault((g, "send", me), []).append(message)
        elif me in to:
            lines.setdefault((g, "receive", source), []).append(message)
    sums = [torch.tensor([float(comm.rank + i)]) for i in range(3)]
    started = [comm.world.all_reduce(value, label=f"sum {i}") for i, value in enumerate(sums)]
    open_: list[tuple[Any, torch.Tensor, int]] = []
    num_received, right = 0, True
    while lines or open_:
        # Whoever waits for a message with earlier ones of its own unsent would make the list itself a deadlock.
        unsent = min((line[0][0] for (_, kind, _), line in lines.items() if kind == "send"), default=1000)
        ready = [entry for entry in open_ if entry[2] < unsent]
        if ready and (not lines or own.random() < 0.4):
            entry = own.choice(ready)
            open_ = [other for other in open_ if other is not entry]
            operation, out, number = entry
            operation.wait()
            num_received += 1
            right &= torch.equal(out, data(number, out.numel()))
        else:
            g, kind, source = own.choice(sorted(lines))
            number, numel, _, to = lines[g, kind, source].pop(0)
            if not lines[g, kind, source]:
                del lines[g, kind, source]
            if kind == "send":
                groups[g].send(data(number, numel), to, label=f"message {number}")
            else:
                out = torch.empty(numel)
                open_.append((groups[g].receive(out, source, label=f"message {number}"), out, number))
    for operation, value, i in zip(reversed(started), reversed(sums), (2, 1, 0), strict=True):
        operation.wait()
        right &= value.item() == sum(range(size)) + i * size
    return num_received, right


@pytest.mark.parametrize(("transport", "size"), WORLDS)
def test_edges_and_groups_keep_their_order_whatever_else_is_done_and_waited_for(transport: str, size: int) -> None:
    for num_received, right in run_world(size, random_traffic, 1, 2, 3, transport=transport):
        assert num_received > 60 and right


def far_ahead(comm: Comm) -> tuple[bool, list[int]]:
    """Let rank 0 send hundreds of messages before rank 1 wants the first, three times."""
    group, right, slots = comm.world, True, []
    numels = [10 if i % 2 else 2_000 + i for i in range(300)]
    for turn in range(3):
        if comm.rank == 0:
            for i, n in enumerate(numels):
                group.send(torch.full((n,), float(turn * 1000 + i)), [1])
        group.barrier("all are sent")
        if comm.rank == 1:
            outs = [torch.empty(n) for n in numels]
            for operation in [group.receive(out, 0) for out in outs]:
                operation.wait()
            right &= all((out == turn * 1000 + i).all() for i, out in enumerate(outs))
        group.barrier("all are received")
        if comm._world.mail is not None:
            slots.append(len(comm._world.mail.pool.slots))
            assert len(comm._world.mail.pool.slabs) < 50
    return bool(right), slots


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_hundreds_of_messages_may_wait_for_their_receiver_and_slots_are_used_again(transport: str) -> None:
    (_, slots), (right, _) = run_world(2, far_ahead, transport=transport)
    assert right
    if transport == "shm":
        assert 150 <= slots[0] < 400 and slots[1:] == slots[:1] * 2


def gone_quiet(comm: Comm, fifo: str) -> bool:
    if comm.rank == 0:
        for n in (100, 50_000):
            comm.world.send(torch.ones(n), [1])
        with open(fifo, "rb"):  # outside communication, until rank 1 has everything
            return True
    outs = [torch.zeros(100), torch.zeros(50_000)]
    for out in outs:
        comm.world.receive(out, 0).wait()
    with open(fifo, "wb"):
        return all(bool(out.all()) for out in outs)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_message_arrives_although_its_sender_never_communicates_again(transport: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "received")
    assert run_world(2, gone_quiet, str(tmp_path / "received"), transport=transport) == [True, True]


def leaves_a_message(comm: Comm) -> float:
    if comm.rank == 0:
        comm.world.send(torch.full((20_000,), 3.0), [1])
        return 0.0
    time.sleep(0.2)
    out = torch.empty(20_000)
    comm.world.receive(out, 0).wait()
    return out.sum().item()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_message_outlives_the_communication_of_its_sender(transport: str) -> None:
    assert run_world(2, leaves_a_message, transport=transport) == [0.0, 60_000.0]


def one_slot_for_all(comm: Comm) -> int:
    group, out = comm.world, torch.empty(10_000)
    for turn in range(20):
        if group.rank == 0:
            group.send(torch.full((10_000,), float(turn)), [1, 2, 3]).wait()
        else:
            group.receive(out, 0).wait()
            assert (out == turn).all()
        group.barrier("received by all")
    mail = comm._world.mail
    assert mail is not None
    return sum(slab.memory.numel() for slab in mail.pool.slabs)


def test_receivers_of_one_message_share_its_memory() -> None:
    assert run_world(4, one_slot_for_all, transport="shm") == [40_960, 0, 0, 0]


def driven_while_blocked(comm: Comm) -> float:
    total, out = torch.ones(100_000), torch.zeros(1)
    pending = comm.world.all_reduce(total, label="large")
    if comm.rank == 0:
        comm.world.receive(out, 1).wait()  # rank 1 sends it when the sum is complete, which takes rank 0
        pending.wait()
    else:
        pending.wait()
        comm.world.send(total[:1], [0])
    return total.sum().item() + out.item()


def test_a_rank_that_waits_for_a_message_goes_on_with_its_collectives() -> None:
    assert run_world(2, driven_while_blocked, transport="shm") == [200_002.0, 200_000.0]


SIDES = {
    "label": (("F 3", 10, torch.float32), ("F 4", 10, torch.float32)),
    "size": (("F 3", 10, torch.float32), ("F 3", 12, torch.float32)),
    "large": (("F 3", 90_000, torch.float32), ("F 3", 90_001, torch.float32)),
    "format": (("F 3", 10, torch.float32), ("F 3", 10, torch.bfloat16)),
}


def misfit(comm: Comm, what: str) -> str:
    label, numel, dtype = SIDES[what][comm.rank]
    pair = comm.group([0, 1], "pp F")
    if comm.rank == 0:
        pair.send(torch.zeros(numel, dtype=dtype), [1], label=label)
    with pytest.raises(CommError) as caught:
        if comm.rank == 1:
            pair.receive(torch.zeros(numel, dtype=dtype), 0, label=label).wait()
        comm.world.barrier("after")
    return str(caught.value)


@pytest.mark.parametrize("what", SIDES)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_message_that_does_not_fit_is_an_error_that_names_both_sides(transport: str, what: str) -> None:
    sender, receiver = outcomes(2, misfit, what, transport=transport)
    words = [f"'{label}' ({numel} x {str(dtype)[6:]})" for label, numel, dtype in SIDES[what]]
    for outcome in (receiver, sender) if transport == "shm" else (receiver,):
        assert outcome.error is None, outcome.text
        assert f"group 'pp F': rank 0 sent {words[0]}, rank 1 wants {words[1]} next" in outcome.value
    assert sender.error is None and ("rank 0 sent" in sender.value or "lost rank 1" in sender.value), sender.text


def killed_sender(comm: Comm, fifo: str) -> tuple[float, str]:
    out, keeps = torch.zeros(30_000), comm.world.transport == "shm"  # what was sent before the end of its sender
    if comm.rank == 1:
        if keeps:
            comm.world.send(torch.ones(30_000), [0], label="first")
        with open(fifo, "wb"):
            os.kill(os.getpid(), signal.SIGKILL)
    with open(fifo, "rb") as end:
        end.read()  # until rank 1 has died
    if keeps:
        comm.world.receive(out, 1, label="first").wait()
        assert out.all()
    start = time.monotonic()
    with pytest.raises(CommError) as caught:
        comm.world.receive(out, 1, label="second").wait()
    with pytest.raises(CommError):
        comm.world.barrier("afterwards")
    return time.monotonic() - start, str(caught.value)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_killed_sender_is_reported_at_once_with_its_rank_and_the_message(transport: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "dead")
    first, second = outcomes(2, killed_sender, str(tmp_path / "dead"), transport=transport)
    assert "SIGKILL" in str(second.error)
    assert first.error is None, first.text
    waited_s, message = first.value
    assert waited_s < COMM_S / 2 and "lost rank 1 in receive 'second'" in message


def killed_receiver(comm: Comm, fifo: str) -> str:
    if comm.rank == 1:
        with open(fifo, "wb"):
            os.kill(os.getpid(), signal.SIGKILL)
    with open(fifo, "rb") as end:
        end.read()  # until rank 1 has died
    with pytest.raises(CommError) as caught:
        for _ in range(3000):
            comm.world.send(torch.ones(5_000), [1], label="output")
            time.sleep(0.01)
    return str(caught.value)


def test_a_rank_that_only_sends_notices_that_its_receiver_was_killed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "dead")
    first, _ = outcomes(2, killed_receiver, str(tmp_path / "dead"), transport="shm")
    assert first.error is None, first.text
    assert "lost rank 1 in send 'output'" in first.value


def waits_for_nobody(comm: Comm, fifo: str) -> str:
    if comm.rank == 1:
        with open(fifo, "rb"):  # until rank 0 has given up
            return ""
    give_up_after(comm, 1.0)
    with pytest.raises(CommError) as caught:
        comm.world.receive(torch.zeros(1), 1, label="F 0").wait()
    with open(fifo, "wb"):
        return str(caught.value)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_timeout_names_the_message_and_the_rank_that_did_not_send_it(transport: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "given-up")
    message, _ = run_world(2, waits_for_nobody, str(tmp_path / "given-up"), transport=transport)
    assert "s in receive 'F 0' (op 1)" in message and "for rank 1, which did not come" in message


def counted(comm: Comm) -> tuple[list[dict[str, Any]], list[str]]:
    comm.tracer.enabled = True
    group = comm.group([0, 1, 2, 3], "pp X")
    if group.rank == 0:
        group.send(torch.zeros(10), [1, 3], tag="hidden", label="X 0")
    elif group.rank != 2:
        group.receive(torch.zeros(10), 0, tag="hidden", label="X 0").wait()
    return comm.ledger.rows(), [e.name for e in comm.tracer.events if e.phase == "X" and e.lane == "comm"]


def test_messages_are_counted_and_drawn_on_both_sides() -> None:
    (sent, names), (received, others), *_ = run_world(4, counted, transport="shm")
    row = {"group": "pp X", "tag": "hidden", "calls": 1}
    assert sent == [{**row, "kind": "send", "elements": 20, "payload_bytes": 80, "wire_bytes": 0}]
    assert received == [{**row, "kind": "receive", "elements": 10, "payload_bytes": 40, "wire_bytes": 40}]
    assert "start send X 0" in names and {"start receive X 0", "receive X 0"} <= set(others)


def refusals(comm: Comm) -> list[str]:
    group, alone = comm.world, comm.group([comm.rank], "alone")
    values, me, other = torch.zeros(4, 4), comm.rank, 1 - comm.rank
    attempts = [
        lambda: group.send(values, [me]),
        lambda: group.send(values, []),
        lambda: group.send(values, [other, other]),
        lambda: group.receive(values, 2),
        lambda: group.receive(values, me),
        lambda: group.send(values[:, ::2], [other]),
        lambda: group.receive(values[:, ::2], other),
        lambda: alone.send(values, [0]),
        lambda: alone.receive(values, 0),
    ]
    messages = []
    for attempt in attempts:
        with pytest.raises(CommError) as caught:
            attempt()
        messages.append(str(caught.value))
    group.connect([(0, 1), (1, 0)])
    sent, received = group.send(values, [other]), group.receive(values, other)
    received.wait()
    sent.wait()
    with pytest.raises(CommError, match="twice"):
        sent.wait()
    with pytest.raises(CommError, match="twice"):
        received.wait()
    return messages


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_wrong_use_is_refused_on_the_spot_and_the_edges_stay_usable(transport: str) -> None:
    for messages in run_world(2, refusals, transport=transport):
        words = ["distinct indices below 2 of other ranks"] * 5 + ["not contiguous"] * 2 + ["alone in its group"] * 2
        assert all(word in message for word, message in zip(words, messages, strict=True)), messages


def half_private(comm: Comm) -> None:
    comm.group([0, 1], "pp F", private=comm.rank == 0)


def test_ranks_must_agree_that_a_group_is_private() -> None:
    for outcome in outcomes(2, half_private, transport="shm"):
        assert "'group pp F (private)'" in str(outcome.error) and "'group pp F'" in str(outcome.error)


def over_lanes(comm: Comm) -> tuple[bool, str]:
    """Run the NCCL channel's messages on process groups of gloo, which take the same calls."""
    ranks, world = tuple(range(comm.size)), comm._world
    lanes = world._new_group(ranks), world._new_group(ranks)
    channel = NcclChannel("pp F", ranks, comm.rank, None, lanes, torch.device("cpu"))
    everyone = [(i, j) for i in ranks for j in ranks if i != j]
    channel.connect(everyone)
    call, others, right = Call(1, "send", "values"), [i for i in ranks if i != comm.rank], True
    for n in (0, 1, 5_000):
        sent = channel.send(call, data(comm.rank, n), others)
        outs = {i: torch.empty(n) for i in others}
        for finish in [channel.receive(call, outs[i], i) for i in others]:
            finish()
        sent()
        right &= all(torch.equal(outs[i], data(i, n)) for i in others)
    with pytest.raises(CommError) as caught:
        NcclChannel("dp", ranks, comm.rank, None, None, torch.device("cpu")).send(call, torch.zeros(1), others)
    comm.world.barrier("done")
    return right, str(caught.value)


def test_messages_of_nccl_use_one_process_group_per_direction_and_refuse_to_share() -> None:
    for right, message in run_world(4, over_lanes, transport="group"):
        assert right and "Make the group with private=True" in message
