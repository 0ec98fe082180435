"""`windlass draw`: a step of a pipeline as a picture, simulated from a job or a schedule, or measured by a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

if TYPE_CHECKING:
    from windlass.parallel.pipeline.schedule import Layout
    from windlass.parallel.pipeline.timeline import Timeline

HELP = """Draw one step of a pipeline: a row per rank, its idle share and the stage activations it holds at most.

A job is planned and simulated as 'windlass plan' does. With --from-trace the step is one that a run recorded
(profiler.start_step=5 profiler.all_ranks=true). With --builder it is a schedule without a job, by its name or from a
file, with stages that are all alike. The terminal shows compute actions as text; --svg writes the whole picture.

Examples:

    windlass draw pipeline-vocab

    windlass draw pipeline-vocab pipeline.schedule=1f1b --svg step.svg

    windlass draw --from-trace runs/mine --svg measured.svg

    windlass draw --builder 1f1b --ranks 4 --micro-batches 8 --vocab 2

    windlass draw --builder zbv --ranks 2 --micro-batches 4 --write own.txt
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command("draw", help=HELP, context_settings=settings)(draw)


class Picture(NamedTuple):
    """What is drawn, under which title, in which unit of time ("" for seconds), and what there is to say about it."""

    timeline: Timeline
    title: str
    unit: str
    remark: str


def draw(
    ctx: typer.Context,
    job: Annotated[
        str | None, typer.Argument(metavar="[JOB [KEY=VALUE]...]", help="A YAML file or the name of a job.")
    ] = None,
    from_trace: Annotated[Path | None, typer.Option(help="Run folder: draw the step it recorded last.")] = None,
    builder: Annotated[str | None, typer.Option(help="Name of a schedule or a schedule file, without a job.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="--builder: pipeline ranks.")] = 4,
    micro_batches: Annotated[int, typer.Option(min=1, help="--builder: micro-batches of the step.")] = 8,
    vocab: Annotated[int, typer.Option(min=0, max=2, help="--builder: vocabulary algorithm (0: off).")] = 0,
    head: Annotated[
        float | None, typer.Option(min=0, help="--builder: work of the head in stages (0.5 if it is cut, else 0).")
    ] = None,
    chunks: Annotated[int, typer.Option(min=2, help="--builder interleaved: stages per rank.")] = 2,
    world: Annotated[int, typer.Option(min=0, help="JOB: number of ranks (0: as 'windlass plan').")] = 0,
    svg: Annotated[Path | None, typer.Option(help="Write the picture to this file.")] = None,
    write: Annotated[
        Path | None, typer.Option(help="--builder: write the schedule to this file, to be edited and run.")
    ] = None,
) -> None:
    from windlass.dist.errors import ConfigError

    if write is not None and builder is None:
        raise ConfigError(f"--write {write}: writes the schedule of --builder NAME. Give one, or use --svg.")
    if (builder is not None and (job or from_trace)) or not (builder or job or from_trace):
        raise ConfigError("windlass draw: give a JOB, --from-trace RUN, both of these, or --builder NAME.")
    pictures = []
    if builder is not None:
        if ctx.args:
            raise ConfigError(f"windlass draw --builder: '{ctx.args[0]}' belongs to a job. Remove it, or give a JOB.")
        pictures.append(_built(builder, ranks, micro_batches, vocab, head, chunks, write))
    if job is not None:
        pictures.append(_planned(job, ctx.args, world))
    if from_trace is not None:
        pictures.append(_measured(from_trace))
    _show(pictures, svg)


def _built(
    name: str, ranks: int, micro_batches: int, vocab: int, head: float | None, chunks: int, write: Path | None
) -> Picture:
    """Simulate a schedule whose stages are all alike, and write it to a file if that is wanted."""
    from windlass.dist.errors import ConfigError
    from windlass.parallel.pipeline.builders import BUILDERS, build
    from windlass.parallel.pipeline.costs import Costs
    from windlass.parallel.pipeline.passes import lower
    from windlass.parallel.pipeline.schedule import load_schedule, write_schedule
    from windlass.parallel.pipeline.simulate import simulate
    from windlass.parallel.pipeline.verify import verify

    def costs(layout: Layout) -> Costs:
        return Costs.uniform(layout, head=head if head is not None else 0.5 if layout.vocab else 0.0)

    if name in BUILDERS or not Path(name).is_file():
        layout = build(name, ranks, 1, vocab=vocab, chunks=chunks).layout
        schedule = build(name, ranks, micro_batches, vocab=vocab, chunks=chunks, costs=costs(layout))
    else:
        schedule = load_schedule(name)
        verify(schedule)
    if write is not None:
        try:
            write_schedule(schedule, write)
        except OSError as error:
            raise ConfigError(f"--write {write}: {error.strerror}. Give a file that can be written.") from error
        typer.echo(f"wrote {write}")
    layout = schedule.layout
    complete = schedule if schedule.lowered else lower(schedule)
    title = f"{schedule.name}: {layout.num_ranks} ranks, {schedule.num_micro_batches} micro-batches"
    title += f", vocabulary algorithm {layout.vocab}" if layout.vocab else ""
    return Picture(simulate(complete, costs(layout)), title, "forwards of a stage", "simulated, stages all alike")


def _planned(job: str, overrides: list[str], world: int) -> Picture:
    """Simulate the step of a job."""
    from windlass.launch.check import check_job
    from windlass.launch.config import load_job
    from windlass.launch.plan import Planner, planned_ranks
    from windlass.parallel.pipeline.simulate import simulate

    loaded = load_job(job, overrides)
    mesh = check_job(loaded, planned_ranks(loaded.config, world), to_run=False)
    plan = Planner(loaded.config).pipeline(loaded.config, mesh)
    unit = "" if plan.in_seconds else "forwards of a block"
    title = f"{job}: {plan.label}, {plan.schedule.num_micro_batches} micro-batches"
    return Picture(simulate(plan.schedule, plan.costs), title, unit, plan.why)


def _measured(run: Path) -> Picture:
    """Read the step that a run recorded last, on the first rank of every pipeline rank."""
    from windlass.launch.run_folder import RunFolder, recorded_timelines
    from windlass.parallel.pipeline.draw import timeline_from_trace

    paths = recorded_timelines(RunFolder(run))
    timeline = timeline_from_trace(paths, name=str(run))
    return Picture(timeline, f"{run}: measured", "", f"{timeline.total_s:.3g} s")


def _show(pictures: list[Picture], svg: Path | None) -> None:
    """Print every picture as text; write the last one."""
    from windlass.dist.errors import ConfigError
    from windlass.parallel.pipeline.draw import svg as draw_svg
    from windlass.parallel.pipeline.draw import text_grid

    for timeline, title, _, remark in pictures:
        idle = sum(timeline.idle) / len(timeline.idle)
        typer.echo(f"{title} ({remark})\n{text_grid(timeline)}\nidle {idle:.1%} on average\n")
    if svg is not None:
        timeline, title, unit, _ = pictures[-1]
        try:
            svg.write_text(draw_svg(timeline, title, unit), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--svg {svg}: {error.strerror}. Give a file that can be written.") from error
        typer.echo(f"wrote {svg}")
