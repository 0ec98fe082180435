"""`windlass drill`: break something on purpose while a job runs, and see what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from windlass.launch.cli.train import CLUSTER_HELP, JOB_HELP, OVERRIDES, check_ray, launch_in_ray

HELP = """Run a job and break something on purpose: prints what was decided, what was lost and what it took.

KIND=TARGET@step=N breaks the target once step N is done. Kinds: rank (SIGKILL) and stop (SIGSTOP: a hang) of a rank;
node (everything of it is killed and its memory deleted), zombie (cut off, its processes live on), reboot (killed, its
memory stays) and smp (its snapshot process) of a node; with Ray also agent of a node and controller. Without Ray,
launch.nodes and launch.spares emulate nodes on this machine. Unless the job says otherwise, recovery.max_restarts,
crash_loops and node_failures are as large as the drill needs. Exit code 0 only if the run finished and every strike was
made.

Examples:

    windlass drill job.yaml --kill rank=1@step=20 launch.workers=2 snapshot.every=1

    windlass drill resilient --kill smp=0@step=9 --kill node=0@step=20

    windlass drill resilient --ray local --kill rank=1@step=8 --kill node=0@step=20
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("drill", help=HELP, context_settings=OVERRIDES)(drill)


def drill(
    ctx: typer.Context,
    job: Annotated[str, typer.Argument(metavar="JOB [KEY=VALUE]...", help=JOB_HELP)],
    kill: Annotated[list[str], typer.Option("--kill", metavar="KIND=TARGET@step=N", help="What to break and when.")],
    ray: Annotated[str, typer.Option(help="local: emulate nodes with Ray here; auto or HOST:PORT: a cluster")] = "",
    cluster: Annotated[Path | None, typer.Option(help=CLUSTER_HELP)] = None,
) -> None:
    from dataclasses import replace

    from windlass.launch.check import check_job
    from windlass.launch.check_recovery import uses_snapshots
    from windlass.launch.config import load_job
    from windlass.launch.control_log import ControlLog
    from windlass.launch.drill import Strike, Targets, all_done, check_strikes, drill_table, outcomes
    from windlass.launch.local_fleet import node_names
    from windlass.launch.local_run import run_controlled

    strikes = [Strike.parse(text) for text in kill]
    loaded = load_job(job, ctx.args, cluster=cluster)
    config = loaded.config
    enough = {
        name: max(getattr(config.recovery, name), len(strikes) + 1)
        for name in ("max_restarts", "crash_loops", "node_failures")
        if f"recovery.{name}" not in loaded.given
    }
    config = replace(config, recovery=replace(config.recovery, **enough))
    loaded = replace(loaded, config=config)
    # What only a run needs is at the nodes of a cluster, not necessarily here.
    check_job(loaded, config.launch.workers, to_run=ray in ("", "local"))
    nodes = tuple(node_names(config.launch)) if ray in ("", "local") else ()
    has = Targets(config.launch.workers, config.train.steps, uses_snapshots(loaded), bool(ray), nodes)
    check_strikes(strikes, has)
    if ray:
        check_ray()
        code = launch_in_ray(loaded, address=ray, strikes=strikes)
    else:
        code = run_controlled(loaded, strikes)
    records = ControlLog(Path(config.train.run_dir)).since_launch()
    typer.echo(drill_table(outcomes(records)))
    done = all_done(strikes, records)
    if not done:
        typer.echo("not every strike was made", err=True)
    raise typer.Exit(code or int(not done))
