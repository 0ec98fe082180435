"""Conformance of the comm door: one suite for every transport, against sums formed in plain Python order."""

from __future__ import annotations

import os
import random
import re
import threading
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import outcomes, run_world
from tests.waiting import until
from windlass.dist import group_transport
from windlass.dist.comm import Comm
from windlass.dist.errors import CommError

WORLDS = [("self", 1), ("shm", 2), ("shm", 4), ("group", 2), ("group", 4)]
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
SIZES = (0, 1, 777, 20_001)  # the last is beyond what travels inside messages, and odd
Results = dict[tuple[Any, ...], torch.Tensor]


def data(rank: int, numel: int, dtype: torch.dtype, salt: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * salt + rank)
    return (torch.randn(numel, generator=generator, dtype=torch.float64) * 3).to(dtype)


def ordered_sum(parts: list[torch.Tensor]) -> torch.Tensor:
    wide = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
    return reduce(lambda a, b: a + b, [p.to(wide) for p in parts])


def collectives(comm: Comm) -> Results:
    group, out = comm.world, {}
    for dtype in DTYPES:
        for n in SIZES:
            full = group.symmetric(n, dtype, full=True, name="full")
            shard = group.symmetric(n, dtype, full=False, name="shard")
            assert not full.tensor.any() and full.mine.numel() == n and shard.tensor.numel() == n

            full.tensor.copy_(data(comm.rank, n * group.size, dtype))
            for target in (dtype, torch.float32):
                result = torch.full((n,), 7, dtype=target)
                full.reduce_scatter(result, label="fresh").wait()
                out["reduce_scatter", dtype, n, target] = result.clone()
                full.reduce_scatter(result, accumulate=True, label="added").wait()
                out["accumulated", dtype, n, target] = result
            full.wait_free()
            full.reduce_scatter(full.mine, label="in place").wait()
            full.wait_free()
            full.all_gather(label="gather").wait()
            out["all_gather", dtype, n] = full.tensor.clone()

            shard.tensor.copy_(data(comm.rank, n, dtype))
            gathered = torch.full((n * group.size,), 7, dtype=dtype)
            shard.gather_into(gathered).wait()
            out["gather_into", dtype, n] = gathered

            for op in ("sum", "max", "min"):
                values = data(comm.rank, n * group.size, dtype).view(-1, 1)
                group.all_reduce(values, op=op, label=op).wait()
                out[op, dtype, n] = values.view(-1)
            values = data(comm.rank, n, dtype)
            group.broadcast(values, group.size - 1, label="last").wait()
            out["broadcast", dtype, n] = values
            full.wait_free()
            shard.wait_free()
    counts = torch.tensor([comm.rank, 2**53 + 1])
    group.all_reduce(counts, label="counts").wait()
    out["integers",] = counts
    return out


@pytest.mark.parametrize(("transport", "size"), WORLDS)
def test_every_collective_gives_bitwise_the_sums_in_rank_order(transport: str, size: int) -> None:
    by_rank = run_world(size, collectives, transport="auto" if transport == "self" else transport)
    for dtype in DTYPES:
        for n in SIZES:
            parts = [data(r, n * size, dtype) for r in range(size)]
            total = ordered_sum(parts)
            shards = [data(r, n, dtype) for r in range(size)]
            for rank, got in enumerate(by_rank):
                box = total[rank * n : (rank + 1) * n]
                for target in (dtype, torch.float32):
                    fresh = box.to(target)
                    added = (
                        (fresh.to(box.dtype) + box).to(target) if target != dtype or dtype != box.dtype else fresh + box
                    )
                    assert torch.equal(got["reduce_scatter", dtype, n, target], fresh)
                    assert torch.equal(got["accumulated", dtype, n, target], added)
                assert torch.equal(got["all_gather", dtype, n], total.to(dtype))
                assert torch.equal(got["sum", dtype, n], got["all_gather", dtype, n])
                assert torch.equal(got["max", dtype, n], torch.stack(parts).amax(0))
                assert torch.equal(got["min", dtype, n], torch.stack(parts).amin(0))
                assert torch.equal(got["gather_into", dtype, n], torch.cat(shards))
                assert torch.equal(got["broadcast", dtype, n], shards[-1])
    assert all(got["integers",].tolist() == [sum(range(size)), size * (2**53 + 1)] for got in by_rank)


def random_program(comm: Comm, seed: int, own_order: bool) -> list[bool]:
    """Start random operations on many buffers, wait in a random order (of each rank's own, if asked), check each."""
    group, pick = comm.world, random.Random(seed)
    own = random.Random(seed * 100 + comm.rank) if own_order else random.Random(seed)
    full = [group.symmetric(3000 + i, torch.float32, full=True, name=f"full {i}") for i in range(4)]
    shard = [group.symmetric(2000 + i, torch.float32, full=False, name=f"shard {i}") for i in range(3)]
    checks = []
    for turn in range(4):
        pending = []
        for i in pick.sample(range(9), 7):
            salt = 100 * turn + i
            if i < 4:
                buffer = full[i]
                buffer.wait_free()
                numel = buffer.tensor.numel()
                buffer.tensor.copy_(data(comm.rank, numel, torch.float32, salt))
                n = buffer.numel_per_rank
                total = ordered_sum([data(r, numel, torch.float32, salt) for r in range(group.size)])
                out = torch.empty(n)
                expected = total[comm.rank * n : (comm.rank + 1) * n]
                pending.append((buffer.reduce_scatter(out, label=f"turn {turn}"), out, expected))
            elif i < 7:
                buffer = shard[i - 4]
                buffer.wait_free()
                n = buffer.numel_per_rank
                buffer.tensor.copy_(data(comm.rank, n, torch.float32, salt))
                expected = torch.cat([data(r, n, torch.float32, salt) for r in range(group.size)])
                for _ in range(2):
                    out = torch.empty(n * group.size)
                    pending.append((buffer.gather_into(out, label=f"turn {turn}"), out, expected))
            else:
                numel = 10 if i == 7 else 9_001
                out = data(comm.rank, numel, torch.float32, salt)
                expected = ordered_sum([data(r, numel, torch.float32, salt) for r in range(group.size)])
                pending.append((group.all_reduce(out, label=f"sum {i}"), out, expected))
        own.shuffle(pending)
        for operation, out, expected in pending:
            operation.wait()
            checks.append(torch.equal(out, expected))
    return checks


@pytest.mark.parametrize(("transport", "size"), WORLDS)
@pytest.mark.parametrize("own_order", [False, True])
def test_many_operations_in_flight_may_be_waited_for_in_any_order(transport: str, size: int, own_order: bool) -> None:
    transport = "auto" if transport == "self" else transport
    for checks in run_world(size, random_program, 3 + size, own_order, transport=transport):
        assert len(checks) > 25 and all(checks)


def freed_while_the_peer_waits_elsewhere(comm: Comm) -> float:
    buffer = comm.world.symmetric(100_000, torch.float32, full=True, name="grad")
    buffer.tensor.fill_(comm.rank + 1)
    out = torch.empty(100_000)
    pending = buffer.reduce_scatter(out, label="grad")
    if comm.rank == 0:
        pending.wait()
        buffer.wait_free()  # rank 1 is blocked in the barrier and has not waited for its own half yet
        buffer.tensor.fill_(99)
        comm.world.barrier("after")
    else:
        comm.world.barrier("after")
        pending.wait()
    return float(out.sum())


@pytest.mark.parametrize("transport", ["shm", "group"])
def test_a_buffer_becomes_free_while_its_reader_is_blocked_elsewhere(transport: str) -> None:
    assert run_world(2, freed_while_the_peer_waits_elsewhere, transport=transport) == [300_000.0, 300_000.0]


def large_things(comm: Comm) -> tuple[bool, bool]:
    text = chr(ord("a") + comm.rank) * 600_000
    texts = comm.world.gather_objects(text)
    values = data(comm.rank, 600_000, torch.float32)
    total = values.clone()
    comm.world.all_reduce(total, label="large").wait()
    comm.world.broadcast(values, 1, label="large").wait()
    expected = [data(r, 600_000, torch.float32) for r in range(comm.size)]
    same = torch.equal(total, ordered_sum(expected)) and torch.equal(values, expected[1])
    return [t[:1] for t in texts] == list("abcd")[: comm.size] and len(texts[1]) == 600_000, same


@pytest.mark.parametrize(("transport", "size"), [("shm", 2), ("shm", 4), ("group", 2)])
def test_large_objects_and_tensors_pass_although_all_ranks_send_at_once(transport: str, size: int) -> None:
    assert run_world(size, large_things, transport=transport) == [(True, True)] * size


def groups(comm: Comm) -> tuple[Any, ...]:
    first = comm.rank // 2 * 2
    pair = comm.group([first, first + 1], "pair")
    stride = comm.group([comm.rank % 2, comm.rank % 2 + 2], "stride")
    alone = comm.group([comm.rank], "alone")
    values = [torch.tensor([float(comm.rank)]) for _ in range(3)]
    for group, value in zip((pair, stride, alone), values, strict=True):
        group.all_reduce(value, tag="scalar").wait()
    problem = ""
    if comm.rank < 4:
        try:
            comm.group([0, 1, 2] if comm.rank < 3 else [2, 3], "torn")
        except CommError as error:
            problem = str(error)
    return [v.item() for v in values], pair.rank, pair.ranks, [g.transport for g in (pair, alone)], problem


@pytest.mark.parametrize("transport", ["shm", "group"])
def test_groups_are_cut_from_the_world_and_must_not_overlap(transport: str) -> None:
    by_rank = run_world(4, groups, transport=transport)
    assert [sums for sums, *_ in by_rank] == [[1, 2, 0], [1, 4, 1], [5, 2, 2], [5, 4, 3]]
    assert [(rank, ranks) for _, rank, ranks, _, _ in by_rank] == [(0, (0, 1)), (1, (0, 1)), (0, (2, 3)), (1, (2, 3))]
    assert by_rank[0][3] == ["shm" if transport == "shm" else "gloo", "self"]
    assert all("group 'torn': rank" in problem and "asked for ranks" in problem for *_, problem in by_rank)


def ledger(comm: Comm) -> list[dict[str, Any]]:
    buffer = comm.world.symmetric(10, torch.float32, full=True, name="unit")
    buffer.reduce_scatter(buffer.mine, tag="grad").wait()
    buffer.all_gather(tag="param").wait()
    buffer.all_gather(tag="param").wait()
    shard = comm.world.symmetric(10, torch.bfloat16, full=False, name="shard")
    shard.gather_into(torch.empty(20, dtype=torch.bfloat16), tag="param").wait()
    comm.world.all_reduce(torch.zeros(6), tag="scalar").wait()
    comm.group([comm.rank], "alone").all_reduce(torch.zeros(6), tag="scalar").wait()
    return comm.ledger.rows()


@pytest.mark.parametrize("transport", ["shm", "group"])
def test_the_ledger_counts_elements_as_the_zero_paper_does_and_nothing_for_one_rank(transport: str) -> None:
    def row(kind: str, tag: str, *counts: int) -> dict[str, Any]:
        names = ("calls", "elements", "payload_bytes", "wire_bytes")
        return {"group": "world", "kind": kind, "tag": tag, **dict(zip(names, counts, strict=True))}

    for rows in run_world(2, ledger, transport=transport):
        assert rows == [
            row("all_gather", "param", 2, 40, 160, 80),
            row("all_reduce", "scalar", 1, 12, 48, 24),
            row("gather_into", "param", 1, 20, 40, 20),
            row("reduce_scatter", "grad", 1, 20, 80, 40),
        ]


def refusals(comm: Comm) -> list[str]:
    group = comm.world
    full = group.symmetric(4, torch.float32, full=True, name="full")
    shard = group.symmetric(4, torch.float32, full=False, name="shard")
    size, busy = group.size, full.all_gather(label="busy")
    attempts = [
        lambda: group.all_reduce(torch.zeros(4, 4)[:, ::2], label="strided"),
        lambda: group.broadcast(torch.zeros(4, 4).t()[1:], 0, label="strided"),
        lambda: full.all_gather(label="second"),
        lambda: shard.reduce_scatter(torch.zeros(4)),
        lambda: full.gather_into(torch.zeros(4 * size)),
        lambda: shard.gather_into(torch.zeros(4 * size + 1)),
        lambda: shard.gather_into(torch.zeros(4 * size, dtype=torch.float64)),
        lambda: shard.gather_into(torch.zeros(8 * size)[::2]),
        lambda: group.all_reduce(torch.zeros(1), op="mean"),
        lambda: group.broadcast(torch.zeros(1), size),
        lambda: group.symmetric(-1, torch.float32, full=True, name="negative"),
        lambda: comm.group([comm.rank, 99], "outside"),
        lambda: comm.group(range(comm.size)[::-1] if comm.size > 1 else [0, 0], "falling"),
    ]
    messages = []
    for attempt in attempts:
        with pytest.raises(CommError) as caught:
            attempt()
        messages.append(str(caught.value))
    busy.wait()
    with pytest.raises(CommError) as caught:
        busy.wait()
    group.barrier("still in step")
    return [*messages, str(caught.value)]


@pytest.mark.parametrize(("transport", "size"), WORLDS)
def test_wrong_use_is_refused_on_the_spot_and_the_world_stays_usable(transport: str, size: int) -> None:
    for messages in run_world(size, refusals, transport="auto" if transport == "self" else transport):
        words = ["not contiguous", "not contiguous", "'full' has an operation under way", "needs a full buffer"]
        words += ["needs a shard buffer", "elements, needs", "the shards are torch.float32", "contiguous"]
        words += [
            "one of sum, max, min",
            "must be an index below",
            "must not be negative",
            "include this one",
            "rising order",
            "twice",
        ]
        assert len(messages) == len(words)
        for message, word in zip(messages, words, strict=True):
            assert word in message


def test_auto_shares_memory_on_one_host_and_trace_and_last_op_name_what_was_done() -> None:
    for transport, lane, names, last in run_world(2, described):
        assert transport == "shm" and lane > 0
        assert {"start all_reduce norm", "all_reduce norm"} <= set(names)
        assert last == "all_reduce 'norm' (op 1) of group 'world': done"


def described(comm: Comm) -> tuple[str, float, list[str], str]:
    comm.tracer.enabled = True
    comm.world.all_reduce(torch.zeros(1), label="norm").wait()
    return comm.world.transport, comm.tracer.busy_s["comm"], [e.name for e in comm.tracer.events], str(comm.last_op)


def one_after_another(comm: Comm) -> int:
    buffer = comm.world.symmetric(5, torch.float32, full=True, name="unit")
    for _ in range(50):
        buffer.wait_free()
        buffer.reduce_scatter(buffer.mine).wait()
        comm.world.all_reduce(torch.zeros(1)).wait()
    buffer.wait_free()
    comm.world.barrier()
    hub = comm._world.hub
    assert hub is not None
    return len(hub.rounds) + len(hub.pending)


def test_nothing_is_kept_of_operations_that_every_rank_has_finished() -> None:
    assert all(kept <= 1 for kept in run_world(2, one_after_another, transport="shm"))  # 1: a peer's next good-bye


def dies_within_a_sum(comm: Comm) -> tuple[str, CommError | None]:
    victim = comm.world.gather_objects(os.getpid())[1]

    def combine(*args: Any) -> None:
        if comm.rank == 1:
            os._exit(9)
        until(lambda: not Path(f"/proc/{victim}").exists())

    with pytest.MonkeyPatch.context() as patch, pytest.raises(CommError) as caught:
        patch.setattr(group_transport, "combine", combine)
        comm.world.all_reduce(torch.ones(20_001), label="large").wait()  # large: a second round follows the sum
    return str(caught.value), comm._world.queue.broken


def test_a_peer_that_dies_between_two_rounds_is_a_lost_peer() -> None:
    first, second = outcomes(2, dies_within_a_sum, transport="group")
    assert "ended with exit code 9" in str(second.error)
    assert first.error is None, first.text
    message, broken = first.value
    assert "rank 0 lost rank 1 in all_reduce 'large'" in message and str(broken) == message


def test_of_several_peers_none_is_blamed_for_an_error_of_all() -> None:
    for outcome in outcomes(3, dies_within_a_sum, transport="group")[::2]:
        assert outcome.error is None, outcome.text
        message, broken = outcome.value
        assert re.search(rf"rank {outcome.rank} lost a peer \(while it dealt with rank \d\) in all_reduce", message)
        assert str(broken) == message


def hangs_on_rank_one(comm: Comm, ends: Path) -> str:
    first, _ = comm.world.gather_objects(os.getpid())
    if comm.rank == 1:
        until(lambda: not Path(f"/proc/{first}").exists())
        ends.touch()
        threading.Event().wait()
    return "fine"


def test_the_harness_shows_the_stacks_of_a_rank_that_hangs(tmp_path: Path) -> None:
    first, second = outcomes(2, hangs_on_rank_one, tmp_path / "ends", ends=tmp_path / "ends")
    assert first.value == "fine" and "still running at the deadline" in str(second.error)
    assert "in hangs_on_rank_one" in second.text


def test_the_harness_reports_the_first_cause_and_labels_every_rank() -> None:
    found = outcomes(2, fails_on_rank_one)
    assert [type(o.error).__name__ for o in found] == ["CommError", "ZeroDivisionError"]
    with pytest.raises(ZeroDivisionError) as caught:
        run_world(2, fails_on_rank_one)
    assert "--- rank 0 ---" in str(caught.value.__cause__) and "--- rank 1 ---" in str(caught.value.__cause__)


def fails_on_rank_one(comm: Comm) -> None:
    if comm.rank == 1:
        raise ZeroDivisionError("the cause")
    comm.world.barrier("never complete")
