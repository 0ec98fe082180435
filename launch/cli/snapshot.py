"""`windlass snapshot`: what memory holds of a run. Needs no devices and changes nothing, but for gc."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from windlass.checkpoint.local_level import LocalLevel
    from windlass.checkpoint.memory.folder import NodeFolder
    from windlass.dist.errors import CheckpointError

app = typer.Typer(
    help="List the snapshots that nodes hold of a run in memory; verify, show and remove those of this host.\n\n"
    "Example: windlass snapshot ls runs/tiny",
    no_args_is_help=True,
)

SHM = Path("/dev/shm")


def _existing(base: Path) -> Path:
    from windlass.dist.errors import ConfigError

    if not base.is_dir():
        raise ConfigError(f"--folder {base}: is no folder. Use snapshot.folder of the job, such as {SHM}")
    return base


Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Base = Annotated[Path, typer.Option("--folder", callback=_existing, help="snapshot.folder of the job.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command(
    "ls",
    help="List the snapshots of a run, newest first. To be called on a host of the run; its other nodes are asked.\n\n"
    "Example: windlass snapshot ls runs/tiny",
)
def list_command(run: Run, base: Base = SHM, as_json: AsJson = False) -> None:
    from windlass.launch.snapshot_view import ask_others, list_slots, node_lines, slot_table

    folders = _folders(run, base)
    others = ask_others(folders)
    slots = [row for folder in folders for row in list_slots(folder)] + [row for _, rows in others for row in rows]
    if as_json:
        typer.echo(json.dumps([row.as_json() for row in slots], indent=1))
        return
    nodes = [line for folder in folders for line in node_lines(folder)] + [line for line, _ in others]
    for line in [*nodes, *slot_table(slots)]:
        typer.echo(line)


@app.command(
    "verify",
    help="Read every byte and compare it with its checksum. Exit code 8 names damage.\n\n"
    "Example: windlass snapshot verify runs/tiny",
)
def verify_command(run: Run, base: Base = SHM) -> None:
    from windlass.dist.errors import CheckpointError
    from windlass.launch.snapshot_view import verify_slots

    damaged = 0
    for folder in _folders(run, base):
        for name, problem in verify_slots(folder):
            damaged += problem not in ("", "filling")
            typer.echo(f"{name}: {problem or 'valid'}")
    if damaged:
        raise typer.Exit(CheckpointError.exit_code)


@app.command(
    "show",
    help="Show what the snapshots of one step hold, as JSON: facts, tensors, members and groups.\n\n"
    "Example: windlass snapshot show runs/tiny --step 20",
)
def show_command(
    run: Run,
    step: Annotated[int | None, typer.Option(min=0, help="The step (default: the newest one).")] = None,
    base: Base = SHM,
) -> None:
    from windlass.dist.errors import CheckpointError
    from windlass.launch.snapshot_view import show_step

    shown = show_step(_folders(run, base), step)
    if not shown:
        raise CheckpointError(f"{run}: no snapshot{'' if step is None else f' of step {step}'} in {base} of this host")
    typer.echo(json.dumps(shown, indent=1))


@app.command(
    "gc",
    help="Remove the snapshots of a run that nobody needs, in memory and in checkpoint.local_dir, or without RUN those "
    "in memory of every run whose lease (its own snapshot.lease_s) is over. Nothing is removed while a worker trains "
    "with it, nor what is not this user's alone; a snapshot process is ended with --stop only.\n\n"
    "Examples:\n\n"
    "    windlass snapshot gc runs/tiny --stop\n\n"
    "    windlass snapshot gc",
)
def gc_command(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="A run folder.")] = None,
    base: Base = SHM,
    lease_s: Annotated[
        float | None, typer.Option(min=0, help="Seconds since anybody needed them, for every run without RUN.")
    ] = None,
    stop: Annotated[bool, typer.Option("--stop", help="End the snapshot processes of the run first.")] = False,
) -> None:
    from windlass.checkpoint.local_level import remove_local_level
    from windlass.checkpoint.memory.garbage import collect_garbage
    from windlass.dist.errors import CheckpointError
    from windlass.launch.node_memory import stop_process, trainers_of
    from windlass.launch.run_folder import RunFolder, RunLock

    if run is None:
        for folder, error in collect_garbage(base, lease_s, refused=_say):
            typer.echo(
                f"removed {folder.path}" if error is None else f"{folder.path} stays: {error}", err=error is not None
            )
        return
    folders, levels = _nodes(run, base), _local_levels(run, base)
    if not folders and not levels:
        raise _nothing(run, base)
    for folder in folders:
        served = folder.read_smp()
        if users := trainers_of(folder):
            raise CheckpointError(f"{folder.path} is in use by {', '.join(users)}. Stop the run first")
        if served is not None and served.alive and not stop:
            raise CheckpointError(
                f"{folder.path} is served by snapshot process {served.pid}, so the run can go on from it. End it too "
                "with --stop"
            )
    # A run whose memory is elsewhere, or on other hosts, may train: then its folder is locked.
    with RunLock(RunFolder(run)) if levels else nullcontext():
        for folder in folders:
            stop_process(folder)
            on_drive = remove_local_level(folder)
            folder.remove()
            if on_drive is not None:
                typer.echo(f"removed {on_drive}")
            typer.echo(f"removed {folder.path}")
        for level in levels:
            if level.folder.exists():  # of a node that has nothing in memory
                level.remove()
                typer.echo(f"removed {level.folder}")


def _folders(run: Path, base: Path) -> list[NodeFolder]:
    """Return the folders of this run in the memory of this host.

    Raises:      CheckpointError if there are none
    """
    if not (found := _nodes(run, base)):
        raise _nothing(run, base)
    return found


def _nodes(run: Path, base: Path) -> list[NodeFolder]:
    from windlass.checkpoint.memory.folder import list_jobs
    from windlass.launch.control_log import job_of

    return [folder for folder in list_jobs(base, _say) if folder.job == job_of(run)]


def _local_levels(run: Path, base: Path) -> list[LocalLevel]:
    """Return what this host's drives hold of a run, by all the configurations that it was started with.

    Memory does not say where they are once its lease is over.
    """
    from windlass.checkpoint.local_level import list_local_levels
    from windlass.dist.errors import ConfigError
    from windlass.launch.config import load_job
    from windlass.launch.control_log import job_of

    places = set()
    for path in run.glob("config*.yaml"):
        try:
            places.add(load_job(path).config.checkpoint.local_dir)
        except ConfigError as error:  # of another version, say
            typer.echo(f"{path} does not tell checkpoint.local_dir: {error}", err=True)
    return [level for place in sorted(places - {""}) for level in list_local_levels(base, job_of(run), place)]


def _nothing(run: Path, base: Path) -> CheckpointError:
    from windlass.dist.errors import CheckpointError
    from windlass.launch.control_log import job_of

    return CheckpointError(
        f"{run}: this host holds no snapshots of it in {base} (job {job_of(run)}). Give the run folder as the job had "
        "it (train.run_dir), and --folder if it had another snapshot.folder"
    )


def _say(why: CheckpointError) -> None:
    typer.echo(f"passed over: {why}", err=True)
