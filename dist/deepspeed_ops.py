"""DeepSpeed's C++ operators: loads one by name, and says at once why it cannot be loaded.

They are compiled on first use, which takes minutes, ends in an error about something else when a tool is missing, and
waits for ever behind the lock of a build that was killed: so all of that is looked at before. DeepSpeed is imported
when an operator is asked for and never otherwise. Must not know: what the operators do.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sysconfig
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from windlass.dist import env
from windlass.dist.errors import OffloadError

BUILDERS = {"cpu_adam": "CPUAdamBuilder", "async_io": "AsyncIOBuilder", "gds": "GDSBuilder"}


def load_op(name: str, asked_by: str, instead: str) -> Any:
    """Return the module of an operator, compiled if it is not yet. `asked_by` is the key with its value that wants it,
    `instead` one that works without.

    Blocks:      host, minutes when it is compiled
    Raises:      OffloadError with the reason when it cannot be
    """
    problem = missing_for_op(name)
    if problem:
        raise OffloadError(f"{asked_by}: DeepSpeed's operator {name} cannot be built: {problem}, or use {instead}.")
    try:
        return _load(name)
    except (RuntimeError, ImportError, OSError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OffloadError(
            f"{asked_by}: DeepSpeed's operator {name} did not build or load: {reason} Run `ds_report` to see more, or "
            f"use {instead}."
        ) from error


def missing_for_op(name: str) -> str | None:
    """Say what is missing to build an operator and how to get it; None if nothing is. Takes milliseconds."""
    package = find_spec("deepspeed")
    if package is None or not package.submodule_search_locations:
        return "deepspeed is not installed. pip install deepspeed"
    if any(Path(package.submodule_search_locations[0], "ops").rglob(f"{name}_op*.so")):
        return None  # compiled when DeepSpeed was installed
    compiler = env.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"no compiler {compiler} on PATH. apt-get install g++"
    if shutil.which("ninja") is None:
        return "no ninja on PATH. apt-get install ninja-build, or pip install ninja and activate its environment"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        return f"no {header}. Install the headers of this Python (apt-get install python3-dev)"
    lock = _build_folder(name) / "lock"
    if _is_abandoned(lock):
        return f"a build of it was killed and left {lock}, which no process holds any more. Remove that file"
    return None


@lru_cache(maxsize=len(BUILDERS))
def _load(name: str) -> Any:
    return getattr(importlib.import_module("deepspeed.ops.op_builder"), BUILDERS[name])().load(verbose=False)


def _build_folder(name: str) -> Path:
    from torch.utils import cpp_extension

    return Path(cpp_extension._get_build_directory(name, verbose=False))


def _is_abandoned(lock: Path) -> bool:
    """Whether a lock of torch's is there that no process has open; its builder keeps it open while it works."""
    try:
        owner = lock.stat().st_uid
    except FileNotFoundError:
        return False
    if os.geteuid() not in (0, owner):
        return False  # what other users' processes have open cannot be seen
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            held = any(os.path.samefile(fd, lock) for fd in folder.iterdir() if os.path.exists(fd))
        except OSError:
            continue  # ended while being looked at, or another user's
        if held:
            return False
    return lock.exists()
