"""`windlass trace`: what the recorded steps of a run say about its lanes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from windlass.launch.trace_view import RankUse

HELP = """Show how busy every lane of a recorded run was, what compute did not hide, and the longest waits.

RUN is a run folder whose training recorded steps (profiler.start_step=5), or one trace file. busy: the lane did
something; exposed: it did while compute did nothing; stalled: the main thread waited for it. Compute is what the main
thread spends in the model's parts; on a GPU that is the time to begin the work, not to do it.

Examples:

    windlass trace runs/mine

    windlass trace runs/mine --steps 6-7 --svg lanes.svg

    windlass trace runs/mine/traces/timeline_rank0_step7.json.gz --json
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("trace", help=HELP)(trace)


def trace(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a timeline in its traces.")],
    steps: Annotated[str, typer.Option(help="Recorded steps, as 6 or 6-8; the latest window if not given.")] = "",
    rank: Annotated[int, typer.Option(min=-1, help="Only this rank (-1: all).")] = -1,
    svg: Annotated[Path | None, typer.Option(help="Draw the lanes of the first shown rank into this file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    from json import dumps

    from rich.console import Console

    from windlass.dist.errors import ConfigError
    from windlass.launch.trace_view import as_json, view_traces

    views = view_traces(run, _steps(steps))
    if rank >= 0:
        held = ", ".join(str(view.rank) for view in views)
        views = [view for view in views if view.rank == rank]
        if not views:
            raise ConfigError(f"--rank {rank}: not recorded. The recorded ranks are {held}.")
    if json:
        typer.echo(dumps(as_json(views), indent=1))
    else:
        console = Console()
        _print(views, console if console.is_terminal else Console(width=140))
    if svg is not None:
        _draw(run, views[0], svg)
        typer.echo(f"wrote {svg}", err=json)


def _steps(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    first, _, last = text.partition("-")
    if not first.isdecimal() or not (last or first).isdecimal():
        raise typer.BadParameter(f"{text!r}: use a step or a range, as 6 or 6-8", param_hint="--steps")
    return int(first), int(last or first)


def _draw(run: Path, view: RankUse, path: Path) -> None:
    from windlass.dist.errors import ConfigError
    from windlass.offload.draw import svg

    title = f"{run}: rank {view.rank}, {_span_of(view.steps)}"
    try:
        path.write_text(svg(view.spans, title), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--svg {path}: {error.strerror}. Give a file that can be written.") from error


def _print(views: Sequence[RankUse], console: Console) -> None:
    from rich.table import Table

    from windlass.launch.plan_view import show_bytes
    from windlass.launch.trace_view import worst_waits
    from windlass.offload.draw import ordered_lanes

    for view in views:
        console.print(f"[bold]rank {view.rank}[/], {_span_of(view.steps)}: {_time(view.window_s)}")
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2))
        table.add_column("lane")
        for title in ("busy", "", "exposed", "", "stalled", "", "bytes", "per busy second", "tasks"):
            table.add_column(title, justify="right")
        uses = {use.lane: use for use in view.lanes}
        order = ["compute", *(lane for lane in ordered_lanes(view.spans) if lane != "compute")]
        for lane in dict.fromkeys([*order, *uses]):
            if lane not in uses:
                continue
            use = uses[lane]
            cells = [_time(use.busy_s), _share(use.busy_s, view.window_s)]
            for seconds in (use.exposed_s, use.stalled_s):
                cells += ["", ""] if lane == "compute" else [_time(seconds), _share(seconds, view.window_s)]
            moved = [show_bytes(use.num_bytes), f"{show_bytes(use.bytes_per_s)}/s"] if use.num_bytes else ["", ""]
            table.add_row(lane, *cells, *moved, f"{use.num_spans:,}")
        console.print(table)
        console.print()
    waits = worst_waits(views)
    if not waits:
        console.print("the main thread waited for nothing")
        return
    console.print("[bold]longest waits[/]")
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2))
    for title in ("seconds", "rank", "step", "waited", "for lane", "task"):
        table.add_column(title, overflow="fold", justify="right" if title == "seconds" else "left")
    for wait in waits:
        table.add_row(_time(wait.seconds), str(wait.rank), str(wait.step), wait.what, wait.lane, wait.task)
    console.print(table)


def _span_of(steps: Sequence[int]) -> str:
    if len(steps) == 1:
        return f"step {steps[0]}"
    whole = steps[-1] - steps[0] + 1 == len(steps)
    return f"steps {steps[0]}-{steps[-1]}" if whole else "steps " + ", ".join(map(str, steps))


def _share(seconds: float, whole: float) -> str:
    return f"{seconds / whole:.1%}" if whole else ""


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
