"""`windlass evaluate`: what a checkpoint makes of held-out text, as one number and, if wanted, per token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

HELP = """Evaluate a checkpoint (or the newest one of a run) on held-out text, in this process.

Data, sequence length and loss settings are those of the run; --data and --seq-len change them. --log-probs writes the
log-probability of every token to a Parquet file: sample, position, token, label, log_prob.

Examples:

    windlass evaluate runs/tiny

    windlass evaluate runs/tiny/checkpoints/step-00000100 --split train --samples 64

    windlass evaluate runs/tiny --data tokens/ --log-probs scores.parquet
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("evaluate", help=HELP)(evaluate)


def evaluate(
    target: Annotated[Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run folder or a checkpoint folder.")],
    data: Annotated[str, typer.Option(help="Folder written by `windlass data prepare` (default: the run's).")] = "",
    split: Annotated[str, typer.Option(help="validation or train.")] = "validation",
    samples: Annotated[int, typer.Option(min=0, help="Rows (0: as many as a validation of the run).")] = 0,
    seq_len: Annotated[int, typer.Option(min=0, help="Tokens per row (0: as the run).")] = 0,
    log_probs: Annotated[Path | None, typer.Option(help="Parquet file for the score of every token.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    import json
    import math
    from dataclasses import asdict

    from rich.progress import Progress

    from windlass.dist.errors import ConfigError
    from windlass.launch.evaluate import evaluate as run

    if split not in ("validation", "train"):
        raise ConfigError(f"--split {split}: must be one of validation, train")
    with Progress(transient=True, disable=as_json) as bar:
        task = bar.add_task("evaluating", total=None)
        found = run(
            target,
            data=data,
            split=split,
            samples=samples,
            seq_len=seq_len,
            log_probs=log_probs,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if as_json:
        typer.echo(json.dumps(asdict(found)))
        return
    bits = "" if found.bits_per_byte is None else f"bits_per_byte: {found.bits_per_byte:.4f} "
    typer.echo(
        f"{found.checkpoint} (step {found.step}), {split}: loss: {found.loss:.4f} {bits}"
        f"perplexity: {math.exp(min(found.loss, 700)):.2f} tokens: {found.tokens}"
    )
    if log_probs is not None:
        typer.echo(f"written: {log_probs}")
