"""`windlass checkpoint`: look at, verify and export what training saved. Needs no configuration and no devices."""

from __future__ import annotations

import json
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from windlass.checkpoint.manifest import Manifest
    from windlass.model.config import ModelConfig

app = typer.Typer(
    help="List, verify and export checkpoints.\n\nExample: windlass checkpoint ls runs/tiny", no_args_is_help=True
)

Target = Annotated[
    str,
    typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run folder, one step-XXXXXXXX folder, or the URL of either."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


class Format(str, Enum):
    """What a checkpoint can be turned into."""

    hf = "hf"


class ExportDtype(str, Enum):
    """Dtypes of exported weights."""

    bf16 = "bf16"
    fp32 = "fp32"


@app.command("ls", help="List the checkpoints of a run, newest first.\n\nExample: windlass checkpoint ls runs/tiny")
def list_command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, its folder checkpoints, or a URL of them.")],
    as_json: AsJson = False,
) -> None:
    from windlass.checkpoint.manifest import readable_bytes
    from windlass.checkpoint.store import checkpoints_root, list_checkpoints
    from windlass.dist.errors import CheckpointError

    if "://" not in run and not Path(run).is_dir():
        raise CheckpointError(f"{run}: no such folder. Give a run folder (it holds checkpoints/)")
    root = checkpoints_root(run)
    found = list_checkpoints(root)
    now = time.time()
    if as_json:
        rows = [
            {
                "folder": str(info.folder),
                "step": info.step,
                "bytes": info.num_bytes,
                "tensors": info.num_tensors,
                "world_size": info.world_size,
                "saved_at": info.saved_at,
                "problem": info.problem,
            }
            for info in found
        ]
        typer.echo(json.dumps(rows, indent=1))
        return
    if not found:
        typer.echo(f"no checkpoints in {root}")
        return
    table = [("STEP", "BYTES", "TENSORS", "WORLD", "AGE", "VALID?")]
    for info in found:
        if info.problem is not None:
            table.append((str(info.step), "", "", "", "", f"no: {info.problem}"))
            continue
        age = _age(now - info.saved_at)
        size = readable_bytes(info.num_bytes)
        table.append((str(info.step), size, str(info.num_tensors), str(info.world_size), age, "yes"))
    widths = [max(len(row[column]) for row in table) for column in range(5)]
    for row in table:
        typer.echo("  ".join([*(cell.rjust(w) for cell, w in zip(row[:5], widths, strict=True)), row[5]]))
    typer.echo(f"(by manifest and file sizes; windlass checkpoint verify {run} reads every byte)")


@app.command(
    "verify",
    help="Read every byte and compare it with its checksum. Exit code 8 names damage.\n\n"
    "Examples:\n\n"
    "    windlass checkpoint verify runs/tiny\n\n"
    "    windlass checkpoint verify runs/tiny/checkpoints/step-00000100",
)
def verify_command(path: Target) -> None:
    from windlass.checkpoint.manifest import MANIFEST_NAME
    from windlass.checkpoint.store import checkpoints_root, is_checkpoint, list_checkpoints, verify
    from windlass.dist.errors import CheckpointError

    folders = [path] if is_checkpoint(path) else [info.folder for info in list_checkpoints(checkpoints_root(path))]
    if not folders:
        raise CheckpointError(f"{path} holds no checkpoint: neither {MANIFEST_NAME} nor step-XXXXXXXX folders")
    damaged = 0
    for folder in folders:
        started = time.monotonic()
        problems = verify(folder)
        if problems:
            damaged += 1
            typer.echo(f"{folder}: DAMAGED")
            for problem in problems:
                typer.echo(f"  {problem}")
        else:
            typer.echo(f"{folder}: valid ({time.monotonic() - started:.1f} s)")
    if damaged:
        raise typer.Exit(CheckpointError.exit_code)


@app.command(
    "export",
    help="Turn a checkpoint into a folder for other tools, one tensor in memory at a time. Of a run, the newest valid "
    "checkpoint is taken.\n\n"
    "Examples:\n\n"
    "    windlass checkpoint export runs/tiny --to hf --out tiny-hf\n\n"
    "    windlass checkpoint export runs/tiny/checkpoints/step-00000100 --to hf --out tiny-hf --dtype bf16",
)
def export_command(
    path: Target,
    out: Annotated[Path, typer.Option("--out", help="Folder to create.")],
    to: Annotated[Format, typer.Option("--to", help="hf: a Hugging Face folder for transformers.")] = Format.hf,
    dtype: Annotated[ExportDtype, typer.Option("--dtype", help="Dtype of the written weights.")] = ExportDtype.fp32,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="Tokenizer folder to include instead of the recorded one.")
    ] = None,
) -> None:
    import torch

    from windlass.checkpoint.reader import CheckpointReader
    from windlass.checkpoint.store import find_checkpoint
    from windlass.model.hf_write import export_hf

    folder = find_checkpoint(path)
    started = time.monotonic()
    with CheckpointReader(folder) as reader:
        config = _model_config(folder, reader.manifest)
        tokenizer_folder, eos_token_id = _tokenizer(reader.manifest.extra, tokenizer)
        export_hf(
            out,
            config,
            lambda name: reader.read(f"model.{name}"),
            {ExportDtype.bf16: torch.bfloat16, ExportDtype.fp32: torch.float32}[dtype],
            tokenizer_folder=tokenizer_folder,
            eos_token_id=eos_token_id,
        )
        reshaped = _reshaped_logits(reader.manifest.extra)
    typer.echo(f"{folder} -> {out} ({to.value}, {dtype.value}, {time.monotonic() - started:.1f} s)")
    if reshaped:
        typer.echo(
            f"warning: trained with {reshaped}, which {out}/config.json cannot say: apply it to the logits yourself, "
            "or probabilities differ",
            err=True,
        )


def _reshaped_logits(extra: dict[str, Any]) -> str:
    """Return the settings of the loss that belong to the model's probabilities and that its export cannot hold."""
    plain = {"loss.softcap": 0, "loss.temperature": 1}
    layout = extra.get("layout", {})
    return " and ".join(f"{key}={layout[key]}" for key, usual in plain.items() if layout.get(key, usual) != usual)


def _model_config(folder: Path | str, manifest: Manifest) -> ModelConfig:
    from dataclasses import fields

    from windlass.dist.errors import CheckpointError
    from windlass.model.config import ModelConfig

    saved = manifest.extra.get("model")
    if not isinstance(saved, dict):
        raise CheckpointError(
            f"checkpoint {folder} does not say what model it holds: it was not written by a training run"
        )
    unknown = sorted(set(saved) - {field.name for field in fields(ModelConfig)})
    if unknown:
        raise CheckpointError(
            f"checkpoint {folder} describes its model with {', '.join(unknown)}, which this Windlass does not know: "
            f"use the one that wrote it ({manifest.extra.get('versions', {}).get('windlass', 'version not recorded')})"
        )
    return ModelConfig(**saved)


def _tokenizer(extra: dict[str, Any], given: Path | None) -> tuple[Path | None, int | None]:
    """Return the tokenizer folder to include and its end-of-document id; say so where it is not the model's own."""
    from windlass.data.tokenizer import load_tokenizer

    recorded = extra.get("tokenizer") or {}
    folder = given or (Path(recorded["folder"]) if recorded.get("folder") else None)
    if folder is None:
        return None, None
    if given is None and not (folder / "tokenizer.json").is_file():
        typer.echo(f"tokenizer in {folder} is gone: exported without one (--tokenizer FOLDER adds it)", err=True)
        return None, None
    facts = load_tokenizer(folder).facts
    if recorded.get("digest") not in (None, facts.digest):
        typer.echo(f"tokenizer in {folder} is not the one that the model was trained with", err=True)
        if given is None:
            typer.echo("exported without one (--tokenizer FOLDER adds it)", err=True)
            return None, None
    return folder, facts.eos_id


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(seconds, 0):.0f} s"
