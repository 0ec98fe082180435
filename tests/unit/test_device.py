"""The device face and the facts about this machine, on the CPU."""

import mmap

import pytest
import torch

from windlass.dist.cluster import ClusterConfig, detect_cluster
from windlass.dist.device import Device, host_bytes, pick_device
from windlass.dist.errors import ConfigError


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


def test_flops_are_measured_once_per_format() -> None:
    device = Device("cpu")
    assert device.peak_flops(torch.float32) == device.peak_flops(torch.float32) > 1e8


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
