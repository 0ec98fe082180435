"""Bytes by tier and class of state, now and at the peak: compared with the plan at the end of a run.

Whoever allocates or frees a long-lived buffer books it here. Must not know: tensors, devices, ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from windlass.dist.errors import OffloadError

TIERS = ("device", "host", "nvme")


class TierLedger:
    """Current and peak bytes for each (tier, class of state).

    Units:      bytes
    Invariant:  no balance is ever negative; `peak(tier)` is the highest total the tier ever had, which is less than the
                sum of the peaks of its classes when they did not peak together.
    """

    def __init__(self) -> None:
        self._current: dict[tuple[str, str], int] = defaultdict(int)
        self._class_peak: dict[tuple[str, str], int] = defaultdict(int)
        self._tier_peak: dict[str, int] = dict.fromkeys(TIERS, 0)

    def add(self, tier: str, state: str, num_bytes: int) -> None:
        """Book bytes that came into being (or, negative, ceased).

        Raises: OffloadError if the tier is unknown or more is freed than was booked.
        """
        if tier not in self._tier_peak:
            raise OffloadError(f"ledger: tier '{tier}' is none of {', '.join(TIERS)}")
        balance = self._current[tier, state] + num_bytes
        if balance < 0:
            raise OffloadError(
                f"ledger: {-num_bytes} bytes of '{state}' freed on tier '{tier}', {balance - num_bytes} are there"
            )
        self._current[tier, state] = balance
        self._class_peak[tier, state] = max(self._class_peak[tier, state], balance)
        self._tier_peak[tier] = max(self._tier_peak[tier], self.current(tier))

    def drop(self, tier: str, state: str, num_bytes: int) -> None:
        """Book bytes that were freed."""
        self.add(tier, state, -num_bytes)

    def move(self, source: str, target: str, state: str, num_bytes: int) -> None:
        """Book bytes that left one tier for another; for a moment both hold them, as the copy does."""
        self.add(target, state, num_bytes)
        self.drop(source, state, num_bytes)

    @contextmanager
    def hold(self, tier: str, state: str, num_bytes: int) -> Iterator[None]:
        """Book bytes for the length of a `with` block."""
        self.add(tier, state, num_bytes)
        try:
            yield
        finally:
            self.drop(tier, state, num_bytes)

    def record(self, tier: str, state: str, num_bytes: int) -> None:
        """Set a balance that is measured as a whole (buffers, resident memory) instead of booked piece by piece."""
        self.add(tier, state, num_bytes - self._current[tier, state])

    def current(self, tier: str) -> int:
        return sum(num_bytes for (t, _), num_bytes in self._current.items() if t == tier)

    def peak(self, tier: str) -> int:
        return self._tier_peak[tier]

    def by_class(self, tier: str) -> Mapping[str, int]:
        """Return the current bytes of each class on a tier."""
        return {state: num_bytes for (t, state), num_bytes in self._current.items() if t == tier}

    def peak_by_class(self, tier: str) -> Mapping[str, int]:
        """Return the peak bytes of each class on a tier."""
        return {state: num_bytes for (t, state), num_bytes in self._class_peak.items() if t == tier}

    def reset_peaks(self) -> None:
        """Start the peaks again from the current balances."""
        for tier in TIERS:
            self._tier_peak[tier] = self.current(tier)
        self._class_peak.update(self._current)
