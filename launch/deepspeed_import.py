"""A DeepSpeed configuration as a job: what every key becomes, what has no counterpart, and why.

Every key that is given ends in at least one row of the result, so nothing is dropped without a word; a key that
DeepSpeed does not know is refused, also where DeepSpeed would accept it in silence. Must not know: the command line,
DeepSpeed itself (its keys are a table, `deepspeed_keys.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from windlass.dist.errors import ConfigError
from windlass.launch.deepspeed_keys import ALIASES, GROUPS, KEYS
from windlass.launch.deepspeed_rules import RULES, check_optimizer_type
from windlass.launch.deepspeed_translation import LOSSES, MISSING, UNNEEDED, Row, Translation
from windlass.launch.job import job_keys
from windlass.launch.suggest import nearest_key

# What users write for a key of DeepSpeed's that is spelt quite differently.
_MEANT = {
    "optimizer.params.max_grad_norm": "gradient_clipping",
    "max_grad_norm": "gradient_clipping",
    "optimizer.params.learning_rate": "optimizer.params.lr",
    "optimizer.params.adamw_mode": "optimizer.params.adam_w_mode",
}


@dataclass(frozen=True)
class Imported:
    """The keys of a job with what they were made from, and one row or more for every key of DeepSpeed's."""

    values: Mapping[str, Any]
    sources: Mapping[str, str]  # key of the job -> key of DeepSpeed's
    rows: tuple[Row, ...]

    @property
    def losses(self) -> list[Row]:
        """What the job does otherwise than DeepSpeed, or not at all."""
        return [row for row in self.rows if row.fate in LOSSES]

    def yaml(self, source: str) -> str:
        """Write the job file, with the origin of every key."""
        lines = [
            f"# From {source} by `windlass import deepspeed`.",
            "# Not said there: model.*, data.path, train.seq_len"
            + ("" if "train.steps" in self.values else ", train.steps"),
        ]
        group = ""
        for path in job_keys():
            if path not in self.values:
                continue
            head, _, name = path.partition(".")
            if head != group:
                group = head
                lines.append(f"\n{group}:")
            lines.append(f"  {name}: {_yaml(self.values[path])}  # {self.sources[path]}")
        return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    """Write a value on one line: JSON, which is YAML, but for plain words."""
    plain = isinstance(value, str) and re.fullmatch("[a-z][a-z0-9-]*", value) and value not in ("null", "true", "false")
    return str(value) if plain else json.dumps(value, ensure_ascii=False)


def import_deepspeed(config: Mapping[str, Any], world: int = 0) -> Imported:
    """Translate a DeepSpeed configuration; `world` is the number of data-parallel ranks (0: not known).

    Raises: ConfigError for keys that DeepSpeed does not know, values that cannot be right, and what a job cannot say
    """
    translation = Translation(_flatten(config), world)
    for rule in RULES:
        rule(translation)
    for key, value in translation.given.items():
        if key in translation.seen:
            continue
        known = KEYS[key]
        lost = bool(known.why) and known.loses(value)
        why = known.why or "without effect in DeepSpeed, too, beside the other keys of this file"
        translation.note(key, why, MISSING if lost else UNNEEDED)
    return Imported(translation.values, translation.sources, tuple(translation.rows))


def read_deepspeed(path: Path) -> dict[str, Any]:
    """Read the file.

    Raises: ConfigError if it cannot be read, is no JSON object, or gives a key twice
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}. Give a DeepSpeed configuration that can be read.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno}). Comments and trailing commas, "
            "which DeepSpeed accepts, must go."
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f'{path}: must be a JSON object of keys, such as {{"zero_optimization": {{"stage": 3}}}}.')
    return config


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"given twice: {', '.join(twice)}. Keep one of the two.")
    return dict(pairs)


def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values by dotted path under DeepSpeed's present names.

    Raises: ConfigError naming every key that DeepSpeed does not know
    """
    check_optimizer_type(config)  # whose parameters have other names
    given: dict[str, Any] = {}
    unknown: list[str] = []
    _collect(config, "", given, unknown)
    if unknown:
        raise ConfigError(
            "keys that DeepSpeed does not know" + "".join(f"\n  {_guess(key)}" for key in unknown) + "\n"
            "Correct or remove them. (DeepSpeed itself accepts unknown names outside its sections in silence.)"
        )
    return given


def _collect(node: Mapping[str, Any], prefix: str, given: dict[str, Any], unknown: list[str]) -> None:
    for name, value in node.items():
        path = ALIASES.get(prefix + name, prefix + name)
        if path in KEYS:
            members = KEYS[path].members
            if members and isinstance(value, Mapping):
                unknown += [f"{path}.{member}" for member in value if member not in members]
            if path in given:
                raise ConfigError(f"{path}: given twice, under two names. Keep one of the two.")
            given[path] = value
        elif path in GROUPS:
            if isinstance(value, Mapping):
                _collect(value, f"{path}.", given, unknown)
            elif path == "zero_optimization" and isinstance(value, bool):
                given["zero_optimization.stage"] = int(value)  # its form of 2020
            elif value is not None:
                raise ConfigError(f"{path} = {json.dumps(value)}: must be a mapping of keys.")
        else:
            unknown.append(path)


def _guess(key: str) -> str:
    members = [f"{path}.{member}" for path, known in KEYS.items() for member in known.members or ()]
    match = _MEANT.get(key) or nearest_key(key, [*KEYS, *GROUPS, *members])
    return f"{key}" + (f": did you mean '{match}'?" if match else "")
