"""What the rules of a translation from DeepSpeed work on: the given keys, the job's keys, a row for every decision.

Must not know: any rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from windlass.dist.errors import ConfigError
from windlass.launch.job import show_value

SAME = "same"  # means the same here
FILLED = "filled in"  # "auto", or not given: the value that DeepSpeed or Hugging Face's Trainer takes
UNNEEDED = "not needed"  # no counterpart, and nothing is lost
DIFFERS = "differs"  # the job does something else than DeepSpeed
MISSING = "missing"  # the job does not do it
LOSSES = (DIFFERS, MISSING)

# What Hugging Face's Trainer writes for "auto" when it is given no argument for it.
# Source: transformers 5.23.0, TrainingArguments and integrations/deepspeed.py
AUTO: Mapping[str, tuple[Any, str]] = {
    "train_micro_batch_size_per_gpu": (8, "per_device_train_batch_size"),
    "gradient_accumulation_steps": (1, "gradient_accumulation_steps"),
    "gradient_clipping": (1.0, "max_grad_norm"),
    "optimizer.params.lr": (5e-5, "learning_rate"),
    "optimizer.params.betas": ((0.9, 0.999), "adam_beta1, adam_beta2"),
    "optimizer.params.eps": (1e-8, "adam_epsilon"),
    "optimizer.params.weight_decay": (0.0, "weight_decay"),
    "scheduler.params.warmup_min_lr": (0.0, ""),
    "scheduler.params.warmup_max_lr": (5e-5, "learning_rate"),
    "scheduler.params.warmup_num_steps": (0, "warmup_steps"),
    "bf16.enabled": (False, "bf16"),
    "fp16.enabled": (False, "fp16"),
}


@dataclass(frozen=True)
class Row:
    """What became of a key of DeepSpeed's. `value` is None where it was not given."""

    key: str
    value: Any
    became: str
    why: str
    fate: str


class Translation:
    """A translation under way. `given` is read by dotted path; `put` and `note` say what became of a key."""

    def __init__(self, given: Mapping[str, Any], world: int = 0) -> None:
        self.given = given
        self.world = world
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.rows: list[Row] = []

    @property
    def seen(self) -> set[str]:
        return {row.key for row in self.rows}

    def put(self, source: str, target: str, value: Any, why: str = "", fate: str = "") -> None:
        """Set a key of the job because of one of DeepSpeed's, given or not."""
        self.values[target] = value
        self.sources[target] = source if source in self.given else f"DeepSpeed's default of {source}"
        fate = fate or (SAME if self.has(source) else FILLED)
        why = "; ".join(text for text in (self._origin(source), why) if text)
        self.rows.append(Row(source, self.given.get(source), f"{target} = {show_value(value)}", why, fate))

    def derive(self, source: str, target: str, value: Any, why: str) -> None:
        """Set a key of the job that follows from several of DeepSpeed's."""
        self.values[target] = value
        self.sources[target] = source
        self.rows.append(Row(source, self.given.get(source), f"{target} = {show_value(value)}", why, FILLED))

    def note(self, source: str, why: str, fate: str = UNNEEDED) -> None:
        """Say that a key sets nothing."""
        self.rows.append(Row(source, self.given.get(source), "", why, fate))

    def _origin(self, source: str) -> str:
        if self.given.get(source) is None:
            return "not given: DeepSpeed's default"
        if self.given[source] == "auto" and source in AUTO:
            name = AUTO[source][1]
            return f"auto: default of TrainingArguments.{name}" if name else "auto: what the Trainer takes"
        return "auto: DeepSpeed's default" if self.given[source] == "auto" else ""

    def has(self, key: str) -> bool:
        """Return whether a key is given with a value of its own."""
        return self.given.get(key) not in (None, "auto")

    def number(self, key: str, default: Any = None) -> Any:
        """Return a number; `default` where none is given."""
        value = self._value(key, default)
        if value is not default and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise self._wrong(key, "a number")
        if isinstance(value, float) and math.isnan(value):
            raise self._wrong(key, "a number")
        return value

    def count(self, key: str, default: Any = None, least: int = 0) -> Any:
        """Return a whole number, which may be written as 5e8."""
        value = self.number(key, default)
        if value is default:
            return default
        if not math.isfinite(value) or int(value) != value or value < least:
            raise self._wrong(key, f"a whole number of {least} or more")
        return int(value)

    def flag(self, key: str) -> bool:
        """Return whether a key is switched on."""
        value = self._value(key, False)
        if value not in (True, False):
            raise self._wrong(key, "true or false")
        return bool(value)

    def text(self, key: str, default: str = "") -> str:
        """Return text."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "text")
        return value

    def _value(self, key: str, default: Any) -> Any:
        value = self.given.get(key)
        if value == "auto":
            return AUTO[key][0] if key in AUTO else default
        return default if value is None else value

    def _wrong(self, key: str, what: str) -> ConfigError:
        return ConfigError(f"{key} = {show_value(self.given[key])}: must be {what}.")
