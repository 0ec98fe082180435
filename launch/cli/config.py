"""`windlass config`: what a job says after every layer, and the JSON schema that editors use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Show a job's resolved configuration; write the JSON schema of jobs.", no_args_is_help=True)

SHOW_HELP = """Print every key of a job with its value, unit, meaning and where the value comes from.

Everything after JOB overrides a key of it, as a.b=c or --a.b=c.

Examples:

    windlass config show quickstart

    windlass config show job.yaml zero.stage=3 --given

    windlass config show job.yaml --yaml > resolved.yaml
"""
SCHEMA_HELP = """Write the JSON schema (draft 2020-12) of job files, with descriptions, choices and ranges.

With it an editor completes keys and marks mistakes; for the YAML language server put this line first in a job:
# yaml-language-server: $schema=windlass.schema.json

Example:

    windlass config schema --out windlass.schema.json
"""


@app.command("show", help=SHOW_HELP, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def show(
    ctx: typer.Context,
    job: Annotated[str, typer.Argument(metavar="JOB [KEY=VALUE]...", help="A YAML file or the name of a job.")],
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print YAML that can be loaded, and nothing else.")] = False,
    given: Annotated[bool, typer.Option("--given", help="Only keys that are not at their default.")] = False,
) -> None:
    from windlass.launch.config import load_job, to_yaml
    from windlass.launch.config_view import print_config

    loaded = load_job(job, ctx.args)
    if as_yaml:
        typer.echo(to_yaml(loaded.config), nl=False)
    else:
        print_config(loaded, only_given=given)


@app.command("schema", help=SCHEMA_HELP)
def schema(out: Annotated[Path | None, typer.Option(help="File to write; the terminal if not given.")] = None) -> None:
    import json

    from windlass.dist.errors import ConfigError
    from windlass.launch.config_view import json_schema

    text = json.dumps(json_schema(), indent=2)
    if out is None:
        typer.echo(text)
        return
    try:
        out.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}. Give a file in a folder that can be written.") from error
    typer.echo(f"wrote {out}")
