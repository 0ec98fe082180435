"""What a number was measured on."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def describe_machine() -> dict[str, str]:
    """Return the facts that a reader needs beside a number."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _first("/proc/cpuinfo", "model name"),
        "simd": ", ".join(simd()) or "none of note",
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{int(_first('/proc/meminfo', 'MemTotal').split()[0]) / 2**20:.1f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "deepspeed", "ray", "windlass")},
    }


def simd() -> list[str]:
    """Return the vector extensions of the CPU that decide how fast fp32 and bf16 are."""
    flags = _first("/proc/cpuinfo", "flags").split()
    return [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]


def has_bf16() -> bool:
    """Say whether the CPU multiplies bf16 matrices by instruction; without, they are many times slower than fp32."""
    return bool({"avx512_bf16", "amx_bf16"} & set(simd()))


def _first(path: str, key: str) -> str:
    for line in Path(path).read_text().splitlines():
        if line.startswith(key):
            return line.split(":", 1)[1].strip()
    return "?"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "source tree"
