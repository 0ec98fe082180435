"""`windlass import`: jobs from the configurations of other frameworks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from windlass.launch.deepspeed_import import Imported

app = typer.Typer(help="Make a job from another framework's configuration.", no_args_is_help=True)

DEEPSPEED_HELP = """Translate a DeepSpeed configuration (JSON) into a job, and say of every key what became of it.

Keys that DeepSpeed does not know are refused. "auto" becomes what Hugging Face's Trainer takes when it is given no
argument. Model, data and sequence length are not in such a file: add them to the job.

Without --out the job goes to standard output and the table to standard error.

Examples:

    windlass import deepspeed ds_config.json --out job.yaml

    windlass import deepspeed ds_config.json --world 8 --strict > job.yaml
"""


@app.callback()
def _group() -> None:
    """Keep `deepspeed` a sub-command although it is the only one."""


@app.command("deepspeed", help=DEEPSPEED_HELP)
def deepspeed(
    config: Annotated[Path, typer.Argument(metavar="DS_CONFIG", help="The DeepSpeed configuration.")],
    out: Annotated[Path | None, typer.Option(help="Job file to write.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse if the job would do anything otherwise than DeepSpeed.")
    ] = False,
    world: Annotated[int, typer.Option(min=0, help="Number of data-parallel ranks, where batch sizes need it.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --out.")] = False,
) -> None:
    from rich.console import Console

    from windlass.dist.errors import ConfigError
    from windlass.launch.deepspeed_import import import_deepspeed, read_deepspeed

    if out is not None and out.exists() and not force:
        raise ConfigError(f"--out {out}: exists already. Give another file, or --force to replace it.")
    imported = import_deepspeed(read_deepspeed(config), world)
    text = imported.yaml(config.name)
    console = Console(stderr=out is None)
    _print_table(imported, console if console.is_terminal else Console(stderr=out is None, width=160))
    problem = _problem(text, world)
    if problem:
        typer.echo(f"As it is, `windlass plan` refuses the job: {problem}", err=True)
    if strict and (imported.losses or problem):
        keys = ", ".join(dict.fromkeys(row.key for row in imported.losses)) or "the job does not plan"
        raise ConfigError(f"--strict: {config}: would not do the same: {keys}. Change these, or leave --strict out.")
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}. Give a file in a folder that can be written.") from error
    typer.echo(f"wrote {out}. Look at it with: windlass config show {out} --given")


def _problem(text: str, world: int) -> str:
    """Return why the job cannot be planned as it is, if so."""
    import tempfile

    from windlass.dist.errors import ConfigError, PlanError
    from windlass.launch.check import check_job
    from windlass.launch.config import load_job

    with tempfile.TemporaryDirectory(prefix="windlass-") as folder:
        path = Path(folder) / "job.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            loaded = load_job(path)
            check_job(loaded, world or loaded.config.launch.workers, to_run=False)
        except (ConfigError, PlanError) as error:
            return str(error).replace(f"{path}:", "line ")
    return ""


def _print_table(imported: Imported, console: Console) -> None:
    from collections import Counter

    from rich.table import Table
    from rich.text import Text

    from windlass.launch.deepspeed_translation import DIFFERS, FILLED, MISSING, SAME, UNNEEDED
    from windlass.launch.job import show_value

    styles = {SAME: "green", FILLED: "cyan", UNNEEDED: "dim", DIFFERS: "yellow", MISSING: "bold red"}
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title, ratio in (("DeepSpeed", 4), ("value", 2), ("", 1), ("became", 4), ("why", 6)):
        table.add_column(title, ratio=ratio, overflow="fold")
    for row in imported.rows:
        value = "" if row.value is None else f"{row.value:g}" if isinstance(row.value, float) else show_value(row.value)
        became = row.became or "-"
        table.add_row(
            *(Text(part) for part in (row.key, value)), Text(row.fate, styles[row.fate]), became, Text(row.why)
        )
    console.print(table)
    counts = Counter(row.fate for row in imported.rows)
    console.print(", ".join(f"[{styles[fate]}]{counts[fate]} {fate}[/]" for fate in styles if counts[fate]))
