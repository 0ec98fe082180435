"""Counts of what passed the comm door: calls, elements and bytes by group, kind and tag.

Elements follow the ZeRO paper's accounting: an all-gather or a reduce-scatter counts the full tensor once, an
all-reduce twice, because it is one of each. Wire bytes are what one rank receives. Groups of one rank count nothing.
Must not know: transports.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Key(NamedTuple):
    """What is counted apart: a group, a kind of operation, and the caller's tag (param, grad, scalar)."""

    group: str
    kind: str
    tag: str


@dataclass
class Entry:
    """Totals of one key."""

    calls: int = 0
    elements: int = 0
    payload_bytes: int = 0
    wire_bytes: int = 0


class Ledger:
    """Totals of one rank since the start, or since `clear`."""

    def __init__(self) -> None:
        self.entries: dict[Key, Entry] = {}

    def add(self, key: Key, *, elements: int, element_bytes: int, wire_bytes: int) -> None:
        entry = self.entries.setdefault(key, Entry())
        entry.calls += 1
        entry.elements += elements
        entry.payload_bytes += elements * element_bytes
        entry.wire_bytes += wire_bytes

    def total(self, *, group: str | None = None, kind: str | None = None, tag: str | None = None) -> Entry:
        """Sum the entries that match (None matches all)."""
        out = Entry()
        for key, entry in self.entries.items():
            if group in (None, key.group) and kind in (None, key.kind) and tag in (None, key.tag):
                out.calls += entry.calls
                out.elements += entry.elements
                out.payload_bytes += entry.payload_bytes
                out.wire_bytes += entry.wire_bytes
        return out

    def clear(self) -> None:
        self.entries.clear()

    def rows(self) -> list[dict[str, str | int]]:
        """Return the entries as JSON-able rows."""
        return [{**key._asdict(), **vars(entry)} for key, entry in sorted(self.entries.items())]
