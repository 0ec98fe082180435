"""`windlass data`: prepare text, train a tokenizer, look into a token folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from windlass.data.facts import Facts
    from windlass.data.prepare import Progress

app = typer.Typer(help="Text and Parquet to token shards.", no_args_is_help=True)

PREPARE_HELP = """Tokenize text into a folder that training reads.

SOURCE is a folder (searched for UTF-8 text files), .txt, .jsonl with a text field, these as .gz or .zst, or .parquet
with a text column. Documents are held out for validation by a hash of their content. Interrupted or repeated, it does
only what is missing or changed.

Examples:

    windlass data prepare books/ notes.txt --out tokens

    windlass data prepare web/*.jsonl.zst --out tokens --tokenizer llama-folder --on-error skip

    windlass data prepare project/ --out tokens --include '*.py' --exclude tests
"""
TOKENIZER_HELP = """Train a byte-level BPE tokenizer, in a folder that transformers loads too.

Example:

    windlass data tokenizer books/ --vocab 4096 --out tokenizer
"""
INSPECT_HELP = """Show what a token folder holds; --verify reads every shard and exits with 4 if one is damaged.

Example:

    windlass data inspect tokens --documents 2 --verify
"""
Sources = Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Folders and files.")]
Include = Annotated[list[str] | None, typer.Option(help="In folders, take only files that match this pattern.")]
Exclude = Annotated[list[str] | None, typer.Option(help="In folders, leave out files and folders that match.")]
TextField = Annotated[str, typer.Option(help="Field of .jsonl rows or column of .parquet that holds the text.")]
OnError = Annotated[str, typer.Option(help="stop: at the first damaged input; skip: go on and list them.")]


@app.command("prepare", help=PREPARE_HELP)
def prepare(
    sources: Sources,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    tokenizer: Annotated[str, typer.Option(help="bytes, a tokenizer folder, or a tokenizer.json.")] = "bytes",
    validation: Annotated[float, typer.Option(help="Share of the documents held out.")] = 0.01,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: one per core.")] = 0,
    on_error: OnError = "stop",
    text_field: TextField = "text",
    include: Include = None,
    exclude: Exclude = None,
    max_document_bytes: Annotated[int, typer.Option(help="Cut longer text files, at line ends.")] = 256 << 10,
    group_tokens: Annotated[int, typer.Option(help="Tokens per Parquet row group.")] = 256 << 10,
) -> None:
    from windlass.data.prepare import prepare

    started = time.perf_counter()
    with _reported("tokenizing") as progress:
        facts = prepare(
            sources,
            out,
            tokenizer,
            validation=validation,
            workers=workers,
            on_error=on_error,
            text_field=text_field,
            include=include or (),
            exclude=exclude or (),
            max_document_bytes=max_document_bytes,
            group_tokens=group_tokens,
            progress=progress,
        )
    _print_skipped(facts)
    for line in _totals(facts):
        typer.echo(line)
    typer.echo(f"{out}: ready in {time.perf_counter() - started:.1f} s. Train on it with data.path={out}")


@app.command("tokenizer", help=TOKENIZER_HELP)
def tokenizer(
    sources: Sources,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    vocab: Annotated[int, typer.Option(help="Number of ids, the end-of-document token included.")] = 4096,
    max_bytes: Annotated[int, typer.Option(help="Read about this much text, spread over all of it.")] = 1 << 30,
    on_error: OnError = "stop",
    text_field: TextField = "text",
    include: Include = None,
    exclude: Exclude = None,
) -> None:
    import sys

    from windlass.data.sample import read_sample
    from windlass.data.tokenizer import train_tokenizer

    started = time.perf_counter()
    texts, findings = read_sample(
        sources,
        out,
        max_bytes=max_bytes,
        on_error=on_error,
        text_field=text_field,
        include=include or (),
        exclude=exclude or (),
    )
    trained, num_documents = train_tokenizer(texts, vocab, show_progress=sys.stderr.isatty())
    trained.save(out)
    _print_list("damaged inputs", len(findings.problems), findings.problems)
    size = trained.facts.vocab_size
    if size < vocab:
        typer.echo(f"the text supports only {size} of {vocab} ids: set model.vocab_size={size}, or give more text")
    typer.echo(
        f"{out}: {size} ids from {num_documents:,} documents in {time.perf_counter() - started:.1f} s. "
        f"Use it with --tokenizer {out} and model.vocab_size={size}"
    )


@app.command("inspect", help=INSPECT_HELP)
def inspect(
    folder: Annotated[Path, typer.Argument(help="A folder written by `windlass data prepare`.")],
    documents: Annotated[int, typer.Option(min=0, help="Print the first documents of the split as text.")] = 0,
    split: Annotated[str, typer.Option(help="train or validation: the split whose documents are printed.")] = "train",
    verify: Annotated[bool, typer.Option("--verify", help="Read every shard and check it.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    from dataclasses import asdict
    from json import dumps

    from windlass.data.facts import SPLITS
    from windlass.data.inspect import inspect_folder, read_texts
    from windlass.dist.errors import DataError

    if split not in SPLITS:
        raise typer.BadParameter(f"{split!r}: use train or validation", param_hint="--split")
    summary = inspect_folder(folder, verify=verify)
    facts = summary.facts
    if json:
        plain: dict[str, object] = {"splits": [asdict(s) for s in summary.splits], "damaged": summary.damaged}
        plain.update(dtype=facts.dtype, tokenizer=asdict(facts.tokenizer))
        plain.update(sources=facts.sources, skipped=facts.skipped)
        typer.echo(dumps(plain, indent=1))
    else:
        typer.echo(f"{folder}: from {', '.join(facts.sources)}")
        typer.echo(
            f"tokenizer {facts.tokenizer.digest[:12]}: {facts.tokenizer.vocab_size} ids, end of document "
            f"{facts.tokenizer.eos_token} = {facts.tokenizer.eos_id}, largest id {facts.max_token_id}, {facts.dtype}"
        )
        for line in _totals(facts):
            typer.echo(line)
        for part in summary.splits:
            quantiles = ", ".join(f"{q} {n:,}" for q, n in part.lengths.items())
            size = f"{part.num_shards} shards, {part.num_groups} row groups, {part.shard_bytes / 2**20:.1f} MiB"
            typer.echo(f"{part.split}: {size}; tokens per document: {quantiles or 'none'}")
        _print_skipped(facts)
        for number, text in enumerate(read_texts(folder, split, documents)):
            typer.echo(f"--- {split} document {number}\n{text}")
    if summary.damaged:
        raise DataError(f"{len(summary.damaged)} damaged: " + "\n".join(summary.damaged))
    if verify and not json:
        typer.echo("every shard is intact")


def _totals(facts: Facts) -> Iterator[str]:
    for split, totals in facts.splits.items():
        ratio = f", {totals.text_bytes / totals.tokens:.2f} bytes per token" if totals.tokens else ""
        size = f"{totals.documents:,} documents, {totals.tokens:,} tokens, {totals.text_bytes:,} bytes"
        yield f"{split}: {size}{ratio}"


def _print_skipped(facts: Facts) -> None:
    for kind, what in (("not_text", "files that are not UTF-8 text"), ("problems", "damaged inputs")):
        _print_list(what, facts.skipped[kind]["count"], facts.skipped[kind]["first"])


def _print_list(what: str, count: int, first: list[str]) -> None:
    if count:
        typer.echo(f"left out {count:,} {what}:")
        for name in first[:5]:
            typer.echo(f"  {name}")
        if count > 5:
            typer.echo("  ...")


@contextmanager
def _reported(title: str) -> Iterator[Callable[[Progress], None]]:
    """Give a callback that moves a bar on a terminal and prints a line every few seconds elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line_printer(title)
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    counts = TextColumn("{task.fields[tokens]:,} tokens")
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), counts, TimeElapsedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, tokens=0)

        def move(state: Progress) -> None:
            bar.update(task, total=state.total_bytes, completed=state.done_bytes, tokens=state.tokens)

        yield move


def _line_printer(title: str, every_s: float = 5.0) -> Callable[[Progress], None]:
    last = time.monotonic()

    def show(state: Progress) -> None:
        nonlocal last
        finished = state.done_bytes >= state.total_bytes
        if finished or time.monotonic() - last >= every_s:
            last = time.monotonic()
            share = state.done_bytes / max(state.total_bytes, 1)
            typer.echo(f"{title}: {share:.0%}, {state.documents:,} documents, {state.tokens:,} tokens", err=True)

    return show
