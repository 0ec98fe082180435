"""From text to a token folder: parallel over units of input, resumable after any interruption.

Each unit of work becomes one shard per split and one journal file in `.units/`. A unit whose inputs, tokenizer and
settings are unchanged is not redone. The cut into units depends on the inputs only, and a document's split on its
content only, so the result is the same for any number of workers. Must not know: terminals, samples.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from windlass.data.documents import check_on_error
from windlass.data.facts import FACTS, SPLITS, UNITS, Facts, SplitFacts, TokenizerFacts, read_facts
from windlass.data.shards import write_file
from windlass.data.sources import Filter, Unit, find_pieces, plan_units
from windlass.data.tokenizer import Tokenizer, load_tokenizer
from windlass.data.unit import Settings, UnitResult, journal_path, read_finished, tokenize_unit, unit_key
from windlass.dist.errors import DataError

_SHARD_NAME = re.compile(r"\.?(train|validation)-\d{5,}\.parquet(\.tmp)?")
_LISTED = 1000  # skipped inputs named in facts.json; all are counted


@dataclass(frozen=True)
class Progress:
    """How far `prepare` is. Units: input bytes, documents, tokens."""

    done_bytes: int
    total_bytes: int
    documents: int
    tokens: int
    units_reused: int


def prepare(
    sources: Sequence[str | Path],
    out: str | Path,
    tokenizer: str | Path = "bytes",
    *,
    validation: float = 0.01,
    workers: int = 0,
    on_error: str = "stop",
    text_field: str = "text",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_document_bytes: int = 256 << 10,
    group_tokens: int = 256 << 10,
    unit_bytes: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> Facts:
    """Tokenize text into a folder of shards.

    `validation` is the share of documents held out, by a hash of their content. `workers` 0 is one per core.
    `include` and `exclude` are shell patterns for what is found in folders. `max_document_bytes` cuts longer plain text
    files at line ends. `progress` is called after every unit.
    Invariant: the folder has a `facts.json` only when it is complete.
    Raises:    DataError naming the input that is wrong; what is finished stays and is not redone.
    """
    settings = Settings(validation, text_field, max_document_bytes, group_tokens, on_error)
    _check_settings(settings)
    out = Path(out)
    loaded = load_tokenizer(tokenizer)
    files = find_pieces(sources, out, Filter(tuple(include), tuple(exclude)))
    if not files:
        raise DataError(f"no input files in {', '.join(map(str, sources))}")
    units = plan_units(files, unit_bytes)
    with _claimed(out):
        keys = [unit_key(unit, loaded.facts, settings) for unit in units]
        done = {u.index: r for u in units if (r := read_finished(out, u, keys[u.index])) is not None}
        todo = [u for u in units if u.index not in done]
        if todo:
            (out / FACTS).unlink(missing_ok=True)
        report = _Reporter(progress, sum(u.cost_bytes for u in units), done, {u.index: u.cost_bytes for u in units})
        for unit, result in _run(todo, str(tokenizer), loaded, settings, out, workers):
            done[unit.index] = result
            report.finished(unit, result)
        facts = _facts(out, loaded.facts, settings, sources, [done[u.index] for u in units], str(loaded.dtype))
        _remove_stale(out, facts, len(units))
        loaded.save(out)
        write_file(out / FACTS, facts.to_json().encode("utf-8"))
    return read_facts(out)


def _check_settings(settings: Settings) -> None:
    if not 0 <= settings.validation < 1:
        raise DataError(f"--validation {settings.validation}: a share of the documents, at least 0 and below 1")
    check_on_error(settings.on_error)
    for name in ("max_document_bytes", "group_tokens"):
        if getattr(settings, name) < 16:
            raise DataError(f"--{name.replace('_', '-')} {getattr(settings, name)}: must be at least 16")


@contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Hold the output folder for this process; another one that prepares into it is an error."""
    try:
        known = not out.exists() or not any(out.iterdir()) or (out / UNITS).is_dir()
        if not known:
            raise DataError(f"--out {out}: not empty and not written by `windlass data prepare`. Name a new folder.")
        (out / UNITS).mkdir(parents=True, exist_ok=True)
        lock = open(out / UNITS / "lock", "wb")  # noqa: SIM115
    except OSError as e:
        raise DataError(f"--out {out}: cannot be written ({e.strerror})") from e
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise DataError(f"--out {out}: another `windlass data prepare` is writing this folder") from e
        yield


def _run(
    units: list[Unit], spec: str, tokenizer: Tokenizer, settings: Settings, out: Path, workers: int
) -> Iterator[tuple[Unit, UnitResult]]:
    workers = min(workers or len(os.sched_getaffinity(0)), len(units))
    if workers <= 1:
        for unit in units:
            yield unit, tokenize_unit(unit, tokenizer, settings, out)
        return
    # spawn: the tokenizer library's threads do not survive a fork
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (spec, tokenizer.facts))
    try:
        futures = {pool.submit(_work, unit, settings, out): unit for unit in units}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as e:
        raise DataError(
            f"a worker of `windlass data prepare` died ({workers} run at once; out of memory?). Run it again with a "
            f"smaller --workers: finished parts in {out} are kept."
        ) from e
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker_tokenizer: Tokenizer | None = None


def _start_worker(spec: str, facts: TokenizerFacts) -> None:
    global _worker_tokenizer
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # the shell ignores it for background jobs
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker without a traceback
    threading.Thread(target=_follow_parent, daemon=True).start()
    _worker_tokenizer = load_tokenizer(spec)
    if _worker_tokenizer.facts != facts:
        raise DataError(f"tokenizer {spec}: changed while preparing")


def _follow_parent() -> None:
    """End with the parent: a pool worker whose parent was killed would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(unit: Unit, settings: Settings, out: Path) -> UnitResult:
    assert _worker_tokenizer is not None
    return tokenize_unit(unit, _worker_tokenizer, settings, out)


def _facts(
    out: Path,
    tokenizer: TokenizerFacts,
    settings: Settings,
    sources: Sequence[str | Path],
    results: list[UnitResult],
    dtype: str,
) -> Facts:
    splits = {}
    for split in SPLITS:
        shards = tuple(r.shards[split] for r in results if split in r.shards)
        groups = [group for shard in shards for group in shard.groups]
        splits[split] = SplitFacts(
            documents=sum(documents for documents, _ in groups),
            tokens=sum(tokens for _, tokens in groups),
            text_bytes=sum(r.text_bytes[split] for r in results),
            shards=shards,
        )
    problems = [p for r in results for p in r.problems]
    not_text = [p for r in results for p in r.not_text]
    if not splits["train"].documents:
        raise DataError(_nothing(sources, len(problems), len(not_text), splits["validation"].documents))
    skipped: dict[str, Any] = {
        "problems": {"count": len(problems), "first": problems[:_LISTED]},
        "not_text": {"count": len(not_text), "first": not_text[:_LISTED]},
        "empty_documents": sum(r.num_empty for r in results),
    }
    largest = max(r.max_token_id for r in results)
    return Facts(out, tokenizer, dtype, largest, splits, tuple(map(str, sources)), asdict(settings), skipped)


def _nothing(sources: Sequence[str | Path], problems: int, not_text: int, validation: int) -> str:
    if validation:
        return f"all {validation} documents fell into the validation split: lower --validation or add documents"
    return (
        f"no documents in {', '.join(map(str, sources))}: {not_text} files are not UTF-8 text, {problems} inputs were "
        "skipped as damaged, the rest is empty"
    )


def _remove_stale(out: Path, facts: Facts, num_units: int) -> None:
    """Remove shards and journal entries of an earlier, different cut, and temporary files of a killed run."""
    keep = {shard.name for split in facts.splits.values() for shard in split.shards}
    keep |= {journal_path(out, index).name for index in range(num_units)} | {"lock"}
    for path in [*out.iterdir(), *(out / UNITS).iterdir()]:
        ours = path.parent.name == UNITS or _SHARD_NAME.fullmatch(path.name)
        if ours and path.name not in keep:
            path.unlink()


class _Reporter:
    def __init__(
        self,
        progress: Callable[[Progress], None] | None,
        total_bytes: int,
        done: dict[int, UnitResult],
        cost_bytes: dict[int, int],
    ) -> None:
        self._progress = progress
        self._state = Progress(0, total_bytes, 0, 0, len(done))
        for index, result in done.items():
            self._add(cost_bytes[index], result)
        if progress is not None:
            progress(self._state)

    def _add(self, cost_bytes: int, result: UnitResult) -> None:
        groups = [group for shard in result.shards.values() for group in shard.groups]
        self._state = replace(
            self._state,
            done_bytes=self._state.done_bytes + cost_bytes,
            documents=self._state.documents + sum(documents for documents, _ in groups),
            tokens=self._state.tokens + sum(tokens for _, tokens in groups),
        )

    def finished(self, unit: Unit, result: UnitResult) -> None:
        self._add(unit.cost_bytes, result)
        if self._progress is not None:
            self._progress(self._state)
