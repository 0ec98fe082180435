"""Few cases in which every pair of choices comes up: what fails mostly needs two things to meet, seldom three."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any


def pairwise(choices: Mapping[str, Sequence[Any]], *, tries: int = 40) -> list[dict[str, Any]]:
    """Return cases, each with one of the choices per name, so that any two choices of two names meet in one of them.

    Source: the greedy construction of Cohen et al. 1997 (AETG), always with the same random numbers.
    """
    names, draw = list(choices), random.Random(0)
    pairs = combinations(names, 2)
    missing = {(a, i, b, j) for a, b in pairs for i in range(len(choices[a])) for j in range(len(choices[b]))}
    cases = []
    while missing:
        seeds = draw.sample(sorted(missing), min(tries, len(missing)))
        best: dict[str, int] = max(
            (_grown(choices, seed, missing, draw) for seed in seeds), key=lambda c: _new(c, missing)
        )
        missing -= _pairs(best, names)
        cases.append({name: choices[name][best[name]] for name in names})
    return cases


def _grown(
    choices: Mapping[str, Sequence[Any]], seed: tuple[str, int, str, int], missing: set[Any], draw: random.Random
) -> dict[str, int]:
    """Return a case around one missing pair that has many others in it."""
    case = {seed[0]: seed[1], seed[2]: seed[3]}
    left = [name for name in choices if name not in case]
    draw.shuffle(left)
    for name in left:
        values = list(range(len(choices[name])))
        draw.shuffle(values)
        case[name] = max(values, key=lambda value: _new({**case, name: value}, missing))
    return {name: case[name] for name in choices}


def _pairs(case: Mapping[str, int], names: Sequence[str]) -> set[tuple[str, int, str, int]]:
    there = [name for name in names if name in case]
    return {(a, case[a], b, case[b]) for a, b in combinations(there, 2)}


def _new(case: Mapping[str, int], missing: set[Any]) -> int:
    """Return how many missing pairs are in a case; names come in the order of `missing`'s."""
    return sum((a, i, b, j) in missing or (b, j, a, i) in missing for a, i, b, j in _pairs(case, list(case)))
