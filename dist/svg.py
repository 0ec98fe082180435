"""The shapes that pictures of timelines are made of, as SVG text: boxes, words, a time axis.

Beside `trace.py`, because both schedules of pipelines and lanes of tiers are drawn with it. Must not know: what is
drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape


def rect(x: float, y: float, width: float, height: float, colour: str) -> str:
    """Return a filled box. Units: pixels, from the top left corner"""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def text(x: float, y: float, words: str, anchor: str, colour: str) -> str:
    """Return words; `anchor` says which part of them is at x: start, middle or end."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'


def channels(colour: str) -> list[int]:
    """Return red, green and blue of '#rrggbb'."""
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def ink(colour: str) -> str:
    """Return black or white, whichever can be read on the colour."""
    red, green, blue = channels(colour)
    return "#1d1d1d" if 0.299 * red + 0.587 * green + 0.114 * blue > 150 else "#ffffff"


def time_unit(total_s: float) -> tuple[float, str]:
    """Return how many of the unit in which a duration reads best make a second, and its name."""
    return (1.0, "s") if total_s >= 1 else (1e3, "ms") if total_s >= 1e-3 else (1e6, "µs")


def axis(total: float, scale: float, left: float, y: float, unit: str = "") -> Iterator[str]:
    """Yield a time axis with ticks at round times, from `left` on; `unit` names one that is not seconds.

    Units:  `scale` pixels per unit of `total`
    """
    factor, name = (1.0, unit) if unit else time_unit(total)
    rough = total * factor / max(total * scale / 90, 1.0)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * s for s in (1, 2, 5, 10) if power * s >= rough)
    yield f'<line x1="{left}" x2="{left + total * scale:.2f}" y1="{y:.1f}" y2="{y:.1f}" stroke="#888"/>'
    for i in range(int(total * factor / step * (1 + 1e-9)) + 1):
        x = left + i * step / factor * scale
        yield f'<line x1="{x:.2f}" x2="{x:.2f}" y1="{y:.1f}" y2="{y + 4:.1f}" stroke="#888"/>'
        yield text(x, y + 16, f"{i * step:g}", "middle", "#555")
    yield text(left + total * scale + 10, y + 16, name, "start", "#555")
