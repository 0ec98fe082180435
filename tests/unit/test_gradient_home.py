"""Where gradients rest: whoever waits for one to rest waits for all that is done about it."""

import threading
from types import SimpleNamespace
from typing import Any, cast

import torch

from windlass.dist.device import Device
from windlass.dist.trace import Tracer
from windlass.offload.lane import Lanes
from windlass.offload.machine import OffloadMachine, grad_key
from windlass.offload.placement import UnitPlacement
from windlass.offload.store import TensorStore
from windlass.parallel.gradient_home import GradientBuffers, LeavesDevice

NUMEL = 64


class HeldBuffer:
    """A buffer whose giver is held until it is let go."""

    def __init__(self) -> None:
        self.tensor = torch.arange(NUMEL, dtype=torch.float32)
        self.giving, self.let_go = threading.Event(), threading.Event()

    def view(self, dtype: torch.dtype, numel: int) -> torch.Tensor:
        return self.tensor.view(dtype)[:numel]

    def give(self) -> None:
        self.giving.set()
        assert self.let_go.wait(30)


def test_a_gradient_rests_when_its_buffer_has_been_given_back() -> None:
    lanes, buffer, rests = Lanes(Tracer()), HeldBuffer(), torch.zeros(NUMEL * 4, dtype=torch.uint8)
    store = TensorStore(lanes)
    store.add_host(grad_key("unit"), [rests])
    plan = SimpleNamespace(keeps_gradients=True)
    machine = cast(OffloadMachine, SimpleNamespace(lanes=lanes, store=store, plan=plan, device=Device("cpu")))
    pool: Any = SimpleNamespace(register=lambda numel: None, take=lambda numel, label: buffer)
    placement = cast(UnitPlacement, SimpleNamespace(name="unit", numel=NUMEL, chunks=()))
    home = LeavesDevice(placement, torch.float32, machine, cast(GradientBuffers, pool))
    try:
        home.take(accumulate=False)
        home.settled(last=True)
        assert buffer.giving.wait(30)
        assert torch.equal(rests.view(torch.float32), buffer.tensor)
        assert not home.rested().done()
        buffer.let_go.set()
        lanes.wait(home.rested())
        lanes.check_idle()
    finally:
        buffer.let_go.set()
        lanes.close()
