"""The byte ledger by tier and class of state."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from windlass.dist.errors import OffloadError
from windlass.offload.ledger import TIERS, TierLedger


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
