"""`windlass draw`: a step as a picture, simulated from a job or a schedule, or measured by a run.

A pipeline has a row per rank; a job that offloads without one has a row per lane.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

if TYPE_CHECKING:
    from windlass.dist.mesh import Mesh
    from windlass.launch.job import JobConfig
    from windlass.launch.plan import Planner
    from windlass.offload.simulate import Span
    from windlass.parallel.pipeline.schedule import Layout
    from windlass.parallel.pipeline.timeline import Timeline

HELP = """Draw one step: of a pipeline a row per rank, with its idle share and the stage activations it holds at most;
of a job that offloads without one a row per lane: compute, copies, file reads and writes, updates.

A job is planned and simulated as 'windlass plan' does. With --from-trace the step is one that a run recorded
(profiler.start_step=5 profiler.all_ranks=true). With --builder it is a schedule without a job, by its name or from a
file, with stages that are all alike. The terminal shows compute actions or lanes as text; --svg (or --out) writes the
whole picture.

Examples:

    windlass draw pipeline-vocab

    windlass draw pipeline-vocab pipeline.schedule=1f1b --svg step.svg

    windlass draw offload-175b --svg lanes.svg

    windlass draw job.yaml --cluster cluster.yaml offload.policy=fuyou

    windlass draw --from-trace runs/mine --svg measured.svg

    windlass draw --builder 1f1b --ranks 4 --micro-batches 8 --vocab 2

    windlass draw --builder zbv --ranks 2 --micro-batches 4 --write own.txt
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command("draw", help=HELP, context_settings=settings)(draw)


class Picture(NamedTuple):
    """What is drawn: a text with its title, and the document of the same."""

    text: str
    svg: Callable[[], str]


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
    cluster: Annotated[Path | None, typer.Option(help="JOB: YAML file with the keys of the group cluster.")] = None,
    svg: Annotated[Path | None, typer.Option("--svg", "--out", help="Write the picture to this file.")] = None,
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
        pictures.append(_planned(job, ctx.args, world, cluster))
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
    timeline = simulate(complete, costs(layout))
    return _pipeline(timeline, title, "forwards of a stage", "simulated, stages all alike")


def _planned(job: str, overrides: list[str], world: int, cluster: Path | None) -> Picture:
    """Simulate the step of a job."""
    from windlass.launch.check import check_job
    from windlass.launch.config import load_job
    from windlass.launch.plan import Planner
    from windlass.launch.plan_cluster import planned_ranks
    from windlass.parallel.pipeline.simulate import simulate

    loaded = load_job(job, overrides, cluster=cluster)
    config = loaded.config
    mesh = check_job(loaded, planned_ranks(config, world), to_run=False)
    planner = Planner(config)
    if config.offload.active and mesh.sizes["pp"] == 1:
        picture = _planned_lanes(job, config, planner, mesh, world)
        if picture is not None:
            return picture
    plan = planner.pipeline(config, mesh)
    unit = "" if plan.in_seconds else "forwards of a block"
    title = f"{job}: {plan.label}, {plan.schedule.num_micro_batches} micro-batches"
    why = plan.why + ("; what tiers move is left out" if config.offload.active else "")
    return _pipeline(simulate(plan.schedule, plan.costs), title, unit, why)


def _planned_lanes(job: str, config: JobConfig, planner: Planner, mesh: Mesh, world: int) -> Picture | None:
    """Simulate the lanes of one rank; None if the planner chose to offload nothing."""
    from windlass.launch.plan_cluster import device_kind, known_facts
    from windlass.launch.plan_offload import simulated_step

    facts, device = known_facts(config, world)
    offloading = planner.offloading(config, mesh, facts, device or device_kind(config, facts))
    if offloading.plans[0] is None:
        return None
    step = simulated_step(offloading, facts, mesh.world_size)
    m = offloading.works[0].num_micro_batches
    title = f"{job}: {offloading.config.policy}, {m} micro-batch" + ("es" if m > 1 else "")
    phases = f"forward {step.forward_s:.3g}, backward {step.backward_s:.3g}, update {step.update_s:.3g}"
    remark = f"{step.total_s:.4g} s: {phases}; '{step.bound}' is busy longest"
    return _lanes(step.spans, title, f"simulated, {remark}")


def _measured(run: Path) -> Picture:
    """Read the step that a run recorded last: the first rank of every pipeline rank, or the lanes of rank 0."""
    from windlass.launch.run_folder import RunFolder, recorded_timelines
    from windlass.launch.trace_view import view_traces
    from windlass.offload.draw import ordered_lanes
    from windlass.offload.program import COPY_LANES
    from windlass.parallel.pipeline.draw import timeline_from_trace

    paths = recorded_timelines(RunFolder(run))
    if len(paths) == 1:
        last = view_traces(paths[0])[0].steps[-1]
        spans = view_traces(paths[0], (last, last))[0].spans
        if set(COPY_LANES) & set(ordered_lanes(spans)):
            return _lanes(spans, f"{run}: step {last}", "measured")
    timeline = timeline_from_trace(paths, name=str(run))
    return _pipeline(timeline, f"{run}: measured", "", f"{timeline.total_s:.3g} s")


def _pipeline(timeline: Timeline, title: str, unit: str, remark: str) -> Picture:
    """Draw a row per rank, in a unit of time ("" for seconds)."""
    from windlass.parallel.pipeline.draw import svg, text_grid

    idle = sum(timeline.idle) / len(timeline.idle)
    text = f"{title} ({remark})\n{text_grid(timeline)}\nidle {idle:.1%} on average\n"
    return Picture(text, lambda: svg(timeline, title, unit))


def _lanes(spans: Sequence[Span], title: str, remark: str) -> Picture:
    """Draw a row per lane."""
    from windlass.offload.draw import svg, text

    return Picture(f"{title} ({remark})\n{text(spans)}\n", lambda: svg(spans, title))


def _show(pictures: list[Picture], svg: Path | None) -> None:
    """Print every picture as text; write the last one."""
    from windlass.dist.errors import ConfigError

    for picture in pictures:
        typer.echo(picture.text)
    if svg is not None:
        try:
            svg.write_text(pictures[-1].svg(), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--svg {svg}: {error.strerror}. Give a file that can be written.") from error
        typer.echo(f"wrote {svg}")
