"""Looks at this machine for what a run needs: versions, devices, memory, limits, disk, ports, interfaces.

Nothing is changed and nothing is measured that takes time. Must not know: models, plans.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

import windlass
from windlass.dist import env
from windlass.dist.device import host_bytes, pick_device
from windlass.dist.errors import ConfigError
from windlass.launch.drives import IN_MEMORY, file_system, missing_folder, takes_direct

OK, WARNING, MISSING = "ok", "warning", "missing"
GIB = 2**30
REQUIRED = (
    ("torch", (2, 11)),
    ("numpy", ()),
    ("omegaconf", (2, 4)),
    ("pyarrow", ()),
    ("safetensors", ()),
    ("tokenizers", ()),
    ("transformers", ()),
    ("typer", ()),
    ("rich", ()),
    ("psutil", ()),
    ("xxhash", ()),
    ("zstandard", ()),
)
OPTIONAL = (
    ("tensorboard", "scalars for TensorBoard (metrics.tensorboard)"),
    ("ray", "windlass launch --ray"),
    ("deepspeed", "comparisons in benchmarks/"),
    ("pyeclib", "snapshot.redundancy=reed_solomon"),
    ("fsspec", "checkpoints in object stores (checkpoint.url)"),
)


@dataclass(frozen=True)
class Check:
    """One finding: ok, a warning, or something without which runs cannot work; and how to get it."""

    topic: str
    name: str
    status: str
    found: str
    remedy: str = ""


def examine(run_dir: str = "runs", nvme_paths: Sequence[str] = (), device: str = "auto") -> list[Check]:
    """Look at everything and return the findings in the order in which a reader wants them."""
    return [
        *_versions(),
        *_devices(device),
        *_memory(),
        *_limits(),
        _folder("disk", "run folder", run_dir),
        *(_drive(path) for path in nvme_paths),
        *_network(),
        *_optional(),
    ]


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _versions() -> list[Check]:
    python = platform.python_version()
    checks = [
        Check("versions", "windlass", OK, windlass.__version__),
        Check("versions", "python", OK, f"{python} ({sys.executable})")
        if sys.version_info >= (3, 10)
        else Check("versions", "python", MISSING, python, "needs Python 3.10 or later"),
    ]
    for package, least in REQUIRED:
        found, words = _installed(package), ".".join(map(str, least))
        if found is None:
            checks.append(Check("versions", package, MISSING, "not installed", f"pip install {package}"))
        elif tuple(int(n) for n in found.split("+")[0].split(".")[: len(least)]) < least:
            checks.append(Check("versions", package, MISSING, found, f"pip install '{package}>={words}'"))
        else:
            checks.append(Check("versions", package, OK, found))
    return checks


def _devices(wish: str) -> list[Check]:
    try:
        device = pick_device(wish)
    except ConfigError as error:
        return [Check("devices", "cuda", MISSING, str(error), "a torch with CUDA, from pytorch.org/get-started")]
    cores = Check("devices", "CPU cores", OK, f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}")
    if device.kind == "cuda":
        return [cores, Check("devices", "CUDA", OK, f"{device.name}, {device.total_bytes() / GIB:.0f} GiB")]
    if shutil.which("nvidia-smi"):
        remedy = "install a torch built for CUDA (pytorch.org/get-started)"
        return [cores, Check("devices", "CUDA", WARNING, "a driver is here, but torch sees no device", remedy)]
    return [cores, Check("devices", "CUDA", OK, "none: runs compute on the CPU")]


def _memory() -> list[Check]:
    free, total = psutil.virtual_memory().available, host_bytes()
    status = OK if free >= 2 * GIB else WARNING
    remedy = "" if status == OK else "end other programs; the quickstart needs about 2 GiB"
    checks = [Check("memory", "host", status, f"{free / GIB:.1f} GiB available of {total / GIB:.1f} GiB", remedy)]
    if hasattr(os, "memfd_create"):
        checks.append(Check("memory", "memfd", OK, "ranks of this host can share memory"))
    else:
        checks.append(Check("memory", "memfd", WARNING, "not offered by this system", "parallelism.transport=group"))
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return [*checks, Check("memory", "/dev/shm", WARNING, "missing", "needed by Ray and NCCL: mount a tmpfs on it")]
    size = shutil.disk_usage(shm)
    small = size.total < GIB
    remedy = "Ray and NCCL want 1 GiB or more: docker run --shm-size=2g" if small else ""
    found = f"{size.free / GIB:.1f} GiB free of {size.total / GIB:.1f} GiB"
    return [*checks, Check("memory", "/dev/shm", WARNING if small else OK, found, remedy)]


def _limits() -> list[Check]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    few = files != resource.RLIM_INFINITY and files < 4096
    little = locked != resource.RLIM_INFINITY and locked < GIB
    return [
        Check("limits", "open files", WARNING if few else OK, _limit(files), "ulimit -n 65536" if few else ""),
        # Only page-locked host memory (offloading, GPUs) is counted against it.
        Check(
            "limits",
            "locked memory",
            OK,
            _limit(locked, GIB, " GiB") + (" (offloading to the host wants more)" if little else ""),
        ),
    ]


def _limit(value: int, unit: int = 1, suffix: str = "") -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value / unit:.3g}{suffix}" if unit > 1 else str(value)


def _folder(topic: str, name: str, path: str) -> Check:
    folder = Path(path).absolute()
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if not there.is_dir():
        return Check(topic, name, MISSING, f"{there} is a file", "give another folder")
    if not os.access(there, os.W_OK):
        return Check(topic, name, MISSING, f"{there} cannot be written", f"chmod u+w {there}, or give another folder")
    usage = shutil.disk_usage(there)
    found = f"{usage.free / GIB:.1f} GiB free of {usage.total / GIB:.1f} GiB at {there}"
    if usage.free < GIB:
        return Check(topic, name, WARNING, found, "free some space: a checkpoint takes 12 bytes per parameter")
    return Check(topic, name, OK, found)


def _drive(path: str) -> Check:
    problem = missing_folder(path)
    if problem:
        return Check("disk", "NVMe", MISSING, f"{path}: {problem}", "correct cluster.nvme_paths, or mount the drive")
    check = _folder("disk", "NVMe", path)
    kind, direct = file_system(Path(path)), takes_direct(Path(path))
    found = f"{check.found}, {kind or 'unknown file system'}" + (", direct transfers" if direct else "")
    if check.status == OK and kind in IN_MEMORY:
        return replace(check, status=WARNING, found=found, remedy="this is host memory: give a folder on a drive")
    if check.status == OK and direct is False:
        remedy = "transfers go through the page cache and displace host memory: use ext4 or xfs"
        return replace(check, status=WARNING, found=found, remedy=remedy)
    return replace(check, found=found)


def _network() -> list[Check]:
    checks = []
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            checks.append(Check("network", "ports", OK, f"a free one can be bound (tried {listener.getsockname()[1]})"))
    except OSError as error:
        checks.append(Check("network", "ports", MISSING, f"cannot bind on 127.0.0.1: {error.strerror}", "allow it"))
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    addresses = {
        name: next((a.address for a in found if a.family == socket.AF_INET), None)
        for name, found in psutil.net_if_addrs().items()
        if name in up
    }
    usable = {name: address for name, address in addresses.items() if address}
    wish = env.get("GLOO_SOCKET_IFNAME")
    if wish and wish not in usable:
        remedy = f"unset it or use one of {', '.join(usable)}"
        return [*checks, Check("network", "interface", MISSING, f"GLOO_SOCKET_IFNAME={wish} is not up", remedy)]
    if not usable:
        return [*checks, Check("network", "interface", MISSING, "none is up", "ip link set lo up")]
    found = ", ".join(f"{name} {address}" for name, address in usable.items())
    return [*checks, Check("network", "interface", OK, f"{found}" + (f" (gloo uses {wish})" if wish else ""))]


def _optional() -> list[Check]:
    checks = []
    for package, purpose in OPTIONAL:
        found = _installed(package)
        remedy = "" if found else f"pip install {package}"
        checks.append(
            Check("optional", package, OK if found else WARNING, found or f"not installed: {purpose}", remedy)
        )
    if _installed("deepspeed") and not (shutil.which("g++") and shutil.which("ninja")):
        remedy = "apt-get install g++ ninja-build"
        checks.append(Check("optional", "compiler", WARNING, "deepspeed builds its operators on first use", remedy))
    return checks
