"""Bytes by tier and class of state, now and at the peak: compared with the plan at the end of a run.

Whoever allocates or frees a long-lived buffer books it here; a tier with a budget refuses what does not fit. Must not
know: tensors, devices, ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock

from windlass.dist.errors import OffloadError, TierOutOfMemory

TIERS = ("device", "host", "nvme")


@dataclass(frozen=True)
class Limit:
    """The budget of a tier, and the configuration key that sets it. Units: bytes"""

    num_bytes: int
    key: str


class TierLedger:
    """Current and peak bytes for each (tier, class of state).

    Units:      bytes
    Invariant:  no balance is ever negative, no tier ever over its limit; `peak(tier)` is the highest total the tier
                ever had, which is less than the sum of the peaks of its classes when they did not peak together. Safe
                to use from any thread.
    """

    def __init__(self, limits: Mapping[str, Limit] | None = None) -> None:
        self.limits = dict(limits or {})
        unknown = sorted(set(self.limits) - set(TIERS))
        if unknown:
            raise OffloadError(f"ledger: tier '{unknown[0]}' has a limit but is none of {', '.join(TIERS)}")
        self._lock = RLock()  # `move` and `record` are one booking to others
        self._current: dict[tuple[str, str], int] = {}
        self._class_peak: dict[tuple[str, str], int] = {}
        self._tier_peak: dict[str, int] = dict.fromkeys(TIERS, 0)

    def add(self, tier: str, state: str, num_bytes: int, requester: str = "") -> None:
        """Book bytes that came into being (or, negative, ceased).

        Raises: OffloadError if the tier is unknown or more is freed than was booked; TierOutOfMemory if they are over
                the tier's limit. Nothing is booked then
        """
        if tier not in self._tier_peak:
            raise OffloadError(f"ledger: tier '{tier}' is none of {', '.join(TIERS)}")
        with self._lock:
            balance = self._current.get((tier, state), 0) + num_bytes
            if balance < 0:
                raise OffloadError(
                    f"ledger: {-num_bytes} bytes of '{state}' freed on tier '{tier}', {balance - num_bytes} are there"
                )
            total = self.current(tier) + num_bytes
            limit = self.limits.get(tier)
            if limit is not None and num_bytes > 0 and total > limit.num_bytes:
                raise TierOutOfMemory(self._refusal(tier, state, num_bytes, requester, limit))
            self._current[tier, state] = balance
            self._class_peak[tier, state] = max(self._class_peak.get((tier, state), 0), balance)
            self._tier_peak[tier] = max(self._tier_peak[tier], total)

    def drop(self, tier: str, state: str, num_bytes: int) -> None:
        """Book bytes that were freed."""
        self.add(tier, state, -num_bytes)

    def move(self, source: str, target: str, state: str, num_bytes: int, requester: str = "") -> None:
        """Book bytes that left one tier for another; for a moment both hold them, as the copy does.

        Raises: as `add`; nothing is booked then
        """
        with self._lock:
            if self._current.get((source, state), 0) < num_bytes:
                self.drop(source, state, num_bytes)
            self.add(target, state, num_bytes, requester)
            self.drop(source, state, num_bytes)

    def _refusal(self, tier: str, state: str, num_bytes: int, requester: str, limit: Limit) -> str:
        """Say who asked for how much of what, what is there, and which value would do."""
        held = sorted(self.by_class(tier).items(), key=lambda item: -item[1])
        listed = ", ".join(f"{name} {size}" for name, size in held if size) or "nothing"
        now = self.current(tier)
        return (
            f"tier '{tier}': {requester or state} asks for {num_bytes} bytes of '{state}'; of {limit.num_bytes} bytes "
            f"{now} are in use ({listed}) and {max(0, limit.num_bytes - now)} left. Set {limit.key} to at least "
            f"{now + num_bytes}, or move a class of state to another tier"
        )

    @contextmanager
    def hold(self, tier: str, state: str, num_bytes: int, requester: str = "") -> Iterator[None]:
        """Book bytes for the length of a `with` block."""
        self.add(tier, state, num_bytes, requester)
        try:
            yield
        finally:
            self.drop(tier, state, num_bytes)

    def record(self, tier: str, state: str, num_bytes: int) -> None:
        """Set a balance that is measured as a whole (buffers, resident memory) instead of booked piece by piece."""
        with self._lock:
            self.add(tier, state, num_bytes - self._current.get((tier, state), 0))

    def current(self, tier: str) -> int:
        with self._lock:
            return sum(num_bytes for (t, _), num_bytes in self._current.items() if t == tier)

    def left(self, tier: str) -> int | None:
        """Return the bytes that a tier has left, None if it has no limit."""
        limit = self.limits.get(tier)
        return None if limit is None else max(0, limit.num_bytes - self.current(tier))

    def peak(self, tier: str) -> int:
        return self._tier_peak[tier]

    def by_class(self, tier: str) -> Mapping[str, int]:
        """Return the current bytes of each class on a tier."""
        with self._lock:
            return {state: num_bytes for (t, state), num_bytes in self._current.items() if t == tier}

    def peak_by_class(self, tier: str) -> Mapping[str, int]:
        """Return the peak bytes of each class on a tier."""
        with self._lock:
            return {state: num_bytes for (t, state), num_bytes in self._class_peak.items() if t == tier}

    def reset_peaks(self) -> None:
        """Start the peaks again from the current balances."""
        with self._lock:
            for tier in TIERS:
                self._tier_peak[tier] = self.current(tier)
            self._class_peak.update(self._current)
