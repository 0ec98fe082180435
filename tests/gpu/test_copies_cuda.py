"""Copies beside compute and page-locked memory on one CUDA device. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from windlass.dist.device import pick_device
from windlass.dist.trace import Tracer
from windlass.offload.lane import Lanes
from windlass.offload.ledger import TierLedger
from windlass.offload.slabs import HostMemory, SlabPool

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_host_memory_is_locked_at_its_exact_size_and_released() -> None:
    device, ledger = pick_device("cuda", 0), TierLedger()
    warnings: list[str] = []
    host = HostMemory(ledger, device, warn=warnings.append)
    memory = host.allocate(5000, "slab", "a test")
    assert memory.numel() == ledger.current("host") == 8192
    if not warnings:
        assert memory.is_pinned()
        assert "already" in device.register(memory)
        assert int(torch.ones(1, device=device.torch_device)) == 1  # the refusal does not come back
    host.close()
    assert not memory.is_pinned() and ledger.current("host") == 0


def test_lanes_carry_what_compute_has_produced_and_bring_it_back() -> None:
    device = pick_device("cuda", 0)
    host = HostMemory(TierLedger(), device)
    lanes, n = Lanes(Tracer(), prepare=device.use), 1 << 22
    pool = SlabPool(host, 4 * n, 2, "gradients")
    weight = torch.randn(2048, 2048, device=device.torch_device)
    for step in range(4):
        produced = weight
        for _ in range(10):  # still under way when the copy is asked for
            produced = produced @ weight / 45.0
        mark, slab = device.mark(), pool.take(f"step {step}").result()
        there = slab.view(torch.float32, n)
        out = lanes.submit("d2h", lambda t=there, p=produced, m=mark: device.copy(t, p.view(-1), m))  # type: ignore[misc]
        back = torch.empty(n, device=device.torch_device)
        mark = device.mark()
        lanes.wait(lanes.submit("h2d", lambda b=back, t=there, m=mark: device.copy(b, t, m), after=[out]))  # type: ignore[misc]
        assert torch.equal(back, produced.view(-1)) and torch.equal(there, produced.view(-1).cpu())
        slab.give()
    pool.check_balanced()
    lanes.close()
    host.close()
