"""Snapshots of state on one CUDA device: copied beside compute into page-locked slots. Skipped where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.snapshot_state import HeldState, capturer, hashed, mixed_tensors, same, slots, whole_steps
from windlass.checkpoint.memory.generators import freeze_rng, set_rng_state
from windlass.dist.device import pick_device

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("eager", [False, True])
def test_a_snapshot_holds_what_the_update_made_though_the_device_was_still_at_it(tmp_path, eager):
    device = pick_device("cuda", 0)
    weight = torch.full((1 << 22,), 1.0, device=device.torch_device)
    source = HeldState({"model.w": weight})
    taker = capturer(tmp_path, source, device=device, bucket_bytes=4 << 20)
    for step in (1, 2):
        for _ in range(50):  # the update is queued, not done
            weight.add_(1.0)
        assert taker.snapshot(step, {}, eager=eager)
        taker.gate()
        weight.add_(0.5)  # what follows the gate
    for slot in slots(taker.folder):
        hashed(slot)
    held = {step: found["model.w"].unique().tolist() for step, found in whole_steps(taker.folder).items()}
    assert held == {1: [51.0], 2: [101.5]} and not taker.warnings
    taker.close()


def test_parity_made_of_state_on_the_device_is_that_of_state_on_the_host(tmp_path):
    device, made = pick_device("cuda", 0), []
    for place in ("cpu", "cuda"):
        tensors = {key: tensor.to(place) for key, tensor in mixed_tensors().items()}
        options = {"device": device} if place == "cuda" else {}
        taker = capturer(tmp_path / place, HeldState(tensors, replicas=range(3)), 1, parity=True, **options)
        assert taker.snapshot(1, {})
        taker.gate()
        made.append([slots(taker.folder, role)[0].data.copy() for role in ("data", "parity")])
        hashed(slots(taker.folder)[0])
        mine = {key: tensor.cpu().reshape(-1) for key, tensor in tensors.items()}
        found = whole_steps(taker.folder)[1]
        assert not same(found, mine) and found.keys() < mine.keys()  # a third of it
        taker.close()
    assert all(np.array_equal(host, on_device) for host, on_device in zip(*made, strict=True))


def test_the_generator_of_the_device_goes_on_from_a_snapshot():
    device = pick_device("cuda", 0).torch_device
    torch.rand(5, device=device)
    state = freeze_rng()()
    first = torch.rand(5, device=device)
    set_rng_state(state)
    assert "accelerator" in state and torch.equal(torch.rand(5, device=device), first)
