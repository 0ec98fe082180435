"""No key is silently dead: every one is read somewhere in the package."""

from __future__ import annotations

import ast
from pathlib import Path

from windlass.launch.job import job_keys

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("dist", "model", "data", "offload", "parallel", "checkpoint", "launch")


def attributes_read() -> set[str]:
    """Return every attribute name that is read outside the check and view of configurations."""
    names: set[str] = set()
    for layer in LAYERS:
        for path in (ROOT / layer).rglob("*.py"):
            if path.name in ("check.py", "config_view.py") and layer == "launch":
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    names.add(node.attr)
    return names


def test_every_key_is_read_somewhere() -> None:
    read = attributes_read()
    dead = [path for path in job_keys() if path.rpartition(".")[2] not in read]
    assert not dead, f"nobody reads {dead}: remove the key or use it"
