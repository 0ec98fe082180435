"""What every head-to-head table needs: ratios within one round, losses that must agree, the file of all samples.

A sample is what one side measured in one round. The speed of a shared machine drifts, so two sides are compared within
a round only, and a ratio is the median of the ratios of all rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from machine import describe_machine


class Sample(Protocol):
    """One side in one round; a dataclass. Ratios read further fields by name."""

    @property
    def side(self) -> str: ...

    @property
    def round(self) -> int: ...

    @property
    def losses(self) -> list[float]: ...


def pick(text: str, known: Sequence[str], option: str) -> list[str]:
    """Return the comma-separated names of an option, or end the program if one of them is unknown."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"{option}: '{unknown[0]}' is unknown. Use some of: {', '.join(known)}")
    return names


def ratio(rows: Sequence[Sample], side: str, peers: Sequence[str], quantity: str) -> float | None:
    """Return the median over rounds of ours / the best peer's of the same round; None without peers."""
    ratios = []
    for number in {s.round for s in rows}:
        of_round = {s.side: getattr(s, quantity) for s in rows if s.round == number}
        theirs = [of_round[peer] for peer in peers if peer in of_round]
        if side in of_round and theirs:
            ratios.append(of_round[side] / min(theirs))
    return statistics.median(ratios) if ratios else None


def median(rows: Sequence[Sample], side: str, quantity: str) -> float:
    """Return the median of one side's quantity over rounds."""
    return statistics.median(getattr(s, quantity) for s in rows if s.side == side)


def disagreements(rows: Sequence[Sample], what: str, tolerance: float, alone: Sequence[str] = ()) -> list[str]:
    """Return which sides did not train the same model: first losses of all, last losses of those that communicate.

    `tolerance` is relative, `alone` are the sides that do not communicate.
    """
    out = []
    for which, index, skipped in (("first", 0, ()), ("last", -1, alone)):
        values = {s.side: s.losses[index] for s in rows if s.side not in skipped}
        middle = statistics.median(values.values()) if values else 0.0
        out += [
            f"{what} {side}: {which} loss {value:.6f} is not the others' {middle:.6f}"
            for side, value in values.items()
            if not abs(value - middle) <= tolerance * middle
        ]
    return out


def fixed(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def mib(num_bytes: float) -> float:
    return num_bytes / 2**20


def write(path: Path, given: argparse.Namespace, samples: Sequence[Any], failures: Mapping[str, str]) -> None:
    """Replace the JSON file by what is known so far."""
    document: dict[str, Any] = {
        "machine": describe_machine(),
        "options": {key: str(value) for key, value in vars(given).items()},
        "failures": dict(failures),
        "samples": [asdict(sample) for sample in samples],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(document, indent=1))
    draft.replace(path)
