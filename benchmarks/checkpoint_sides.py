"""One rank of one side of `benchmarks/checkpoint.py --parts blocked`: steps of computing with saves between.

A step is matrix products that update nothing, a meeting of all ranks, the gate (whatever a side must wait for before
state may change), an update of all state in place, and, every few steps, a save. Blocked are the seconds in the save
and at the gates. All sides but none and windlass-sync save the random generators too. Before a save everything of
the one before is waited for; that time is nobody's.

`raw` is the machine as it is. In `link`, the copy that a side makes of its state takes at least as long as a link of
the given speed needs: ours through snapshot.link_bytes_per_s, the copies of the others by a wait in the thread that
copies, where that is. Sides that write straight from state pay the link before they write.

Not meant to be started by hand: see benchmarks/checkpoint.py.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from checkpoint_ours import Held, Rank, make_state
from ranks import Reporter

from windlass.checkpoint.memory.settings import Settings
from windlass.checkpoint.policy import SnapshotConfig
from windlass.checkpoint.save import save as save_synchronously

SIZE = 512  # of the matrices
SAVE_S = 300.0


@dataclass(frozen=True)
class Link:
    """What copies pass through. Units: bytes/s, 0 for no limit."""

    bytes_per_s: float

    def passed(self, num_bytes: int, copy: Callable[[], Any]) -> Any:
        """Return what `copy` returns, no sooner than the bytes can have passed."""
        began = time.perf_counter()
        out = copy()
        if self.bytes_per_s > 0:
            time.sleep(max(num_bytes / self.bytes_per_s - (time.perf_counter() - began), 0.0))
        return out


class Ranks:
    """The ranks of the run, as the checkpoint layer wants them."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def gather_objects(self, obj: Any) -> list[Any]:
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, obj)
        return out


@dataclass(frozen=True)
class Job:
    """What all sides save."""

    ranks: Ranks
    state: Mapping[str, torch.Tensor]
    link: Link
    folder: Path  # on disk
    memory: Path

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for t in self.state.values())

    @property
    def whole(self) -> dict[str, Any]:
        """The state and what a run needs beside it to go on as if nothing had been: the random generators, as now."""
        return {**self.state, "rng": (random.getstate(), np.random.get_state(), torch.get_rng_state())}

    @property
    def named(self) -> dict[str, Any]:
        """The same with names that differ by rank: none of it is replicated."""
        return {f"rank{self.ranks.rank}.{key}": value for key, value in self.whole.items()}

    def place(self, step: int) -> Path:
        return self.folder / f"step-{step}"


class Saver:
    """A way of saving. `save` and `gate` are timed, the rest is not."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def save(self, step: int) -> None: ...

    def gate(self) -> None:
        """Wait until state may change."""

    def drain(self) -> None:
        """Wait until nothing of an earlier save is left to do."""

    def close(self) -> None: ...


# -- ours --------------------------------------------------------------------------------------------------------------


class Snapshots(Saver):
    """Into memory, with XOR parity over the ranks' nodes; `eager`: copied before training goes on; `durable`: and
    written to disk by the snapshot processes."""

    def __init__(self, job: Job, *, eager: bool = False, durable: bool = False) -> None:
        super().__init__(job)
        ranks, link = job.ranks, job.link.bytes_per_s
        policy = SnapshotConfig(every=1, redundancy="xor", link_bytes_per_s=link)
        self._rank = Rank(job.memory, Held.of(job.state, ranks.rank, ranks.size), ranks.size, policy)
        settings = Settings(link_bytes_per_s=link)
        if durable:
            settings = Settings(link_bytes_per_s=link, mode="lazy", every=1, storage=str(job.folder), keep=2)
        self._rank.join(ranks.gather_objects(self._rank.place()), settings)
        self._eager, self._level, self._last = eager, "storage" if durable else "peers", 0

    def save(self, step: int) -> None:
        self._rank.snapshot(step, eager=self._eager)
        self._last = step

    def gate(self) -> None:
        self._rank.capturer.gate()

    def drain(self) -> None:
        end = time.monotonic() + SAVE_S
        while self._last and self._rank.client.status().newest.get(self._level, -1) < self._last:
            if time.monotonic() > end:
                raise TimeoutError(f"step {self._last} is not at level {self._level}: {self._rank.client.status()}")
            time.sleep(0.005)
        while not self._rank.capturer.ready():
            time.sleep(0.005)

    def close(self) -> None:
        self.drain()
        dist.barrier()  # nobody's snapshot process is asked any more
        self._rank.close()


class WindlassSync(Saver):
    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._source = Held.of(job.state, job.ranks.rank, job.ranks.size)

    def save(self, step: int) -> None:
        self.job.link.passed(self.job.num_bytes, lambda: None)
        report = save_synchronously(self.job.folder, step, self._source, {}, self.job.ranks, keep=1)
        assert report.ok, report.reason


# -- peers -------------------------------------------------------------------------------------------------------------


class TorchSave(Saver):
    """One file per rank, then a barrier, as in most training loops."""

    def save(self, step: int) -> None:
        job = self.job
        job.link.passed(job.num_bytes, lambda: None)
        job.place(step).mkdir(parents=True, exist_ok=True)
        self.write(job.place(step) / f"rank{job.ranks.rank}.pt")
        dist.barrier()

    def write(self, path: Path) -> None:
        torch.save(self.job.whole, path)


class DeepSpeed(TorchSave):
    """Its default checkpoint engine, on the same state."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

        self._engine = TorchCheckpointEngine()
        self._engine.zipfile_serialization = True  # the default of its configuration

    def write(self, path: Path) -> None:
        self._engine.save(self.job.whole, str(path))
        self._engine.commit(None)


class DcpSave(Saver):
    def save(self, step: int) -> None:
        import torch.distributed.checkpoint as dcp

        # Its loader overlaps copies with writing: the longer of the two counts.
        job = self.job
        job.link.passed(job.num_bytes, lambda: dcp.save(job.named, checkpoint_id=job.place(step)))


class DcpAsync(Saver):
    """`async_save` with a thread or a process that writes; `staged`: with the stager of torchtitan's
    async_with_pinned_mem, as far as a CPU goes: kept in shared memory and filled by a thread."""

    def __init__(self, job: Job, *, process: bool = False, staged: bool = False) -> None:
        super().__init__(job)
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self._process, self._staged = process, staged
        self._staging: Future[None] | None = None
        self._upload: Future[Any] | None = None

        def make() -> Any:
            stager: Any = DefaultStager(StagingOptions(False, staged, staged, False))
            copy = stager._stage
            stager._stage = lambda state, **more: job.link.passed(job.num_bytes, lambda: copy(state, **more))
            return stager

        self._make, self._kept = make, make() if staged else None
        self._group = dist.new_group(backend="gloo")  # the thread that writes must not meet training's collectives

    def save(self, step: int) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

        answer = dcp.async_save(
            self.job.named,
            checkpoint_id=self.job.place(step),
            async_checkpointer_type=AsyncCheckpointerType.PROCESS if self._process else AsyncCheckpointerType.THREAD,
            async_stager=self._kept or self._make(),  # without one, async_save makes one for each save
            process_group=self._group,
        )
        if isinstance(answer, AsyncSaveResponse):
            self._staging, self._upload = answer.staging_completion, answer.upload_completion
        else:
            self._upload = answer

    def gate(self) -> None:
        if self._staging is not None:
            self._staging.result()
            self._staging = None

    def drain(self) -> None:
        if self._upload is not None:
            self._upload.result()
            self._upload = None

    def close(self) -> None:
        self.drain()
        if self._kept is not None:
            self._kept.close()


class TorchCheckpointing(Saver):
    """Asynchronous, as by default, but without direct I/O, with which it hangs here."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = CheckpointManager(CheckpointManager.Config(storage_config=storage))
        stager = self._manager._saver.stager
        copy = stager._stage
        stager._stage = lambda *given: job.link.passed(job.num_bytes, lambda: copy(*given))
        self._upload: Future[Any] | None = None

    def save(self, step: int) -> None:
        self._upload = self._manager.save(str(self.job.place(step)), {"state": self.job.whole, "step": step})

    def gate(self) -> None:
        with self._manager.lock():  # held during the update, which nobody can wait for here
            pass

    def drain(self) -> None:
        if self._upload is not None:
            self._upload.result()
            self._upload = None

    def close(self) -> None:
        self._manager.close()


SIDES: dict[str, Callable[[Job], Saver]] = {
    "none": Saver,
    "windlass-lazy": Snapshots,
    "windlass-lazy-durable": lambda job: Snapshots(job, durable=True),
    "windlass-async": lambda job: Snapshots(job, eager=True, durable=True),
    "windlass-sync": WindlassSync,
    "torch.save": TorchSave,
    "dcp.save": DcpSave,
    "dcp.async_save": DcpAsync,
    "dcp.async_save-process": lambda job: DcpAsync(job, process=True),
    "torchtitan-staging": lambda job: DcpAsync(job, process=True, staged=True),
    "torch_checkpointing": TorchCheckpointing,
    "deepspeed": DeepSpeed,
}


# -- the loop ----------------------------------------------------------------------------------------------------------


class Compute:
    """The work of a step."""

    def __init__(self) -> None:
        self._a, self._b = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
        self._out = torch.empty(SIZE, SIZE)

    def work(self, products: int) -> None:
        for _ in range(products):
            torch.mm(self._a, self._b, out=self._out)

    def calibrate(self, seconds: float) -> int:
        """Return how many products take this long while all ranks compute."""
        self.work(5)
        dist.barrier()
        done, began = 0, time.perf_counter()
        while time.perf_counter() - began < 2.0:
            self.work(5)
            done += 5
        return max(round(seconds * done / (time.perf_counter() - began)), 1)


def run_steps(job: Job, saver: Saver, given: argparse.Namespace, products: int) -> dict[str, Any]:
    """Take steps and saves; return seconds by save and by step, of what comes after the warmup."""
    compute, blocked, steps = Compute(), [[0.0, 0.0]], []
    for number in range((given.warmup + given.saves) * given.every):
        if number % given.every == 0:
            saver.drain()
            clear(job, number // given.every)
            dist.barrier()
        began = time.perf_counter()
        compute.work(products)
        dist.barrier()  # gradients are exchanged
        gate = time.perf_counter()
        saver.gate()
        blocked[-1][1] += time.perf_counter() - gate
        for tensor in job.state.values():
            tensor.add_(1e-6)
        if number % given.every == 0:
            dist.barrier()
            at = time.perf_counter()
            saver.save(number // given.every + 1)
            blocked.append([time.perf_counter() - at, 0.0])
        steps.append(time.perf_counter() - began)
    saver.drain()
    return {"blocked": blocked[1 + given.warmup :], "steps": steps[given.warmup * given.every :]}


def clear(job: Job, saves: int) -> None:
    """Remove old saves of sides that do not do so themselves."""
    if job.ranks.rank == 0 and saves > 2:
        shutil.rmtree(job.place(saves - 2), ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=sorted(SIDES), required=True)
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument(
        "--products", type=int, default=0, help="matrix products of a step; 0: as many as --step-s holds"
    )
    parser.add_argument("--step-s", type=float, default=0.5)
    parser.add_argument("--link", type=float, action="append", default=[], help="bytes/s, one or several, 0: no limit")
    parser.add_argument("--every", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--memory", type=Path, required=True)
    parser.add_argument("--events", type=int, required=True)
    given = parser.parse_args()
    reporter = Reporter(given.events)
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=os.environ["WINDLASS_RENDEZVOUS"], rank=rank, world_size=size)
    ranks = Ranks()
    products = given.products
    if not products:
        products = round(sum(ranks.gather_objects(Compute().calibrate(given.step_s))) / size)
    reporter.phase("timed")
    found = []
    for index, link in enumerate(given.link):
        folder, memory = given.folder / f"saves-{index}", given.memory / f"nodes-{index}"
        folder.mkdir(exist_ok=True)
        memory.mkdir(exist_ok=True)
        dist.barrier()
        job = Job(ranks, make_state(given.bytes, rank), Link(link), folder, memory)
        saver = SIDES[given.side](job)
        found.append(run_steps(job, saver, given, products))
        saver.close()
        dist.barrier()
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    reporter.result(products=products, runs=cast(list[Any], found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
