"""`windlass quickstart`: the whole story of a run in a few minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

HELP = """Pretrain a small decoder for real: text, tokenizer, two workers, stop, resume on one, export, reload.

Needs no data, no network and no accelerator: the text is the source code of Python's standard library. Every command
it runs is printed, so each line can be copied and changed.

Example:

    windlass quickstart --dir my-first-run
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("quickstart", help=HELP)(quickstart)


def quickstart(
    folder: Annotated[
        Path, typer.Option("--dir", help="Folder to write; new, empty, or from an earlier quick start.")
    ] = Path(".quickstart"),
) -> None:
    from windlass.launch.quickstart import Quickstart

    Quickstart(folder).tell()
