"""`windlass bench`: measure what plans are made from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from windlass.launch.calibrate import Calibration

app = typer.Typer(help="Measure this machine.", no_args_is_help=True)

TIERS_HELP = """Measure memory, links to the device, local drives and updates: what offloading is planned from.

On every --path a file is written, read back, measured and gone again; it never has a name for longer than it takes to
open it. --out writes the figures as keys of the group cluster; other keys and comments of that file stay.

Examples:

    windlass bench tiers --path /mnt/nvme0 --path /mnt/nvme1 --out cluster.yaml

    windlass plan job.yaml --cluster cluster.yaml
"""
HEADING = "Facts about the hosts of a cluster, for windlass plan JOB --cluster FILE, or below `cluster:` of a job."


@app.callback()
def _group() -> None:
    """Keep `tiers` a command of a group while it is the only one."""


@app.command("tiers", help=TIERS_HELP)
def tiers(
    path: Annotated[list[Path] | None, typer.Option(help="Folder on a local drive; may be given repeatedly.")] = None,
    size: Annotated[str, typer.Option(help="Size of the file on each path.")] = "512MiB",
    seconds: Annotated[float, typer.Option(min=0.1, help="Time for all samples together.")] = 25.0,
    out: Annotated[Path | None, typer.Option(help="YAML file of the group cluster to write the figures to.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    deepspeed: Annotated[
        bool, typer.Option("--deepspeed", help="Measure DeepSpeedCPUAdam too, compiled first if it is not yet.")
    ] = False,
) -> None:
    from windlass.dist.deepspeed_ops import missing_for_op
    from windlass.dist.device import pick_device
    from windlass.dist.errors import ConfigError
    from windlass.launch.calibrate import calibrate
    from windlass.launch.config import load_dataclass, read_bytes, write_keys
    from windlass.launch.drives import missing_folder

    paths = path or []
    for folder in paths:
        problem = missing_folder(str(folder))
        if problem:
            raise ConfigError(f"--path {folder}: {problem}.")
    if len({folder.resolve() for folder in paths}) < len(paths):
        raise ConfigError("--path: a folder is given twice. Give each of them once.")
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {device}: must be auto, cpu or cuda.")
    file_bytes = float(size) if size.isdigit() else read_bytes(size)
    if file_bytes is None or file_bytes < 16 << 20:
        raise ConfigError(f"--size {size}: must be a number of bytes, at least 16MiB, such as 512MiB.")
    if out is not None and out.exists():
        load_dataclass(out, "cluster")  # what cannot be kept is said before anything is measured
    elif out is not None and not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: no such folder. Make it, or give another file.")
    problem = missing_for_op("cpu_adam") if deepspeed else None
    if problem:
        raise ConfigError(f"--deepspeed: its operator cpu_adam cannot be built: {problem}, or leave --deepspeed out.")
    began = time.perf_counter()
    with _shown() as progress:
        calibration = calibrate(
            pick_device(device),
            paths,
            file_bytes=int(file_bytes),
            seconds=seconds,
            deepspeed=deepspeed,
            progress=progress,
        )
    _print(calibration, time.perf_counter() - began)
    if not paths:
        typer.echo("No drive was measured: give --path FOLDER.")
    if out is not None:
        write_keys(out, "cluster", calibration.cluster, HEADING)
        typer.echo(f"wrote {out}: use it with windlass plan JOB --cluster {out}")


def _print(calibration: Calibration, seconds: float) -> None:
    from rich.markup import escape
    from rich.table import Table

    from windlass.launch.calibrate import ROUNDS
    from windlass.launch.plan_view import build_console

    table = Table(box=None, pad_edge=False)
    table.add_column("figure")
    table.add_column("median", justify="right")
    table.add_column("unit")
    table.add_column("range", justify="right")
    table.add_column("how")
    table.add_column("key of cluster")
    for figure in calibration.figures:
        scale, unit, digits = (1e9, "GB/s", 2) if figure.unit == "bytes/s" else (1e6, f"M {figure.unit}", 0)
        low, rate, high = (f"{n / scale:.{digits}f}" for n in (min(figure.samples), figure.rate, max(figure.samples)))
        table.add_row(escape(figure.name), f"[bold]{rate}[/]", unit, f"{low} to {high}", escape(figure.how), figure.key)
    console = build_console()
    console.print(table)
    for note in calibration.notes:
        console.print(f"[yellow]Note:[/] {escape(note)}", highlight=False)
    typer.echo(f"{ROUNDS} interleaved samples of each, {seconds:.0f} s")


@contextmanager
def _shown() -> Iterator[Callable[[float, str], None]]:
    """Give a callback that moves a bar on a terminal and prints a line every few seconds elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        last = time.monotonic()

        def say(share: float, what: str) -> None:
            nonlocal last
            if time.monotonic() - last >= 5:
                last = time.monotonic()
                typer.echo(f"measuring: {share:.0%}, {what}", err=True)

        yield say
        return
    columns = (TextColumn("measuring"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda share, what: bar.update(task, completed=share, description=what)
