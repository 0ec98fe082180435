"""`windlass plan`: what a job will hold and move on every rank, and whether it fits, without starting anything."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

HELP = """Print what a job needs on every rank (bytes by class of state, traffic per step) and whether it fits.

Nothing is started. The cluster is what cluster.* or --cluster says; when neither it nor --world gives the number of
ranks, the job's own workers on this machine are planned. Exit code 3 when the job does not fit.

Examples:

    windlass plan quickstart

    windlass plan zero-7.5b --world 64 --stages

    windlass plan pretrain-7b --world 8 zero.stage=3 cluster.device_bytes=80e9

    windlass plan job.yaml --world 512 --cluster cluster.yaml --json
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command("plan", help=HELP, context_settings=settings)(plan)


def plan(
    ctx: typer.Context,
    job: Annotated[str, typer.Argument(metavar="JOB [KEY=VALUE]...", help="A YAML file or the name of a job.")],
    world: Annotated[
        int, typer.Option(min=0, help="Number of ranks (0: all devices of cluster.*, or launch.workers).")
    ] = 0,
    cluster: Annotated[Path | None, typer.Option(help="YAML file with the keys of the group cluster.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole plan as JSON, and nothing else.")] = False,
    stages: Annotated[bool, typer.Option("--stages", help="Compare ZeRO stages 0 to 3 of this job.")] = False,
) -> None:
    import json
    from dataclasses import asdict, replace

    from windlass.launch.check import check_job
    from windlass.launch.config import load_job
    from windlass.launch.nearest import nearest_change
    from windlass.launch.plan import DOES_NOT_FIT, Planner
    from windlass.launch.plan_cluster import known_facts, planned_ranks
    from windlass.launch.plan_snapshots import plan_snapshots
    from windlass.launch.plan_view import print_plan, print_snapshots, print_stages

    loaded = load_job(job, ctx.args, cluster=cluster)
    config = loaded.config
    world_size = planned_ranks(config, world)
    check_job(loaded, world_size, to_run=False)
    facts, device = known_facts(config, world)
    planner = Planner(config)
    if stages:
        variants = {stage: replace(config, zero=replace(config.zero, stage=stage)) for stage in range(4)}
        plans = {stage: planner.plan(variant, world_size, facts, device) for stage, variant in variants.items()}
        if as_json:
            typer.echo(
                json.dumps({stage: {**p.as_json(), "digest": p.digest()} for stage, p in plans.items()}, indent=1)
            )
        else:
            print_stages(plans)
        chosen = plans[config.zero.stage]
    else:
        chosen = planner.plan(config, world_size, facts, device)
        snapshots = plan_snapshots(config, chosen, facts)
        too_big = chosen.verdict == DOES_NOT_FIT
        change = nearest_change(config, world_size, facts, device) if too_big else None
        if as_json:
            named = change and {"overrides": change.overrides, "world_size": change.world_size}
            beside = {"nearest_change": named, "snapshots": snapshots and asdict(snapshots)}
            typer.echo(json.dumps({**chosen.as_json(), "digest": chosen.digest(), **beside}, indent=1))
        else:
            print_plan(chosen, change=change)
            if snapshots is not None:
                print_snapshots(snapshots)
    raise typer.Exit(3 if chosen.verdict == DOES_NOT_FIT else 0)
