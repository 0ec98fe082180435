"""A plan to look at: bytes by class, traffic by collective, the verdict; or the four ZeRO stages side by side."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.table import Table

from windlass.launch.nearest import Change
from windlass.launch.plan import DOES_NOT_FIT, FITS, Plan
from windlass.launch.plan_offload import OffloadSummary
from windlass.launch.plan_snapshots import SnapshotSummary
from windlass.parallel.memory import MODEL_STATES

MEANING = {
    "param": "parameters in compute precision",
    "grad": "gradients in the format of the reduction",
    "master": "master weights",
    "exp_avg": "first moments",
    "exp_avg_sq": "second moments",
    "momentum_buffer": "momentum",
    "grad_slot": "gradients of whole units under reduction",
    "gather": "gathered parameters of whole units",
    "shard": "fetched parts of parameters before they are gathered",
    "optimizer": "records of master weights and moments",
    "slab": "buffers for what is on its way between tiers",
    "update": "one unit's gradient in the format of the master",
    "activation": "kept from forward to backward, all micro-batches in flight",
    "workspace": "logits, gradients and recomputed activations in flight",
    "context": "attention masks and position tables",
    "batch": "token ids waiting to be used",
    "runtime": "process and libraries before the first tensor (estimate)",
}
_COLOR = {FITS: "green", DOES_NOT_FIT: "red"}


def build_console() -> Console:
    """Return a console for tables: as wide as the terminal, or wide enough for them in a pipe or file."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)
    return console


def show_bytes(num_bytes: float) -> str:
    """Write bytes in decimal units, as the ZeRO paper does: 31.4 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f}".removesuffix(".0") + f" {unit}"
    return f"{num_bytes:.0f} B"


def show_count(count: float) -> str:
    """Write a count in short: 7.49 B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f}"


def print_plan(plan: Plan, *, change: Change | None = None, console: Console | None = None) -> None:
    """Print one plan; `change` is what would make it fit."""
    console = console or build_console()
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1)
    frozen = plan.num_parameters - plan.num_trainable
    console.print(
        f"[bold]{show_count(plan.num_parameters)} parameters[/] in {len(plan.units)} units"
        + (f", {show_count(frozen)} of them frozen" if frozen else "")
        + f"; {plan.world_size} ranks on {plan.device}"
        + (f" ({mesh})" if mesh else "")
    )
    console.print(
        f"A step: {plan.sequences_per_step:,} sequences, {plan.tokens_per_step:,} tokens, "
        f"{plan.num_micro_batches} micro-batch(es) per rank"
    )
    if plan.pipeline is not None:
        console.print(f"Pipeline: [bold]{plan.pipeline.label}[/]: {plan.pipeline.why}")
        console.print(_ranks_table(plan))
    console.print(_memory_table(plan))
    if plan.traffic:
        console.print(_traffic_table(plan))
    else:
        console.print("No communication: one rank.")
    if plan.offload is not None:
        _print_offload(plan.offload, console)
    if plan.compute_s is not None or plan.comm_s is not None:
        parts = (("compute", plan.compute_s), ("communication", plan.comm_s))
        known = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in parts if seconds is not None)
        console.print(f"A step at the cluster's peak rates, nothing overlapped: {known}")
    for note in plan.notes:
        console.print(f"[yellow]note:[/] {note}")
    console.print(verdict_line(plan))
    if plan.verdict == DOES_NOT_FIT:
        console.print(_change_line(plan, change))


def _print_offload(offload: OffloadSummary, console: Console) -> None:
    """Print what offloading moves in a step of one rank, how long that takes, and what it costs the drives."""
    chosen = ", ".join(f"{name}={value}" for name, value in offload.chosen.items() if name != "policy")
    console.print(f"Offloading: [bold]{offload.policy}[/]" + (f" ({chosen})" if chosen else ""))
    if offload.moved or offload.busy:
        table = Table(title="Moved in a step of one rank", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("lane")
        for name in ("bytes", "seconds"):
            table.add_column(name, justify="right")
        for lane in dict.fromkeys([*offload.busy, *offload.moved]):
            mark = "  (bounds the step)" if lane == offload.bound else ""
            moved = show_bytes(offload.moved[lane]) if lane in offload.moved else ""
            busy = f"{offload.busy[lane]:.4g}" if lane in offload.busy else ""
            table.add_row(lane + mark, moved, busy)
        console.print(table)
    if offload.seconds is not None:
        parts = ", ".join(f"{name} {s:.4g} s" for name, s in offload.seconds.items() if name != "total")
        console.print(f"Predicted step: [bold]{offload.seconds['total']:.4g} s[/]: {parts}")
    if offload.wear is not None:
        worn = offload.wear
        console.print(
            f"The drives of a host take {show_bytes(worn.bytes_per_step)} per step: their rated endurance lasts "
            f"{show_count(worn.steps)} steps, {worn.days:.3g} days"
        )
    for tier, num_bytes in offload.over.items():
        left = offload.budgets[tier]
        held = show_bytes(left + num_bytes)
        if tier == "device":
            room = (
                f"what activations and reductions leave of it, {show_bytes(left) if left > 1 else 'which is nothing'}"
            )
        else:
            room = show_bytes(left)
        console.print(f"[red]{tier}[/]: {held} of state and buffers do not fit into {room}")


def print_snapshots(summary: SnapshotSummary, console: Console | None = None) -> None:
    """Print what snapshots take of a node's memory, and what they survive."""
    console = console or build_console()
    copied, parity = show_bytes(summary.copied), show_bytes(summary.exchanged)
    console.print(
        f"Snapshots: [bold]{show_bytes(summary.node_bytes)}[/] of a node's memory ({summary.slots} slots of "
        f"{show_bytes(summary.rank_bytes)} for each of {summary.ranks_per_node} ranks, with parity); a rank copies "
        f"{copied} per snapshot and its node receives {parity} of parity from others"
    )
    survived = (
        f"any {summary.survives} of {summary.group} nodes that protect each other may be lost"
        if summary.survives
        else "the loss of a process is survived, that of a node is not"
    )
    console.print(f"Snapshots survive: {survived}")
    if summary.host_bytes and summary.node_bytes > summary.host_bytes:
        console.print(f"[red]note:[/] that is more than the {show_bytes(summary.host_bytes)} of a host")


def verdict_line(plan: Plan) -> str:
    """Say in one sentence whether the plan fits, of whom, and why not."""
    color = _COLOR.get(plan.verdict, "yellow")
    need = show_bytes(plan.device_bytes)
    if plan.capacity_bytes is None:
        return (
            f"[{color}]Verdict: {plan.verdict}[/]: needs {need} per rank; the memory of the cluster is not known. "
            "Give cluster.device_bytes (or cluster.host_bytes), or --cluster FILE."
        )
    which = "all hold the same" if plan.pipeline is None else "the fullest"
    return (
        f"[{color}]Verdict: {plan.verdict}[/]: rank {plan.worst_rank} ({which}) needs {need} of "
        f"{show_bytes(plan.capacity_bytes)}."
    )


def _change_line(plan: Plan, change: Change | None) -> str:
    if change is None:
        return "No change of stage, recomputation, micro-batch, offload policy or ranks that was tried makes it fit."
    ranks = [f"--world {change.world_size}"] if change.world_size != plan.world_size else []
    return (
        f"Nearest change that fits: [bold]{' '.join([*ranks, *change.overrides])}[/] "
        f"(needs {show_bytes(change.plan.device_bytes)} per rank)"
    )


def _ranks_table(plan: Plan) -> Table:
    table = Table(title="Pipeline ranks", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("rank")
    table.add_column("blocks")
    for name in ("vocabulary rows", "parameters", "model states", "total", "in flight", "idle"):
        table.add_column(name, justify="right")
    for number, rank in enumerate(plan.ranks):
        blocks = ", ".join(f"{first}-{last - 1}" if last > first + 1 else str(first) for first, last in rank.stages)
        low, high = rank.vocabulary or (0, 0)
        rows = f"{low}-{high - 1} ({high - low})" if high > low else "none" if rank.vocabulary else "with the stages"
        states = sum(n for name, n in rank.bytes.items() if name in MODEL_STATES)
        sizes = (show_count(rank.num_parameters), show_bytes(states), show_bytes(sum(rank.bytes.values())))
        table.add_row(str(number), blocks, rows, *sizes, f"{rank.in_flight:g}", f"{rank.idle:.1%}")
    return table


def _memory_table(plan: Plan) -> Table:
    title = "Memory of one rank" if plan.pipeline is None else f"Memory of rank {plan.worst_rank}, the fullest"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("tier")
    table.add_column("state")
    table.add_column("bytes", justify="right")
    table.add_column("meaning", style="dim")
    for tier, held in plan.bytes.items():
        states = {name: n for name, n in held.items() if n}
        model = {name: n for name, n in states.items() if name in MODEL_STATES}
        for name, num_bytes in model.items():
            table.add_row(tier, name, show_bytes(num_bytes), MEANING[name])
        if model:
            table.add_row(
                tier, "[bold]model states[/]", f"[bold]{show_bytes(sum(model.values()))}[/]", "", end_section=True
            )
        for name, num_bytes in states.items():
            if name not in MODEL_STATES:
                table.add_row(tier, name, show_bytes(num_bytes), MEANING[name])
        if states:
            total = f"[bold]{show_bytes(sum(states.values()))}[/]"
            table.add_row(tier, "[bold]total[/]", total, "", end_section=True)
    return table


def _traffic_table(plan: Plan) -> Table:
    which = "one rank" if plan.pipeline is None else f"rank {plan.worst_rank}"
    title = f"Communication of {which} per step (elements of full tensors; an all-reduce counts twice)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("group", "collective", "of"):
        table.add_column(name)
    for name in ("calls", "elements", "bytes", "received"):
        table.add_column(name, justify="right")
    for t in plan.traffic:
        row = (f"{t.calls:,}", show_count(t.elements), show_bytes(t.bytes), show_bytes(t.wire_bytes))
        table.add_row(t.group, t.kind, t.tag, *row)
    wire = show_bytes(sum(t.wire_bytes for t in plan.traffic))
    ratio = f"{show_count(plan.elements_per_step)} = {plan.elements_per_step / plan.num_parameters:.3g} Psi"
    table.add_row("[bold]total[/]", "", "", "", ratio, "", wire)
    return table


def print_stages(plans: Mapping[int, Plan], console: Console | None = None) -> None:
    """Print ZeRO stages side by side."""
    console = console or build_console()
    first = next(iter(plans.values()))
    title = f"ZeRO stages: {show_count(first.num_parameters)} parameters, {first.world_size} ranks; bytes of one rank"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("stage", "param", "grad", "optimizer", "model states", "working", "total", "traffic"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for stage, plan in plans.items():
        held = plan.bytes["device"]
        optimizer = sum(n for name, n in held.items() if name in MODEL_STATES and name not in ("param", "grad"))
        working = plan.device_bytes - plan.model_state_bytes
        sizes = (held["param"], held["grad"], optimizer, plan.model_state_bytes, working, plan.device_bytes)
        cells = [show_bytes(n) for n in sizes]
        cells[3] = f"[bold]{cells[3]}[/]"
        color = _COLOR.get(plan.verdict, "yellow")
        traffic = f"{plan.elements_per_step / plan.num_parameters:.3g} Psi"
        table.add_row(str(stage), *cells, traffic, f"[{color}]{plan.verdict}[/]")
    console.print(table)
