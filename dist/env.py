"""The environment of this process: who am I among how many, and where do we meet. The only reader of os.environ.

Understood, in this order: RANK/WORLD_SIZE (torchrun, Ray actors, our local launcher), SLURM_* of a job step, nothing
(a world of one). WINDLASS_RENDEZVOUS=file:///path replaces MASTER_ADDR/MASTER_PORT where all ranks share a folder.
Fault injection for drills and tests is one variable, WINDLASS_FAULT, read at the doors through `fault`.
Must not know: devices, process groups, configuration.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from windlass.dist.errors import ConfigError, WorkerError

LAUNCHERS = ("local", "torchrun", "slurm", "ray", "none")
FAULT_ERRNOS = {"enospc": errno.ENOSPC, "eio": errno.EIO, "einval": errno.EINVAL}
FAULT_ACTIONS = ("raise", "kill", "hang", *FAULT_ERRNOS)


@dataclass(frozen=True)
class ProcessEnv:
    """Who this process is. `rendezvous` (file:///path) wins over `master_addr:master_port`."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    node_rank: int = 0
    master_addr: str = ""
    master_port: int = 0
    rendezvous: str | None = None
    launcher: str = "none"
    generation: int = 0  # grows with every start of the workers by one launcher; 0: nobody counts
    node: str = ""  # name of this machine in the job; empty: its host name
    domain: str = ""  # what fails together with it; empty: the machine alone

    @property
    def meeting_point(self) -> str:
        """Where the ranks meet, as text for messages."""
        return self.rendezvous or f"{self.master_addr}:{self.master_port}"

    def variables(self) -> dict[str, str]:
        """Return the variables from which `read_process_env` rebuilds this in a child process."""
        out = {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "GROUP_RANK": str(self.node_rank),
            "WINDLASS_LAUNCHER": self.launcher,
        }
        if self.generation:
            out["WINDLASS_GENERATION"] = str(self.generation)
        for name, value in (("WINDLASS_NODE", self.node), ("WINDLASS_DOMAIN", self.domain)):
            if value:
                out[name] = value
        if self.rendezvous:
            out["WINDLASS_RENDEZVOUS"] = self.rendezvous
        if self.master_addr:
            out |= {"MASTER_ADDR": self.master_addr, "MASTER_PORT": str(self.master_port)}
        return out


def get(name: str, default: str = "") -> str:
    """Read one environment variable."""
    return os.environ.get(name, default)


def set_default(name: str, value: str) -> str:
    """Set a variable unless the user has set it, and return what holds (libraries below us read it)."""
    return os.environ.setdefault(name, value)


def replace_all(values: Mapping[str, str]) -> None:
    """Make this the whole environment, of this process and its children."""
    os.environ.clear()
    os.environ.update(values)


def copy() -> dict[str, str]:
    """Return the whole environment, to start a child process with."""
    return dict(os.environ)


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ[name]
    if not re.fullmatch(r"\d+", text):
        raise ConfigError(f"environment variable {name} = {text!r}: must be a number, as the launcher sets it (e.g. 0)")
    return int(text)


def read_process_env(environ: Mapping[str, str] | None = None) -> ProcessEnv:
    """Read who this process is from the environment.

    Raises: ConfigError naming the variable when they are missing in part or contradict one another.
    """
    environ = os.environ if environ is None else environ
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _checked(_from_torchrun(environ))
    if "SLURM_PROCID" in environ and int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _checked(_from_slurm(environ))
    return ProcessEnv(**_place(environ))


def _from_torchrun(environ: Mapping[str, str]) -> ProcessEnv:
    for name in ("RANK", "WORLD_SIZE"):
        if name not in environ:
            other = "WORLD_SIZE" if name == "RANK" else "RANK"
            raise ConfigError(f"environment: {other} is set but {name} is not. Set both (torchrun does), or neither")
    world_size = _number(environ, "WORLD_SIZE")
    if world_size > 1 and ("LOCAL_RANK" not in environ or "LOCAL_WORLD_SIZE" not in environ):
        raise ConfigError(
            f"environment: WORLD_SIZE={world_size} needs LOCAL_RANK and LOCAL_WORLD_SIZE as well "
            "(0 and 1 when every host runs one process)"
        )
    node = next((n for n in ("GROUP_RANK", "NODE_RANK") if n in environ), None)
    launcher = environ.get("WINDLASS_LAUNCHER", "torchrun")
    if launcher not in LAUNCHERS:
        raise ConfigError(
            f"environment variable WINDLASS_LAUNCHER = {launcher!r}: must be one of {', '.join(LAUNCHERS)}"
        )
    rank = _number(environ, "RANK")
    local_world_size = _number(environ, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environ else 1
    return ProcessEnv(
        rank=rank,
        local_rank=_number(environ, "LOCAL_RANK") if "LOCAL_RANK" in environ else 0,
        world_size=world_size,
        local_world_size=local_world_size,
        node_rank=_number(environ, node) if node else rank // max(local_world_size, 1),
        master_addr=environ.get("MASTER_ADDR", ""),
        master_port=_number(environ, "MASTER_PORT") if "MASTER_PORT" in environ else 0,
        rendezvous=environ.get("WINDLASS_RENDEZVOUS"),
        launcher=launcher,
        **_place(environ),
    )


def _place(environ: Mapping[str, str]) -> dict[str, Any]:
    return {
        "generation": _number(environ, "WINDLASS_GENERATION") if "WINDLASS_GENERATION" in environ else 0,
        "node": environ.get("WINDLASS_NODE", ""),
        "domain": environ.get("WINDLASS_DOMAIN", ""),
    }


def _from_slurm(environ: Mapping[str, str]) -> ProcessEnv:
    # Only a job *step* (srun) has SLURM_STEP_NUM_TASKS: the batch script itself also carries SLURM_PROCID and
    # SLURM_NTASKS, but it is one process, which would wait for ever for the others.
    hosts = expand_hostlist(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", ""))
    if "MASTER_ADDR" not in environ and not hosts and "WINDLASS_RENDEZVOUS" not in environ:
        raise ConfigError(
            "environment: SLURM_PROCID is set but SLURM_STEP_NODELIST is not. Set MASTER_ADDR to a host's name"
        )
    node_rank = _number(environ, "SLURM_NODEID") if "SLURM_NODEID" in environ else 0
    tasks = expand_tasks(environ.get("SLURM_STEP_TASKS_PER_NODE", environ["SLURM_STEP_NUM_TASKS"]))
    if node_rank >= len(tasks):
        raise ConfigError(
            f"environment: SLURM_NODEID={node_rank} but SLURM_STEP_TASKS_PER_NODE lists {len(tasks)} nodes"
        )
    # One port per job, so that two jobs that share a host do not meet.
    port = 20000 + int(environ.get("SLURM_JOB_ID", "0")) % 10000
    return ProcessEnv(
        rank=_number(environ, "SLURM_PROCID"),
        local_rank=_number(environ, "SLURM_LOCALID") if "SLURM_LOCALID" in environ else 0,
        world_size=_number(environ, "SLURM_STEP_NUM_TASKS"),
        local_world_size=tasks[node_rank],
        node_rank=node_rank,
        master_addr=environ.get("MASTER_ADDR") or (hosts[0] if hosts else ""),
        master_port=_number(environ, "MASTER_PORT") if "MASTER_PORT" in environ else port,
        rendezvous=environ.get("WINDLASS_RENDEZVOUS"),
        launcher="slurm",
        **_place(environ),
    )


def _checked(env: ProcessEnv) -> ProcessEnv:
    pairs = (
        ("RANK", env.rank, "WORLD_SIZE", env.world_size),
        ("LOCAL_RANK", env.local_rank, "LOCAL_WORLD_SIZE", env.local_world_size),
    )
    for name, value, bound_name, bound in pairs:
        if value >= bound:
            raise ConfigError(f"environment: {name}={value} but {bound_name}={bound}: {name} must be less")
    if env.local_world_size > env.world_size:
        raise ConfigError(
            f"environment: LOCAL_WORLD_SIZE={env.local_world_size} is more than WORLD_SIZE={env.world_size}"
        )
    if env.rendezvous is not None and not env.rendezvous.startswith("file:///"):
        raise ConfigError(f"environment variable WINDLASS_RENDEZVOUS = {env.rendezvous!r}: must look like file:///path")
    if env.world_size > 1 and env.rendezvous is None:
        for name, missing in (("MASTER_ADDR", not env.master_addr), ("MASTER_PORT", not env.master_port)):
            if missing:
                raise ConfigError(
                    f"environment: WORLD_SIZE={env.world_size} needs {name}, the meeting point of the ranks"
                )
    return env


def expand_hostlist(text: str) -> list[str]:
    """Write a Slurm host list out: `n[01-03,7],gpu5` -> n01 n02 n03 n7 gpu5."""
    out: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", part)
        if match is None:
            out.append(part)
            continue
        prefix, ranges, suffix = match.groups()
        for item in ranges.split(","):
            low, _, high = item.partition("-")
            names = [f"{n:0{len(low)}d}" for n in range(int(low), int(high or low) + 1)]
            out += [name for n in names for name in expand_hostlist(f"{prefix}{n}{suffix}")]
    return out


def expand_tasks(text: str) -> list[int]:
    """Write Slurm's tasks per node out: `4(x2),3` -> 4 4 3."""
    out: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        out += [int(count)] * int(times or 1)
    return out


@dataclass(frozen=True)
class Fault:
    """One injected fault: what happens, at which door, on which rank, at which step, in which generation of the workers
    (None: any)."""

    action: str
    point: str = "step"
    rank: int | None = None
    step: int | None = None
    generation: int | None = None

    @staticmethod
    def parse(text: str) -> Fault:
        """Parse `ACTION[:POINT][:rank=R][:step=S][:generation=G]`, e.g. `kill:rank=1:step=3` or `enospc:checkpoint`."""
        action, *rest = text.split(":")
        names = [item for item in rest if "=" not in item]
        given = dict(item.split("=", 1) for item in rest if "=" in item)
        if (
            action not in FAULT_ACTIONS
            or len(names) > 1
            or not set(given) <= {"rank", "step", "generation"}
            or not all(v.isdigit() for v in given.values())
        ):
            raise ConfigError(
                f"environment variable WINDLASS_FAULT = {text!r}: must be ACTION[:POINT][:rank=R][:step=S]"
                f"[:generation=G] with ACTION one of {', '.join(FAULT_ACTIONS)}, e.g. kill:rank=1:step=3"
            )
        rank, step, generation = (int(given[k]) if k in given else None for k in ("rank", "step", "generation"))
        return Fault(action, names[0] if names else "step", rank, step, generation)


def fault(point: str, *, rank: int, step: int | None = None, generation: int | None = None) -> None:
    """Do what WINDLASS_FAULT asks for at this door, on this rank and step; nothing when it is not set.

    It may ask for several things, separated by commas. `generation`: the one that is worked for, where this process
    serves more than one.

    Blocks: host, for ever, with the action `hang`
    Raises: WorkerError (`raise`), OSError with the error number of that name (`enospc`, `eio`, `einval`)
    """
    for text in filter(None, get("WINDLASS_FAULT").split(",")):
        wanted = Fault.parse(text)
        here = {"rank": rank, "step": step, "generation": generation or int(get("WINDLASS_GENERATION", "0"))}
        if wanted.point == point and all(getattr(wanted, name) in (None, value) for name, value in here.items()):
            _strike(wanted, point, rank, step, text)


def _strike(wanted: Fault, point: str, rank: int, step: int | None, text: str) -> None:
    if wanted.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if (code := FAULT_ERRNOS.get(wanted.action)) is not None:
        raise OSError(code, f"{os.strerror(code)} (injected at {point})")
    if wanted.action == "hang":
        threading.Event().wait()
    raise WorkerError(f"rank {rank}: fault injected at {point}, step {step} (WINDLASS_FAULT={text})")
