"""The command line: `windlass COMMAND`, thin views over the functions that the runtime uses.

Errors raised on purpose become one line and an exit code of their own; `WINDLASS_TRACEBACK=1` shows where they came
from. Commands import what they need when they run, so that help is quick.
"""

from __future__ import annotations

import sys
import traceback
from typing import Annotated, NoReturn

import typer

import windlass
from windlass.dist.errors import WindlassError
from windlass.launch.cli import (
    bench,
    checkpoint,
    config,
    data,
    doctor,
    draw,
    drill,
    evaluate,
    import_,
    plan,
    quickstart,
    snapshot,
    trace,
    train,
)

HELP = """Train models far larger than device memory, on one GPU or a cluster, without losing work.

A job is a YAML file or the name of one that comes with Windlass; any of its keys can be overridden on the command line.

Examples:

    windlass doctor

    windlass data prepare texts/ --out tokens/

    windlass plan quickstart zero.stage=3

    windlass draw pipeline-vocab

    windlass train job.yaml launch.workers=2 train.steps=100
"""

app = typer.Typer(
    name="windlass", help=HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"windlass {windlass.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options that need no command."""


train.register(app)
drill.register(app)
plan.register(app)
draw.register(app)
doctor.register(app)
quickstart.register(app)
evaluate.register(app)
trace.register(app)
app.add_typer(config.app, name="config")
app.add_typer(data.app, name="data")
app.add_typer(import_.app, name="import")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(snapshot.app, name="snapshot")
app.add_typer(bench.app, name="bench")


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    try:
        typer.main.get_command(app).main(arguments, prog_name="windlass")
    except WindlassError as error:
        fail(error)
    sys.exit(0)


def fail(error: WindlassError) -> NoReturn:
    """Print an error that was raised on purpose and exit with its code."""
    from windlass.dist import env

    if env.get("WINDLASS_TRACEBACK") not in ("", "0"):
        traceback.print_exception(error)
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
