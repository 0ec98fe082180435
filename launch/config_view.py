"""A job's configuration to look at: as a table with meanings and origins, and as the JSON schema of all jobs."""

from __future__ import annotations

from typing import Any, get_args, get_origin

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from windlass.launch.job import SIZE_PATTERN, Key, Loaded, job_groups, job_keys, show_value

SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_LIMITS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}
_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}


def print_config(loaded: Loaded, *, only_given: bool = False, console: Console | None = None) -> None:
    """Print every key with value, unit, meaning and origin, group by group; values that were given stand out."""
    console = console or Console()
    console.print(f"[bold]{loaded.source}[/], resolved")
    group = ""
    for path, key in job_keys().items():
        origin = loaded.origins[path]
        if only_given and origin == "default":
            continue
        if key.group != group:
            group = key.group
            console.print(f"\n[bold cyan]{group}[/]")
        value = show_value(loaded.value(path))
        unit = f" {key.metadata['unit']}" if "unit" in key.metadata else ""
        line = Text("  ").append(path.rpartition(".")[2], style="cyan").append(" = ")
        line.append(value, style="" if origin == "default" else "bold green").append(unit)
        line.append(f"   <- {origin}", style="dim")
        console.print(line, overflow="fold")
        choices = f" [{', '.join(map(str, key.choices))}]" if key.choices else ""
        console.print(Padding(Text(key.metadata["help"] + choices, style="dim italic"), (0, 0, 0, 6)))


def json_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a job file: every key with its meaning, type, choices and range."""
    root: dict[str, Any] = {
        "$schema": SCHEMA_DIALECT,
        "title": "Windlass job",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "extends": {"type": "string", "description": "another job whose keys are the start of this one"}
        },
    }
    objects = {"": root}
    for path, kind in job_groups().items():
        parent, _, name = path.rpartition(".")
        objects[path] = {
            "description": (kind.__doc__ or "").strip().splitlines()[0],
            "type": ["object", "null"],
            "additionalProperties": False,
            "properties": {},
        }
        objects[parent]["properties"][name] = objects[path]
    for path, key in job_keys().items():
        objects[key.group]["properties"][path.rpartition(".")[2]] = _key_schema(key)
    return root


def _key_schema(key: Key) -> dict[str, Any]:
    unit = f" ({key.metadata['unit']})" if "unit" in key.metadata else ""
    schema: dict[str, Any] = {"description": key.metadata["help"] + unit, **_type_schema(key.type)}
    schema |= {_LIMITS[name]: limit for name, limit in key.metadata.items() if name in _LIMITS}
    sizes = ["string"] if key.type is int and key.metadata.get("unit") == "bytes" else []
    if sizes:
        schema["pattern"] = f"^{SIZE_PATTERN}$"
    if sizes or key.optional:
        schema["type"] = [schema["type"], *sizes, *(["null"] if key.optional else [])]
    if key.choices:
        # In YAML a word such as 2 is a number; the loader reads it as text where text is wanted.
        numbers = [int(choice) for choice in key.choices if key.type is str and choice.isdecimal()]
        schema["type"] = ["string", "integer"] if numbers else schema["type"]
        schema["enum"] = [*key.choices, *numbers, *([None] if key.optional else [])]
    schema["default"] = list(key.default) if isinstance(key.default, tuple) else key.default
    return schema


def _type_schema(kind: Any) -> dict[str, Any]:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is tuple:
        return {
            "type": "array",
            "prefixItems": [_type_schema(k) for k in inner],
            "items": False,
            "minItems": len(inner),
        }
    if origin is list:
        return {"type": "array", "items": _type_schema(inner[0])}
    return {"type": "object" if origin is dict else _TYPES[kind]}
