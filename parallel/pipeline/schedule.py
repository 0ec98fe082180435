"""A schedule: for every pipeline rank the list of its actions, and the files it can be written to and read from.

The text form is made for people and golden files, a header and one line per rank:

    # name: 1f1b
    # stage_rank: 0 1
    # vocab: 0
    # micro_batches: 2
    # limits: 2 1
    ## a comment
    0: 0F0 0F1 0B0 0B1
    1: 1F0 1B0 1F1 1B1

Must not know: where schedules come from, whether the order works (verify.py), how long it takes (simulate.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from windlass.dist.errors import PlanError
from windlass.parallel.pipeline.action import KINDS, Action

_HEADER = re.compile(r"#\s*(\w+)\s*:\s*(.*)")
_ROW = re.compile(r"(\d+)\s*:(.*)")


@dataclass(frozen=True)
class Layout:
    """Which rank holds which stage, and whether the vocabulary is cut over all ranks.

    `vocab` is 0 (embedding and head belong to the first and the last stage), 1 or 2 (cut over the ranks; the number
    of the algorithm of arXiv:2411.05288).
    """

    num_ranks: int
    stage_rank: tuple[int, ...]
    vocab: int = 0

    def __post_init__(self) -> None:
        if self.num_ranks < 1:
            raise PlanError(f"a pipeline of {self.num_ranks} ranks: it needs at least 1")
        for stage, rank in enumerate(self.stage_rank):
            if not 0 <= rank < self.num_ranks:
                raise PlanError(
                    f"stage {stage} lies on rank {rank}: with {self.num_ranks} ranks, 0 to {self.num_ranks - 1} work"
                )
        if idle := sorted(set(range(self.num_ranks)) - set(self.stage_rank)):
            raise PlanError(
                f"stage_rank {self.stage_rank}: every one of {self.num_ranks} ranks needs a stage, {idle[0]} has none"
            )
        if self.vocab not in (0, 1, 2):
            raise PlanError(f"vocab {self.vocab}: 0 (off) or the algorithm, 1 or 2")

    @property
    def num_stages(self) -> int:
        return len(self.stage_rank)

    @property
    def embed_rank(self) -> int:
        return self.stage_rank[0]

    @property
    def head_rank(self) -> int:
        return self.stage_rank[-1]

    def stages_of(self, rank: int) -> tuple[int, ...]:
        return tuple(stage for stage, home in enumerate(self.stage_rank) if home == rank)

    def rank_of(self, action: Action) -> int:
        return self.stage_rank[action.place] if KINDS[action.kind].place == "stage" else action.place


@dataclass(frozen=True)
class Schedule:
    """What every rank does, in order.

    `limits` declares for every rank how many stage activations it holds at most: forwards whose B or W has not run.
    Communication actions only begin a transfer; compute actions wait for what they need.
    """

    name: str
    layout: Layout
    num_micro_batches: int
    ranks: tuple[tuple[Action, ...], ...]
    limits: tuple[int, ...] | None = None
    forward_only: bool = False

    def __post_init__(self) -> None:
        if self.num_micro_batches < 1:
            raise PlanError(f"schedule '{self.name}' has {self.num_micro_batches} micro-batches; it needs at least 1")
        for what, rows in (("action lists", self.ranks), ("limits", self.limits)):
            if rows is not None and len(rows) != self.layout.num_ranks:
                raise PlanError(
                    f"schedule '{self.name}': {what} given: {len(rows)}, ranks: {self.layout.num_ranks}. "
                    "Give one per rank"
                )

    @cached_property
    def lowered(self) -> bool:
        """Whether communication is written out."""
        return any(KINDS[action.kind].lane != "compute" for row in self.ranks for action in row)

    def to_json(self) -> dict[str, Any]:
        """Return plain data for a JSON file."""
        return {
            "name": self.name,
            "stage_rank": list(self.layout.stage_rank),
            "vocab": self.layout.vocab,
            "micro_batches": self.num_micro_batches,
            "limits": None if self.limits is None else list(self.limits),
            "forward_only": self.forward_only,
            "ranks": [[str(action) for action in row] for row in self.ranks],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], source: str = "schedule") -> Schedule:
        """Read what to_json wrote; `source` is named in errors.

        Raises:  PlanError naming the first place that is wrong
        """
        if not isinstance(data, dict):
            raise PlanError(f"{source}: a schedule is an object with the keys {', '.join([*_FIELDS, 'ranks'])}")
        fields = {key: value for key, value in data.items() if key != "ranks" and value is not None}
        rows = data.get("ranks")
        if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
            raise PlanError(
                f"{source}: 'ranks' must be a list with one list of actions per rank, such as [['0F0', '0B0']]"
            )
        return _assemble(
            fields, rows, lambda key: f"{source}, '{key}'", lambda r, i: f"{source}, ranks[{r}][{i}]", source
        )

    def to_text(self) -> str:
        """Return the text form."""
        fields = {key: value for key, value in self.to_json().items() if key != "ranks" and value is not None}
        header = [f"# {key}: {_FIELDS[key].write(value)}" for key, value in fields.items()]
        rows = [" ".join([f"{rank}:", *map(str, row)]) for rank, row in enumerate(self.ranks)]
        return "\n".join([*header, *rows]) + "\n"

    @classmethod
    def from_text(cls, text: str, source: str = "schedule") -> Schedule:
        """Read the text form; `source` is named in errors.

        Raises:  PlanError naming the line and the word that is wrong, and what would be right
        """
        fields: dict[str, Any] = {}
        rows: dict[int, list[str]] = {}
        lines: dict[str | int, int] = {}  # where each key and each rank stands
        for number, line in enumerate((raw.strip() for raw in text.splitlines()), 1):
            header, row = _HEADER.fullmatch(line), _ROW.fullmatch(line)
            key: str | int
            if row:
                key = int(row[1])
                rows[key] = row[2].split()
            elif header:
                key = header[1]
                fields[key] = header[2]
            elif not line or line.startswith("##"):
                continue
            else:
                raise PlanError(
                    f"{source}, line {number}: '{line[:40]}' is neither a header '# key: value', a comment '## ...' "
                    "nor a rank's actions '0: 0F0 0B0'"
                )
            if key in lines:
                raise PlanError(
                    f"{source}, line {number}: '{key}' stands in line {lines[key]} already; keep one of them"
                )
            lines[key] = number
        for rank in range(len(rows)):
            if rank not in rows:
                raise PlanError(f"{source}: no line for rank {rank}; write '{rank}: ...'")
        ordered = [rows[rank] for rank in range(len(rows))]
        return _assemble(
            fields,
            ordered,
            lambda key: f"{source}, line {lines[key]}",
            lambda r, _: f"{source}, line {lines[r]}",
            source,
        )


def load_schedule(path: str | Path) -> Schedule:
    """Read a schedule from a file: JSON if it ends in .json, text otherwise.

    Raises:  PlanError naming the file and the place in it that is wrong
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"schedule file {path} cannot be read: {error}") from error
    if path.suffix != ".json":
        return Schedule.from_text(text, str(path))
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise PlanError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
    return Schedule.from_json(data, str(path))


def write_schedule(schedule: Schedule, path: str | Path) -> None:
    """Write a schedule to a file, in the form that its name asks for."""
    path = Path(path)
    text = json.dumps(schedule.to_json(), indent=1) + "\n" if path.suffix == ".json" else schedule.to_text()
    path.write_text(text, encoding="utf-8")


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Field:
    """How one entry of the header is read, written and explained. `read` takes the words of a text or a JSON value."""

    read: Callable[[Any], Any]
    write: Callable[[Any], str]
    right: str


def _words(value: Any) -> list[Any]:
    return value.split() if isinstance(value, str) else list(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, str)) or not str(value).isdecimal():
        raise ValueError(value)
    return int(value)


def _flag(value: Any) -> bool:
    return {"True": True, "true": True, "False": False, "false": False}[str(value)]


def _numbers(value: Any) -> tuple[int, ...]:
    return tuple(_whole(word) for word in _words(value))


def _spaced(value: Iterable[int]) -> str:
    return " ".join(map(str, value))


_FIELDS = {
    "name": _Field(str, str, "a word"),
    "stage_rank": _Field(_numbers, _spaced, "the rank of every stage, such as 0 1 1 0"),
    "vocab": _Field(_whole, str, "0, 1 or 2"),
    "micro_batches": _Field(_whole, str, "their number, such as 8"),
    "limits": _Field(_numbers, _spaced, "the most stage activations in flight per rank, such as 2 1"),
    "forward_only": _Field(_flag, lambda value: str(value).lower(), "true or false"),
}


def _assemble(
    fields: dict[str, Any],
    rows: Sequence[Sequence[Any]],
    at_key: Callable[[str], str],
    at_action: Callable[[int, int], str],
    source: str,
) -> Schedule:
    """Build a schedule from header values and words, naming the place of the first that is wrong."""
    read: dict[str, Any] = {"name": Path(source).stem, "vocab": 0, "limits": None, "forward_only": False}
    for key, value in fields.items():
        if key not in _FIELDS:
            raise PlanError(f"{at_key(key)}: there is no entry '{key}'. The entries are {', '.join(_FIELDS)}")
        try:
            read[key] = _FIELDS[key].read(value)
        except (ValueError, KeyError, TypeError) as error:
            raise PlanError(f"{at_key(key)}: {key} = {value!r}: must be {_FIELDS[key].right}") from error
    if missing := [key for key in _FIELDS if key not in read]:
        raise PlanError(f"{source}: '{missing[0]}' is missing: {_FIELDS[missing[0]].right}")
    try:
        layout = Layout(len(rows), read["stage_rank"], read["vocab"])
        empty = ((),) * len(rows)
        schedule = Schedule(read["name"], layout, read["micro_batches"], empty, read["limits"], read["forward_only"])
        ranks = tuple(
            tuple(_place(word, schedule, at_action(rank, i)) for i, word in enumerate(row))
            for rank, row in enumerate(rows)
        )
        return replace(schedule, ranks=ranks)
    except PlanError as error:
        if str(error).startswith(source):
            raise
        raise PlanError(f"{source}: {error}") from error


def _place(word: Any, schedule: Schedule, where: str) -> Action:
    """Read one action and check that its numbers exist in this schedule."""
    try:
        action = Action.parse(str(word))
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from error
    kind, layout, num_micro_batches = KINDS[action.kind], schedule.layout, schedule.num_micro_batches
    count = layout.num_stages if kind.place == "stage" else layout.num_ranks
    if action.place >= count:
        raise PlanError(f"{where}: '{word}' names {kind.place} {action.place}; there are 0 to {count - 1}")
    if not kind.ordinal and action.number >= num_micro_batches:
        raise PlanError(f"{where}: '{word}' names micro-batch {action.number}; there are 0 to {num_micro_batches - 1}")
    return action
