"""Host memory and slabs: exact sizes, one holder at a time, first come first served, everything given back."""

import re
import threading
from concurrent.futures import Future

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from windlass.dist.device import Device
from windlass.dist.errors import OffloadError, TierOutOfMemory
from windlass.dist.trace import Tracer
from windlass.offload import slabs
from windlass.offload.lane import Lanes
from windlass.offload.ledger import Limit, TierLedger
from windlass.offload.slabs import HostMemory, Slab, SlabPool

GB = 10**9


def make_pool(count: int, slab_bytes: int = 4096, *, poison: bool = False) -> SlabPool:
    return SlabPool(HostMemory(TierLedger(), Device("cpu")), slab_bytes, count, "records", poison=poison)


class Refusing(Device):
    """A device whose driver locks only so many bytes."""

    limit = 0
    locked: list[int]

    def register(self, memory: torch.Tensor) -> str:
        if sum(self.locked) + memory.numel() > self.limit:
            return "out of memory (CUDA error 2)"
        self.locked.append(memory.numel())
        return ""

    def unregister(self, memory: torch.Tensor) -> None:
        self.locked.remove(memory.numel())


def refusing(limit: int) -> Refusing:
    device = Refusing("cuda")
    object.__setattr__(device, "limit", limit)
    object.__setattr__(device, "locked", [])
    return device


# -- host memory -----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 70_000), max_size=8))
def test_memory_comes_in_whole_pages_and_is_booked_exactly(sizes: list[int]) -> None:
    ledger = TierLedger()
    host = HostMemory(ledger, Device("cpu"))
    got = [host.allocate(size, "master", "a test") for size in sizes]
    for size, memory in zip(sizes, got, strict=True):
        assert memory.dtype == torch.uint8 and 0 <= memory.numel() - size < 4096 and memory.numel() % 4096 == 0
        assert memory.numel() == 0 or (memory.data_ptr() % 4096 == 0 and not memory.any())
    assert ledger.current("host") == sum(memory.numel() for memory in got)
    host.close()
    host.close()
    assert ledger.current("host") == 0
    for memory in got:
        memory.fill_(1)  # whoever still holds it may use it


def test_a_budget_refuses_memory_before_it_exists() -> None:
    ledger = TierLedger({"host": Limit(8192, "offload.host_bytes")})
    host = HostMemory(ledger, Device("cpu"))
    host.allocate(4096, "slab", "the first")
    with pytest.raises(TierOutOfMemory, match=r"the second asks for 8192 bytes.*offload.host_bytes to at least 12288"):
        host.allocate(5000, "slab", "the second")
    assert ledger.by_class("host") == {"slab": 4096}


def test_a_host_without_that_much_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = TierLedger()
    host = HostMemory(ledger, Device("cpu"))
    with pytest.raises(TierOutOfMemory, match=r"block 3 asks for \d+ bytes, this host has \d+ left. Lower offload"):
        host.allocate(1 << 50, "master", "block 3")
    monkeypatch.setattr(slabs, "available_host_bytes", lambda: 1 << 62)
    with pytest.raises(TierOutOfMemory, match=r"block 3 asks for \d+ bytes, which the kernel refuses: .*ulimit -v"):
        host.allocate(1 << 60, "master", "block 3")
    assert ledger.current("host") == 0


def test_memory_is_locked_at_its_exact_size_and_unlocked_at_the_end() -> None:
    device = refusing(GB)
    host = HostMemory(TierLedger(), device)
    host.allocate(5000, "slab", "a pool")
    host.allocate(12288, "master", "block 0")
    assert device.locked == [8192, 12288]
    host.close()
    assert device.locked == []


def test_ordinary_memory_is_used_with_one_warning_when_the_driver_refuses() -> None:
    warnings: list[str] = []
    ledger = TierLedger()
    host = HostMemory(ledger, refusing(8192), warn=warnings.append)
    for name in ("a", "b", "c"):
        host.allocate(8192, "slab", name).fill_(3)
    (text,) = warnings
    assert re.match(r"8192 bytes of host memory for b cannot be page-locked: out of memory \(CUDA error 2\)", text)
    assert "ulimit -l unlimited" in text and ledger.current("host") == 3 * 8192
    host.close()


def test_memory_that_must_be_locked_is_not_given_unlocked() -> None:
    ledger = TierLedger()
    host = HostMemory(ledger, refusing(0), require_pinned=True)
    with pytest.raises(OffloadError, match=r"4096 bytes of host memory for b cannot be page-locked.*ulimit -l"):
        host.allocate(1, "slab", "b")
    assert ledger.current("host") == 0


# -- slabs -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=60))
def test_a_slab_has_one_holder_and_who_asks_first_is_served_first(count: int, moves: list[tuple[bool, int]]) -> None:
    pool = make_pool(count, poison=True)
    turns: list[Future[Slab]] = []
    held: list[Slab] = []
    num_served = 0
    for give, which in moves:
        if give and held:
            slab = held.pop(which % len(held))
            assert bool((slab.bytes == slab.number + 1).all())  # nobody else has written to it
            slab.give()
        else:
            turns.append(pool.take(str(len(turns))))
        while num_served < len(turns) and turns[num_served].done():
            slab = turns[num_served].result()
            assert slab.label == str(num_served) and bool((slab.bytes == (0xFF, 0)[slab.bytes[0] == 0]).all())
            slab.bytes.fill_(slab.number + 1)
            held.append(slab)
            num_served += 1
        assert len(held) == min(count, len(held) + len(turns) - num_served)
        assert len({slab.bytes.data_ptr() for slab in held}) == len(held)
        assert not any(turn.done() for turn in turns[num_served:])
    if held:
        with pytest.raises(OffloadError, match=f"pool 'records': {len(held)} of {count} slabs are lent"):
            pool.check_balanced()
    while held:
        held.pop(0).give()
        while num_served < len(turns) and turns[num_served].done():
            held.append(turns[num_served].result())
            num_served += 1
    pool.check_balanced()
    assert num_served == len(turns)


def test_threads_never_share_a_slab() -> None:
    pool, wrong = make_pool(3), []
    lanes = Lanes(Tracer(), workers={"file read": 4})

    def work(turn: Future[Slab], stamp: int) -> None:
        slab = turn.result()
        slab.bytes.fill_(stamp)
        wrong.extend([stamp] if not bool((slab.bytes == stamp).all()) else [])
        slab.give()

    tasks = []
    for i in range(300):
        turn = pool.take(f"read {i}")
        tasks.append(lanes.submit("file read", lambda t=turn, s=i % 256: work(t, s), after=[turn]))  # type: ignore[misc]
    lanes.wait(lanes.all(tasks))
    assert not wrong
    pool.check_balanced()
    lanes.close()


def test_views_lie_inside_the_slab() -> None:
    slab = make_pool(2, slab_bytes=5000).take("blocks.0").result()
    assert slab.bytes.numel() == 8192
    slab.view(torch.float32, 10, 4096).fill_(1.0)
    assert slab.bytes[4096:4136].any() and not slab.bytes[4136:].any() and not slab.bytes[:4096].any()
    for numel, offset in ((2049, 0), (1, 8190), (1, -4), (1, 2)):
        with pytest.raises(OffloadError, match=r"must lie inside slab 0 for 'blocks.0' of 8192 bytes"):
            slab.view(torch.float32, numel, offset)


def test_a_slab_is_given_back_once_and_not_used_afterwards() -> None:
    pool = make_pool(1)
    slab = pool.take("blocks.0").result()
    slab.give()
    with pytest.raises(OffloadError, match=r"pool 'records': slab 0 for 'blocks.0' is given back twice"):
        slab.give()
    with pytest.raises(OffloadError, match="is used after it was given back"):
        slab.view(torch.float32, 1)
    pool.take("blocks.1").result().view(torch.float32, 1)


def test_a_poisoned_slab_reads_as_nan() -> None:
    pool = make_pool(1, poison=True)
    pool.take("first").result().give()
    again = pool.take("second").result()
    assert again.view(torch.float32, 1024).isnan().all() and again.view(torch.bfloat16, 2048).isnan().all()


def test_an_unbalanced_pool_says_who_holds_what_and_who_waits() -> None:
    pool = make_pool(2)
    first = pool.take("read blocks.3").result()
    pool.take("read blocks.2")
    waiting = pool.take("read blocks.1")
    with pytest.raises(OffloadError) as caught:
        pool.check_balanced()
    assert "2 of 2 slabs are lent at the end of the step, 0 may be" in str(caught.value)
    assert "slab 0 for 'read blocks.3', slab 1 for 'read blocks.2'; waiting: 'read blocks.1'" in str(caught.value)
    assert waiting.cancel()
    first.give()
    pool.check_balanced(kept=1)
    assert pool.take("read blocks.0").done()  # a turn that was cancelled is passed over


def test_a_wait_for_a_slab_ends_when_its_holder_fails() -> None:
    pool, lanes = make_pool(1), Lanes(Tracer(), watchdog_s=60)
    go = threading.Event()

    def broken() -> None:
        go.wait(60)
        raise OSError("no space left")

    lanes.submit("file write", broken, after=[pool.take("first")])
    threading.Timer(0.02, go.set).start()
    with pytest.raises(OSError, match="no space left"):
        lanes.wait(pool.take("second"))
    lanes.close()


def test_a_pool_has_slabs() -> None:
    with pytest.raises(OffloadError, match="0 slabs of 4096 bytes must be at least one of one byte"):
        make_pool(0)
