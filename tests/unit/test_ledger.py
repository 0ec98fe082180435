"""The byte ledger by tier and class of state."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from windlass.dist.errors import OffloadError, TierOutOfMemory
from windlass.offload.ledger import TIERS, Limit, TierLedger


def test_peak_of_a_tier_is_the_highest_total_not_the_sum_of_class_peaks() -> None:
    ledger = TierLedger()
    ledger.add("device", "param", 100)
    with ledger.hold("device", "activation", 50):
        assert ledger.current("device") == 150
    ledger.add("device", "grad", 30)
    assert ledger.current("device") == 130
    assert ledger.peak("device") == 150
    assert ledger.peak_by_class("device") == {"param": 100, "activation": 50, "grad": 30}
    assert ledger.by_class("device") == {"param": 100, "activation": 0, "grad": 30}


def test_freeing_more_than_was_booked_is_an_error_and_changes_nothing() -> None:
    ledger = TierLedger()
    ledger.add("host", "master", 10)
    with pytest.raises(OffloadError, match="11 bytes of 'master' freed on tier 'host', 10 are there"):
        ledger.drop("host", "master", 11)
    assert ledger.current("host") == 10


def test_an_unknown_tier_is_named() -> None:
    with pytest.raises(OffloadError, match="'tape' is none of device, host, nvme"):
        TierLedger().add("tape", "param", 1)


def test_a_hold_ends_when_its_block_raises() -> None:
    ledger = TierLedger()
    with pytest.raises(KeyError), ledger.hold("nvme", "master", 8):
        raise KeyError("x")
    assert ledger.current("nvme") == 0
    assert ledger.peak("nvme") == 8


def test_a_move_counts_in_both_tiers_for_a_moment() -> None:
    ledger = TierLedger()
    ledger.add("device", "master", 8)
    ledger.move("device", "host", "master", 8)
    assert (ledger.current("device"), ledger.current("host")) == (0, 8)
    assert (ledger.peak("device"), ledger.peak("host")) == (8, 8)


def test_recording_sets_the_balance_and_resetting_peaks_starts_from_it() -> None:
    ledger = TierLedger()
    ledger.record("device", "buffers", 40)
    ledger.record("device", "buffers", 15)
    assert (ledger.current("device"), ledger.peak("device")) == (15, 40)
    ledger.reset_peaks()
    assert ledger.peak("device") == 15
    assert ledger.peak_by_class("device") == {"buffers": 15}


@given(st.lists(st.tuples(st.sampled_from(TIERS), st.sampled_from(["param", "grad"]), st.integers(0, 99)), max_size=30))
def test_balances_are_sums_and_peaks_are_maxima_of_any_history(history: list[tuple[str, str, int]]) -> None:
    ledger = TierLedger()
    balance: dict[tuple[str, str], int] = {}
    peak = dict.fromkeys(TIERS, 0)
    for n, (tier, state, num_bytes) in enumerate(history):
        held = balance.get((tier, state), 0)
        change = -min(held, num_bytes) if n % 3 == 2 else num_bytes
        ledger.add(tier, state, change)
        balance[tier, state] = held + change
        peak[tier] = max(peak[tier], sum(b for (t, _), b in balance.items() if t == tier))
    for tier in TIERS:
        assert ledger.current(tier) == sum(b for (t, _), b in balance.items() if t == tier)
        assert ledger.peak(tier) == peak[tier]


def test_a_refusal_names_who_asked_what_is_held_and_the_value_that_works() -> None:
    ledger = TierLedger({"host": Limit(1000, "offload.host_bytes")})
    ledger.add("host", "grad", 100)
    ledger.add("host", "master", 600, "blocks.0")
    with pytest.raises(TierOutOfMemory) as caught:
        ledger.add("host", "exp_avg", 500, "blocks.1")
    assert str(caught.value) == (
        "tier 'host': blocks.1 asks for 500 bytes of 'exp_avg'; of 1000 bytes 700 are in use (master 600, grad 100) "
        "and 300 left. Set offload.host_bytes to at least 1200, or move a class of state to another tier"
    )
    assert ledger.current("host") == 700 and ledger.peak("host") == 700 and ledger.left("host") == 300
    ledger.add("device", "param", 10**15)
    assert ledger.left("device") is None
    with pytest.raises(OffloadError, match="tier 'tape' has a limit but is none of device, host, nvme"):
        TierLedger({"tape": Limit(1, "offload.tape_bytes")})


def test_a_move_that_does_not_fit_or_is_not_there_books_nothing() -> None:
    ledger = TierLedger({"host": Limit(10, "offload.host_bytes")})
    ledger.add("device", "master", 20)
    with pytest.raises(TierOutOfMemory, match="asks for 20 bytes"):
        ledger.move("device", "host", "master", 20)
    with pytest.raises(OffloadError, match="freed on tier 'device'"):
        ledger.move("device", "nvme", "master", 21)
    assert [ledger.current(tier) for tier in TIERS] == [20, 0, 0] and ledger.peak("nvme") == 0


@given(
    st.dictionaries(st.sampled_from(TIERS), st.integers(0, 300)),
    st.lists(st.tuples(st.sampled_from(TIERS), st.sampled_from(["a", "b"]), st.integers(-100, 100)), max_size=60),
)
def test_no_trace_of_bookings_goes_over_a_budget(limits: dict[str, int], changes: list[tuple[str, str, int]]) -> None:
    ledger = TierLedger({tier: Limit(size, f"offload.{tier}_bytes") for tier, size in limits.items()})
    for tier, state, change in changes:
        before = [ledger.by_class(t) for t in TIERS]
        total, held = ledger.current(tier), ledger.by_class(tier).get(state, 0)
        fits = held + change >= 0 and (change <= 0 or total + change <= limits.get(tier, 10**9))
        if fits:
            ledger.add(tier, state, change)
        else:
            with pytest.raises(OffloadError):
                ledger.add(tier, state, change)
            assert [ledger.by_class(t) for t in TIERS] == before
        assert all(ledger.peak(t) <= size for t, size in limits.items())


def test_bookings_of_many_threads_add_up() -> None:
    ledger = TierLedger({"host": Limit(10**9, "offload.host_bytes")})

    def work() -> None:
        for _ in range(300):
            with ledger.hold("host", "slab", 3):
                ledger.add("host", "grad", 1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.by_class("host") == {"slab": 0, "grad": 1200} and ledger.peak("host") <= 1212
