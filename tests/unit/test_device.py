"""The device face and the facts about this machine, on the CPU."""

import itertools
import mmap
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from windlass.dist import device as device_module
from windlass.dist.cluster import ClusterConfig, detect_cluster
from windlass.dist.device import Device, available_host_bytes, host_bytes, measured_flops, pick_device
from windlass.dist.errors import ConfigError, OffloadError


def test_the_cpu_reports_memory_and_its_peak() -> None:
    device = pick_device("cpu", 3)
    assert device == Device("cpu") and device.torch_device == torch.device("cpu") and device.name
    device.reset_peak()
    before = device.memory_bytes()
    with mmap.mmap(-1, 32 << 20) as fresh:  # torch might reuse what another test has freed
        fresh.write(b"x" * (32 << 20))
        assert device.memory_bytes() > before + (24 << 20)
    assert device.peak_bytes() > before + (24 << 20) and device.total_bytes() == host_bytes() > device.peak_bytes()
    device.synchronize()


def test_flops_are_measured_once_per_format(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    measured_flops.cache_clear()
    with monkeypatch.context() as patch:  # a millisecond between two looks at the clock, however busy the machine
        patch.setattr("windlass.dist.device.time", SimpleNamespace(perf_counter=lambda: next(ticks) / 1000))
        found = Device("cpu").peak_flops(torch.float32)
        looks = next(ticks)
        assert found == pytest.approx(2 * 1024**3 / 0.001)
        assert Device("cpu").peak_flops(torch.float32) == found and next(ticks) == looks + 1
    measured_flops.cache_clear()


def test_memory_for_transfers_is_ordinary_without_an_accelerator() -> None:
    buffer = Device("cpu").empty_pinned(10, torch.bfloat16)
    assert buffer.shape == (10,) and buffer.dtype == torch.bfloat16 and not buffer.is_pinned()


def test_a_wish_that_cannot_be_met_says_what_can() -> None:
    with pytest.raises(ConfigError, match="must be one of auto, cpu, cuda"):
        pick_device("tpu")
    beyond = torch.cuda.device_count()
    with pytest.raises(ConfigError, match=f"needs CUDA device {beyond}, this host has {beyond}.*train.device=cpu"):
        pick_device("cuda", beyond)


def test_the_table_of_gpus_tells_similar_names_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def flops(name: str, dtype: torch.dtype) -> float:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
        return Device("cuda").peak_flops(dtype) / 1e12

    assert flops("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989 and flops("NVIDIA H100 PCIe", torch.bfloat16) == 756
    assert flops("NVIDIA H200", torch.float32) == 67 and flops("NVIDIA A100-SXM4-80GB", torch.bfloat16) == 312
    assert flops("NVIDIA L40S", torch.bfloat16) == 362 and flops("NVIDIA L4", torch.bfloat16) == 121
    assert flops("NVIDIA B200", torch.bfloat16) == 2250 and flops("NVIDIA A10G", torch.bfloat16) == 125
    assert flops("Something else", torch.bfloat16) == 0


def test_given_cluster_facts_win_over_detected_ones() -> None:
    found = detect_cluster("cpu")
    assert (
        found.nodes == 1
        and found.devices_per_node >= 1
        and found.device_bytes * found.devices_per_node <= found.host_bytes
    )
    given = ClusterConfig(nodes=8, device_bytes=80 << 30).completed("cpu")
    assert (given.nodes, given.device_bytes, given.host_bytes) == (8, 80 << 30, found.host_bytes)


# -- copies and page-locked memory -----------------------------------------------------------------------------------


def test_on_the_cpu_a_copy_is_a_copy_and_nothing_is_locked() -> None:
    device, target, source = Device("cpu"), torch.zeros(5), torch.arange(5.0)
    device.copy(target, source, device.mark())
    assert torch.equal(target, source) and device.mark() is None
    assert device.register(target) == "" and available_host_bytes() > 0
    device.unregister(target)


class FakeCuda:
    """Stands for torch.cuda: writes down what is asked of streams and events."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        fake, self.codes = self, {"cudaHostRegister": 0, "cudaHostUnregister": 0}

        class Event:
            def __init__(self, blocking: bool = False) -> None:
                self.name = "blocking event" if blocking else "mark"

            def record(self, stream: Any) -> None:
                fake.calls.append(f"{stream.name} records {self.name}")

            def synchronize(self) -> None:
                fake.calls.append(f"host waits for {self.name}")

        def stream(name: str) -> Any:
            return SimpleNamespace(name=name, wait_event=lambda e: fake.calls.append(f"{name} waits for {e.name}"))

        def call(name: str, *args: Any) -> int:
            fake.calls.append(name)
            return fake.codes[name]

        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "Stream", lambda index: stream(f"side stream of {index}"))
        patch.setattr(torch.cuda, "current_stream", lambda index: stream("compute"))
        patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        patch.setattr(torch.cuda, "device", lambda index: nullcontext())
        patch.setattr(torch.cuda, "init", lambda: None)
        runtime = {name: lambda *args, n=name: call(n, *args) for name in self.codes}
        patch.setattr(
            torch.cuda, "cudart", lambda: SimpleNamespace(cudaGetErrorString=lambda c: "out of memory", **runtime)
        )
        patch.setattr(torch, "zeros", lambda *_, device: fake.calls.append(f"zeros on {device}"))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    device_module._copy_stream.cache_clear()
    yield FakeCuda(monkeypatch)
    device_module._copy_stream.cache_clear()


def test_a_copy_waits_for_the_mark_on_its_own_stream_and_the_thread_for_the_copy(cuda: FakeCuda) -> None:
    device, host, remote = Device("cuda", 1), torch.ones(4), torch.ones(4, device="meta")
    device.copy(remote, host, device.mark())
    device.copy(remote, host)
    assert cuda.calls == [
        "compute records mark",
        "side stream of 1 waits for mark",
        "side stream of 1 records blocking event",
        "host waits for blocking event",
        "side stream of 1 records blocking event",
        "host waits for blocking event",
    ]
    assert device_module._copy_stream.cache_info().currsize == 1
    cuda.calls.clear()
    target = torch.empty(4)
    device.copy(target, host, device.mark())
    assert cuda.calls == ["compute records mark", "host waits for mark"] and torch.equal(target, host)


def test_a_refusal_of_the_driver_is_told_and_does_not_linger(cuda: FakeCuda) -> None:
    device, memory = Device("cuda"), torch.ones(4)
    assert device.register(memory) == "" and cuda.calls == ["cudaHostRegister"]
    device.unregister(memory)
    cuda.codes = {"cudaHostRegister": 2, "cudaHostUnregister": 713}
    cuda.calls.clear()
    assert device.register(memory) == "out of memory (CUDA error 2)"
    assert cuda.calls == ["cudaHostRegister", "zeros on cuda:0"]
    with pytest.raises(OffloadError, match="4 elements of page-locked memory cannot be unlocked"):
        device.unregister(memory)
