"""Windlass against what its links allow, and against itself: the parts links, order and share of offload.py.

One rank, fp32, with links slowed down by `offload.throttle`, so that moving bytes costs what it would on the machines
that need it while the processor stays free. Every side is compared with `windlass-compute`, the same step with all
state on the device. A step cannot be shorter than computing or than the busiest lane (the bound), and is as long as
computing and all lanes together if nothing overlaps (the serial time); the share hidden says where between the two it
is: (serial - step) / (serial - bound). The predicted step is that of the simulator, given the same rates.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from head_to_head import Case, Sample, Worker, measure, run_rounds
from offload_simulated import predicted_step_s
from ranks import RankFailed
from rich import box
from rich.console import Console
from rich.table import Table
from rounds import fixed, median, mib, ratio
from workload import Workload

from windlass.dist.device import pick_device
from windlass.launch.calibrate import calibrate
from windlass.offload.rates import Rates

Config = dict[str, Any]

PARTS = ("links", "order", "share")
MB = 1e6
COMPUTE, YARDSTICK = "windlass-compute", "windlass-deepspeeds-way"
CACHED = 8  # records that mlp-offload keeps in host memory
POLICIES: dict[str, Config] = {
    "windlass-zero-infinity": {"policy": "zero-infinity"},
    "windlass-mlp-offload": {"policy": "mlp-offload", "cache": CACHED},
    "windlass-fuyou": {"policy": "fuyou"},
}
NEVER_REACHED = 1000.0  # a norm limit that makes policies that wait for the norm wait, and clips nothing
RECORD_BYTES = 12.0  # of one element: master weight and two moments
# Goals: share of what can be hidden that is; update inside backward over DeepSpeed's way; the planned share over the
# best stride, and the update with it over one by the CPU alone; error of a prediction.
HIDDEN, ORDER, STRIDE, UPDATE, PREDICTION = 0.9, 2.0, 1.05, 1.4, 0.1
EARLY = "windlass-fuyou"  # the policy that updates inside backward, which these two are about
BOUND, AFTER = 1.15, 1.3  # step / longest of computing and moving; updating after backward / inside it

NOISE = 0.25  # moves that take less than this share of computing are hidden or not within the noise

Report = Callable[[Console], list[str]]
MakeWorker = Callable[[Mapping[str, Config]], Worker]


@dataclass
class Lanes:
    """One part under way: its job, and the sides it runs, each with keys of the group offload."""

    given: argparse.Namespace
    make_worker: MakeWorker
    console: Console
    failures: dict[str, str]
    machine: Rates  # of this machine, nothing slowed down
    fio: dict[str, float] = field(default_factory=dict)
    sides: dict[str, Config] = field(default_factory=lambda: {COMPUTE: {"policy": "none"}})

    @property
    def case(self) -> Case:
        return Case(self.given.lane_model, 1, "fp32")

    @property
    def job(self) -> argparse.Namespace:
        changes = {"micro_batch": self.given.lane_micro_batch, "seq_len": self.given.lane_seq_len}
        return argparse.Namespace(**vars(self.given) | changes | {"clip": NEVER_REACHED, "memory_steps": 1})

    def once(self, side: str, config: Config) -> Sample:
        """Run a side once, to learn what the others are to be like.

        Raises: RankFailed
        """
        job = self.job
        job.steps = job.warmup = 2
        return measure(self.make_worker({side: config}), self.case, side, 0, job)

    def rounds(self) -> list[Sample]:
        """Run all sides in interleaved rounds."""
        worker = self.make_worker(self.sides)
        return run_rounds([self.case], list(self.sides), worker, self.job, self.console, self.failures)

    def workload(self) -> Workload:
        job = self.job
        return Workload(
            model=self.case.model,
            bf16=False,
            micro_batch=job.micro_batch,
            seq_len=job.seq_len,
            clip=job.clip,
            seed=0,
            rank=0,
            world_size=1,
        )

    def rates(self, config: Config) -> Rates:
        """Return the rates of the lanes under a configuration."""
        slowed = dict(config.get("throttle", {}))
        facts = vars(self.machine) | {name.replace(" ", "_"): rate for name, rate in slowed.items()}
        if "cpu update" in slowed:
            facts["cpu_update"] = slowed["cpu update"] / RECORD_BYTES
        if "h2d" in slowed:
            facts["duplex"] = slowed["h2d"] + slowed["d2h"]
        if "file read" in slowed:
            facts["file_mixed"] = slowed["file read"] + slowed["file write"]
        return Rates(**facts)


def run_part(
    part: str,
    given: argparse.Namespace,
    make_worker: MakeWorker,
    folder: Path,
    console: Console,
    failures: dict[str, str],
) -> tuple[list[Sample], Report]:
    """Run one part and return its samples and what prints its table."""
    console.print(f"{part}: measuring this machine", highlight=False)
    facts = calibrate(pick_device("cpu"), [folder], seconds=6.0 if given.quick else 15.0).cluster
    machine = Rates(
        h2d=facts.get("h2d_bytes_per_s", 0.0),
        d2h=facts.get("d2h_bytes_per_s", 0.0),
        duplex=facts.get("duplex_bytes_per_s", 0.0),
        file_read=facts.get("nvme_read_bytes_per_s", 0.0),
        file_write=facts.get("nvme_write_bytes_per_s", 0.0),
        file_mixed=facts.get("nvme_mixed_bytes_per_s", 0.0),
        cpu_update=facts.get("cpu_update_per_s", 0.0),
        cpu_cast=facts.get("cpu_cast_per_s", 0.0),
        host_memory=facts.get("host_memory_bytes_per_s", 0.0),
    )
    lanes = Lanes(given, make_worker, console, failures, machine, fio_rates(folder))
    prepare = {"links": prepare_links, "order": prepare_order, "share": prepare_share}[part]
    try:
        table = prepare(lanes)
    except RankFailed as error:
        failures[part] = str(error)
        return [], lambda out: []
    samples = lanes.rounds()

    def report(out: Console) -> list[str]:
        rows = [s for s in samples if s.facts]
        out.print(f"\n{title(part, lanes)}", highlight=False)
        out.print(table(rows))
        return []

    return samples, report


def fio_rates(folder: Path) -> dict[str, float]:
    """Return what fio reads and writes in blocks of 8 MiB past the page cache, to judge our own figures by.

    Units: bytes/s by direction; nothing if fio is not installed
    """
    if not shutil.which("fio"):
        return {}
    rates = {}
    common = ["--name=drive", f"--filename={folder / 'fio'}", "--size=512m", "--bs=8m", "--direct=1", "--iodepth=4"]
    common += ["--ioengine=libaio", "--output-format=json"]
    for direction in ("write", "read"):  # in this order: extents that were never written are read too fast
        done = subprocess.run(["fio", *common, f"--rw={direction}"], capture_output=True, text=True)
        if done.returncode == 0:
            rates[direction] = float(json.loads(done.stdout)["jobs"][0][direction]["bw_bytes"])
    (folder / "fio").unlink(missing_ok=True)
    return rates


def title(part: str, lanes: Lanes) -> str:
    """Return the line above a table."""
    job, machine = lanes.job, lanes.machine
    return (
        f"{part}: {lanes.case.title}, {job.micro_batch} x {job.seq_len} tokens, {job.rounds} round(s) of {job.steps} "
        f"timed steps; drive {machine.file_read / MB:.0f} MB/s read, {machine.file_write / MB:.0f} written, "
        f"{machine.file_mixed / MB:.0f} both at once"
        + (f" (fio: {lanes.fio['read'] / MB:.0f}, {lanes.fio['write'] / MB:.0f})" if len(lanes.fio) == 2 else "")
        + f", CPU {machine.cpu_update / MB:.0f} M updates/s"
    )


# -- what a step could be ----------------------------------------------------------------------------------------------


def moved(sample: Sample) -> dict[str, float]:
    """Return the bytes of every lane of a step."""
    return {lane: counters["num_bytes"] for lane, counters in sample.facts["lanes"].items() if counters["num_bytes"]}


def lane_seconds(sample: Sample, rates: Rates, slowed: Mapping[str, float]) -> dict[str, float]:
    """Return the least seconds that each link needs for what a step moved.

    Copies and updates that are not slowed down are work of the processor; they need what they took.
    """
    found, seconds = moved(sample), {}
    for lane, num_bytes in found.items():
        if lane in slowed:
            seconds[lane] = num_bytes / slowed[lane]
        elif not lane.startswith("file"):
            seconds[lane] = sample.facts["lanes"][lane]["busy_s"]
    drive = {lane: num_bytes for lane, num_bytes in found.items() if lane.startswith("file") and lane not in slowed}
    if drive:
        alone = [num_bytes / rates.alone(lane) for lane, num_bytes in drive.items()]
        seconds["drive"] = max(*alone, sum(drive.values()) / rates.file_mixed if rates.file_mixed else 0.0)
    return seconds


@dataclass(frozen=True)
class Overlap:
    """How a step compares with what it could be. Medians over rounds. Units: seconds."""

    computing_s: float
    links_s: float  # of the busiest link
    of_bound: float
    hidden: float


def overlap(rows: Sequence[Sample], side: str, lanes: Lanes) -> Overlap:
    """Compare the steps of a side with the computing of the same round."""
    computing = {s.round: computing_s(s) for s in rows if s.side == COMPUTE}
    slowed = lanes.sides[side].get("throttle", {})
    found = []
    for sample in rows:
        if sample.side != side or sample.round not in computing:
            continue
        alone = computing[sample.round]
        seconds = lane_seconds(sample, lanes.rates(lanes.sides[side]), slowed)
        longest, serial = max(seconds.values()), alone + sum(seconds.values())
        bound = max(alone, longest)
        found.append((alone, longest, sample.step_s / bound, (serial - sample.step_s) / (serial - bound)))
    return Overlap(*(statistics.median(values) for values in zip(*found, strict=True)))


def predicted(rows: Sequence[Sample], side: str, lanes: Lanes) -> float:
    """Return the step that the simulator expects, given the computing that was measured."""
    common = {"chunk": lanes.given.chunk, "slabs": lanes.given.slabs}
    computing = statistics.median(computing_s(s) for s in rows if s.side == COMPUTE)
    return predicted_step_s(lanes.workload(), common | lanes.sides[side], lanes.rates(lanes.sides[side]), computing)


def met(value: float | None, goal: float, *, most: bool = False) -> str:
    """Return a value beside its goal."""
    if value is None:
        return "-"
    good = value <= goal if most else value >= goal
    return f"{value:.2f} ({'<=' if most else '>='} {goal}) {'pass' if good else 'MISS'}"


def first_cells(rows: Sequence[Sample], side: str) -> list[str]:
    """Return name, time and drive traffic of a side."""
    mine = [s for s in rows if s.side == side]
    traffic = [
        statistics.mean(sum(n for lane, n in moved(s).items() if lane.startswith(kind)) for s in mine)
        for kind in ("file read", "file write")
    ]
    return [side, f"{1000 * median(rows, side, 'step_s'):.0f}", *(f"{mib(n):.0f}" for n in traffic)]


def new_table(*columns: str) -> Table:
    table = Table(box=box.MARKDOWN)
    table.add_column("side")
    for name in ("ms/step", "read MiB", "written MiB", *columns):
        table.add_column(name, justify="right")
    return table


def sides_in(rows: Sequence[Sample]) -> list[str]:
    return list(dict.fromkeys(s.side for s in rows))


# -- links: how much of moving is hidden -------------------------------------------------------------------------------


def prepare_links(lanes: Lanes) -> Callable[[Sequence[Sample]], Table]:
    for rate in (float(text) * MB for text in lanes.given.rates.split(",")):
        # The way to the device is faster than the drive, as everywhere.
        throttle = {"file read": rate, "file write": rate, "h2d": 4 * rate, "d2h": 4 * rate}
        lanes.sides |= {f"{name}@{rate / MB:.0f}": config | {"throttle": throttle} for name, config in POLICIES.items()}
    lanes.sides |= {f"{name}@drive": config for name, config in POLICIES.items()}

    def table(rows: Sequence[Sample]) -> Table:
        out = new_table(
            "computing ms",
            "busiest link ms",
            "step / bound",
            f"share hidden (>= {HIDDEN})",
            "predicted ms",
            f"step / predicted (+- {PREDICTION})",
        )
        for side in sides_in(rows):
            if side == COMPUTE:
                out.add_row(*first_cells(rows, side))
                continue
            seen, expected = overlap(rows, side, lanes), predicted(rows, side, lanes)
            error = median(rows, side, "step_s") / expected
            out.add_row(
                *first_cells(rows, side),
                f"{1000 * seen.computing_s:.0f}",
                f"{1000 * seen.links_s:.0f}",
                met(seen.of_bound, BOUND, most=True) if side.startswith(EARLY) else f"{seen.of_bound:.2f}",
                met(seen.hidden, HIDDEN) if seen.links_s > NOISE * seen.computing_s else "-",
                f"{1000 * expected:.0f}",
                f"{error:.2f} {'pass' if abs(error - 1) <= PREDICTION else 'MISS'}",
            )
        return out

    return table


# -- order: when updates are made --------------------------------------------------------------------------------------


def prepare_order(lanes: Lanes) -> Callable[[Sequence[Sample]], Table]:
    computing = computing_s(lanes.once(COMPUTE, {"policy": "none"}))
    traffic = moved(lanes.once("windlass-fuyou", {"policy": "fuyou"}))
    ways: dict[str, Config] = {
        # After backward, fp32 gradients on the drive, one buffer, nothing fetched before it is needed.
        YARDSTICK: {"policy": "zero-infinity", "grad": "nvme", "slabs": 1, "lookahead": [0, 0, 0]},
        **POLICIES,
    }
    for share in lanes.given.io_shares.split(","):
        throttle = {lane: traffic[lane] / (float(share) * computing) for lane in ("file read", "file write")}
        lanes.sides |= {f"{name}@{share}": config | {"throttle": throttle} for name, config in ways.items()}

    def table(rows: Sequence[Sample]) -> Table:
        out = new_table("busiest link ms", "step / bound", f"x DeepSpeed's way (>= {ORDER})", "x update after backward")
        for side in sides_in(rows):
            if side == COMPUTE:
                out.add_row(*first_cells(rows, side))
                continue
            seen, share = overlap(rows, side, lanes), side.split("@")[1]
            slower = ratio(rows, side, (f"{YARDSTICK}@{share}",), "step_s")
            after = ratio(rows, side, (f"windlass-zero-infinity@{share}",), "step_s")
            judged = slower is not None and not side.startswith(YARDSTICK)
            out.add_row(
                *first_cells(rows, side),
                f"{1000 * seen.links_s:.0f}",
                f"{seen.of_bound:.2f}",
                met(1 / slower, ORDER) if judged and slower else fixed(slower),
                met(1 / after, AFTER) if after and side.startswith(EARLY) else fixed(1 / after if after else None),
            )
        return out

    return table


# -- share: how many updates are made on the device --------------------------------------------------------------------


def prepare_share(lanes: Lanes) -> Callable[[Sequence[Sample]], Table]:
    rate = 400 * MB
    # One core that updates as many bytes per second as the link moves: then the best share is between two strides.
    throttle = {"h2d": rate, "d2h": rate, "cpu update": rate}
    base: Config = {"policy": "deep-optimizer-states", "throttle": throttle}
    lanes.sides |= {"windlass-all-cpu": base | {"device_share": 0.0}}
    lanes.sides |= {f"windlass-stride-{n}": base | {"device_share": 0.0, "stride": n} for n in (2, 3, 4, 5)}
    share = best_share(lanes, base)
    lanes.sides |= {
        "windlass-planned": base | {"device_share": share},
        "windlass-all-device": base | {"device_share": 1},
    }
    strides = tuple(name for name in lanes.sides if "stride" in name)

    def table(rows: Sequence[Sample]) -> Table:
        out = new_table("update ms", f"x best stride (>= {STRIDE})", f"x all-CPU (>= {UPDATE})", "predicted ms/step")
        for side in sides_in(rows):
            if side == COMPUTE:
                out.add_row(*first_cells(rows, side))
                continue
            cells = [*first_cells(rows, side), f"{1000 * update_s(rows, side):.0f}"]
            if side == "windlass-planned":
                cells[0] += f" ({share:.2f})"
                cells += [met(update_gain(rows, side, strides), STRIDE)]
                cells += [met(update_gain(rows, side, ("windlass-all-cpu",)), UPDATE)]
            else:
                cells += ["", ""]
            out.add_row(*cells, f"{1000 * predicted(rows, side, lanes):.0f}")
        return out

    return table


def best_share(lanes: Lanes, base: Config) -> float:
    """Return the share of updates on the device with the shortest step on paper."""
    work, common = lanes.workload(), {"chunk": lanes.given.chunk, "slabs": lanes.given.slabs}
    rates = lanes.rates(base)
    steps = {n / 50: predicted_step_s(work, common | base | {"device_share": n / 50}, rates, 1.0) for n in range(51)}
    return min(steps, key=lambda share: steps[share])


def computing_s(sample: Sample) -> float:
    """Return the seconds of a step without its update."""
    return sample.step_s - updating(sample)


def update_s(rows: Sequence[Sample], side: str) -> float:
    """Return the seconds from the norm to the end of the step."""
    return statistics.median(updating(s) for s in rows if s.side == side)


def updating(sample: Sample) -> float:
    seconds: float = sample.facts["phases"]["step"]
    return seconds


def update_gain(rows: Sequence[Sample], side: str, peers: Sequence[str]) -> float | None:
    """Return how many times as fast a side updates as the fastest of its peers: the median over rounds."""
    gains = []
    for own in (s for s in rows if s.side == side):
        theirs = [updating(s) for s in rows if s.round == own.round and s.side in peers]
        if theirs:
            gains.append(min(theirs) / updating(own))
    return statistics.median(gains) if gains else None
