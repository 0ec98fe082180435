"""`windlass doctor`: is this machine ready?"""

from __future__ import annotations

from typing import Annotated

import typer

HELP = """Check this machine: versions, devices, memory, limits, disk, ports; say what is missing and how to get it.

With a job, its run folder, NVMe folders and device are looked at. Exit code 1 when something essential is missing.

Examples:

    windlass doctor

    windlass doctor job.yaml train.run_dir=runs/here
"""
_MARK = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "missing": "[bold red]MISSING[/]"}


def register(app: typer.Typer) -> None:
    """Add the command."""
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command("doctor", help=HELP, context_settings=settings)(doctor)


def doctor(
    ctx: typer.Context,
    job: Annotated[
        str | None, typer.Argument(metavar="[JOB [KEY=VALUE]...]", help="A YAML file or the name of a job.")
    ] = None,
) -> None:
    from rich.markup import escape
    from rich.table import Table

    from windlass.launch.doctor import MISSING, WARNING, examine
    from windlass.launch.plan_view import build_console

    if job is None:
        checks = examine()
    else:
        from windlass.launch.config import load_job

        config = load_job(job, ctx.args).config
        checks = examine(config.train.run_dir, config.cluster.nvme_paths, config.train.device)
    table = Table(box=None, pad_edge=False, show_header=False)
    topic = ""
    for check in checks:
        if topic and check.topic != topic:
            table.add_row()
        shown = check.topic if check.topic != topic else ""
        remedy = f"[bold]{escape(check.remedy)}[/]" if check.remedy else ""
        table.add_row(f"[dim]{shown}[/]", check.name, _MARK[check.status], escape(check.found), remedy)
        topic = check.topic
    console = build_console()
    console.print(table)
    missing = [c.name for c in checks if c.status == MISSING]
    warnings = sum(c.status == WARNING for c in checks)
    if missing:
        console.print(f"\n[bold red]Not ready:[/] {', '.join(missing)}. Run what stands beside it, then again.")
        raise typer.Exit(1)
    console.print(f"\n[bold green]Ready[/] ({warnings} warning(s))." if warnings else "\n[bold green]Ready.[/]")
