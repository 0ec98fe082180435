"""`windlass train` and `windlass launch`: from a job to running workers."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from windlass.launch.drill import Strike
    from windlass.launch.job import Loaded

JOB_HELP = "A YAML file or the name of a preset in configs/."
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
TRAIN_HELP = """Train a job: in this process, on several local workers, or as one worker of torchrun or Slurm.

Everything after JOB overrides a key of it, as a.b=c or --a.b=c. The job is checked before any process starts.
SIGTERM or Ctrl-C finishes the step, saves a checkpoint and exits with 0; a second one ends at once.
With recovery.max_restarts, workers are started again in place after a failure; RUN/history.md tells what happened.

Examples:

    windlass train quickstart train.steps=100

    windlass train job.yaml launch.workers=2 --zero.stage=3

    windlass train job.yaml launch.workers=2 snapshot.every=1 recovery.max_restarts=3

    torchrun --nproc-per-node 2 -m windlass train job.yaml

    srun --ntasks-per-node=8 windlass train job.yaml

    windlass train job.yaml --cluster cluster.yaml offload.policy=auto
"""
LAUNCH_HELP = """Train a job in a Ray cluster, one actor per device.

Everything after JOB overrides a key of it; launch.workers is the number of workers. The output of rank 0 appears here,
and a failure shows its first cause once. A Ray started here is stopped afterwards, an existing cluster left alone.

Examples:

    windlass launch job.yaml --ray local launch.workers=2

    windlass launch job.yaml --ray auto --nodes 2 launch.workers=16
"""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("train", help=TRAIN_HELP, context_settings=OVERRIDES)(train)
    app.command("launch", help=LAUNCH_HELP, context_settings=OVERRIDES)(launch)


CLUSTER_HELP = "YAML file with the keys of the group cluster, as `windlass bench tiers` writes it."


def train(
    ctx: typer.Context,
    job: Annotated[str, typer.Argument(metavar="JOB [KEY=VALUE]...", help=JOB_HELP)],
    cluster: Annotated[Path | None, typer.Option(help=CLUSTER_HELP)] = None,
) -> None:
    from windlass.dist.env import read_process_env
    from windlass.launch.check import check_job
    from windlass.launch.check_recovery import check_without_controller
    from windlass.launch.config import load_job
    from windlass.launch.failure import guarded
    from windlass.launch.local import launch_local
    from windlass.launch.local_run import needs_controller, run_controlled
    from windlass.launch.signals import hold_signals
    from windlass.launch.worker import check_num_workers, work, worker_command

    env = read_process_env()
    if env.launcher != "none":
        hold_signals()

        def run() -> int:
            loaded = load_job(job, ctx.args, cluster=cluster)
            check_num_workers(loaded, env)
            check_job(loaded, env.world_size)
            return work(loaded, env)

        raise typer.Exit(guarded(run, env))
    loaded = load_job(job, ctx.args, cluster=cluster)
    launch_config = loaded.config.launch
    check_job(loaded, launch_config.workers)
    if needs_controller(loaded):
        raise typer.Exit(run_controlled(loaded))
    check_without_controller(loaded, ray=False)
    if launch_config.workers > 1:
        raise typer.Exit(launch_local(worker_command(loaded), launch_config))
    raise typer.Exit(work(loaded, env))


def launch(
    ctx: typer.Context,
    job: Annotated[str, typer.Argument(metavar="JOB [KEY=VALUE]...", help=JOB_HELP)],
    ray: Annotated[str, typer.Option(help="local: start Ray here; auto: the running cluster; or its HOST:PORT")],
    nodes: Annotated[int, typer.Option(min=0, help="nodes with equally many workers each (0: Ray chooses)")] = 0,
    spread: Annotated[bool, typer.Option("--spread", help="over as many nodes as possible, not as few")] = False,
    cluster: Annotated[Path | None, typer.Option(help=CLUSTER_HELP)] = None,
) -> None:
    from windlass.launch.check import check_job
    from windlass.launch.config import load_job

    check_ray()
    loaded = load_job(job, ctx.args, cluster=cluster)
    # What only a run needs is at the nodes of a cluster, not necessarily here.
    check_job(loaded, loaded.config.launch.workers, to_run=ray == "local")
    raise typer.Exit(launch_in_ray(loaded, address=ray, num_nodes=nodes, spread=spread))


def check_ray() -> None:
    """Raise ConfigError if Ray is not installed."""
    from windlass.dist.errors import ConfigError

    if find_spec("ray") is None:
        raise ConfigError("windlass launch needs Ray, which is not installed. Install it: pip install ray")


def launch_in_ray(
    loaded: Loaded, *, address: str, num_nodes: int = 0, spread: bool = False, strikes: Sequence[Strike] = ()
) -> int:
    """Run a checked job in a Ray cluster, with a controller where it needs one, and return its exit code."""
    from windlass.launch.check_recovery import (
        check_controlled,
        check_shared_devices,
        check_without_controller,
        uses_snapshots,
    )
    from windlass.launch.generation import highest_generation
    from windlass.launch.local_run import needs_controller, patience_of, prepared
    from windlass.launch.ray.driver import Recovering, launch_recovering
    from windlass.launch.ray.workers import launch_ray
    from windlass.launch.worker import worker_command

    config = loaded.config
    num_nodes = num_nodes or config.launch.nodes
    if not needs_controller(loaded):
        check_without_controller(loaded, ray=True)
        if address == "local":
            check_shared_devices(loaded, num_nodes)
        return launch_ray(
            worker_command(loaded),
            config.launch,
            address=address,
            num_nodes=num_nodes,
            spread=spread,
            device=config.train.device,
        )
    check_controlled(loaded, num_nodes, emulated=address == "local")
    loaded, limits = prepared(loaded)
    recovering = Recovering(
        run=Path(config.train.run_dir).resolve(),
        limits=limits,
        patience=patience_of(loaded),
        snapshots=uses_snapshots(loaded),
        base=config.snapshot.folder,
        local_dir=config.checkpoint.local_dir,
        strikes=tuple(strikes),
        fork_server=config.recovery.fork_server and config.recovery.max_restarts > 0,
        floor=highest_generation(config),
    )
    return launch_recovering(
        worker_command(loaded),
        config.launch,
        recovering,
        address=address,
        num_nodes=num_nodes,
        spread=spread,
        device=config.train.device,
    )
