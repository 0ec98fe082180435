"""Random generators go on from a snapshot as if nothing had happened."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from windlass.checkpoint.memory.generators import freeze_rng, set_rng_state
from windlass.dist.errors import CheckpointError


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()]


def test_random_generators_go_on_where_the_snapshot_was_taken():
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    draw()
    state = json.loads(json.dumps(freeze_rng()()))
    first = draw() + draw()
    set_rng_state(state)
    assert draw() + draw() == first


@pytest.mark.parametrize("damage", [{"python": [3, "ab", None]}, {"torch": "zz"}, {"numpy": None}])
def test_a_damaged_state_of_random_generators_is_refused(damage):
    before = freeze_rng()()
    with pytest.raises(CheckpointError, match="random generators"):
        set_rng_state({**before, **damage})
    set_rng_state(before)
