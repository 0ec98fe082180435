"""The architecture as tests: layers, single owners, spellings. Plain `ast`, nothing of torch is imported.

A failure names the file and line, the rule, and where the code belongs instead. The rules are explained in
docs/architecture.md.
"""

from __future__ import annotations

import ast
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import pytest

from windlass.dist import errors

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("dist", "model", "data", "offload", "parallel", "checkpoint", "launch", "configs")
LEAF = {"dist.errors"}
MAY_IMPORT = {
    "dist": {"dist"},
    "model": {"model"} | LEAF,
    "data": {"data"} | LEAF,
    "offload": {"offload", "dist"},
    "parallel": {"parallel", "offload", "dist", "model", "data"},
    "checkpoint": {"checkpoint", "offload", "dist", "model", "data"},
    "launch": set(LAYERS),
    "configs": {"configs"},
}
LINES_PER_FILE = 450


@cache
def _walked(tree: ast.Module) -> list[ast.AST]:
    return list(ast.walk(tree))


@dataclass(frozen=True)
class Source:
    """One parsed Python file; `path` is relative to the root, `layer` its first part."""

    path: str
    text: str
    tree: ast.Module

    @property
    def layer(self) -> str:
        return self.path.split("/")[0]

    def at(self, node: ast.AST | int) -> str:
        return f"{self.path}:{node if isinstance(node, int) else getattr(node, 'lineno', 1)}"

    def nodes(self, kind: Any) -> Iterator[Any]:
        return (n for n in _walked(self.tree) if isinstance(n, kind))

    def imports(self) -> Iterator[tuple[ast.AST, str]]:
        """Yield every dotted name that is imported, `from a import b` as `a.b`."""
        for node in self.nodes((ast.Import, ast.ImportFrom)):
            if isinstance(node, ast.Import):
                yield from ((node, alias.name) for alias in node.names)
            elif not node.level and node.module:
                yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)

    def chains(self) -> Iterator[tuple[ast.AST, str]]:
        """Yield every attribute chain that starts at a plain name, as `a.b.c`."""
        for node in self.nodes(ast.Attribute):
            parts, inner = [node.attr], node.value
            while isinstance(inner, ast.Attribute):
                parts.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name):
                yield node, ".".join([inner.id, *reversed(parts)])

    def mentions(self, *names: str) -> Iterator[ast.AST]:
        """Yield where one of the dotted names, or something below it, is imported or used."""
        for node, name in [*self.imports(), *self.chains()]:
            if any(name == wanted or name.startswith(wanted + ".") for wanted in names):
                yield node


@lru_cache(maxsize=1)
def house() -> tuple[Source, ...]:
    """Parse every file of the package."""
    return tuple(_parse(path) for layer in ("windlass", *LAYERS) for path in sorted((ROOT / layer).rglob("*.py")))


@lru_cache(maxsize=1)
def everything() -> tuple[Source, ...]:
    """Parse the package, its tests and benchmarks."""
    extra = [path for folder in ("tests", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
    return house() + tuple(_parse(path) for path in extra)


def _parse(path: Path) -> Source:
    text = path.read_text(encoding="utf-8")
    return Source(path.relative_to(ROOT).as_posix(), text, ast.parse(text, str(path)))


def show(violations: list[str]) -> str:
    return "\n  " + "\n  ".join(violations)


# -- layers ----------------------------------------------------------------------------------------------------------


def test_imports_only_run_downwards() -> None:
    wrong = []
    for source in house():
        if source.layer == "windlass":
            continue
        for node, name in source.imports():
            if not name.startswith("windlass."):
                continue
            target = name.removeprefix("windlass.")
            allowed = MAY_IMPORT[source.layer]
            if not any(target == a or target.startswith(a + ".") for a in allowed):
                wrong.append(f"{source.at(node)}: {source.layer}/ imports {name}; it may import {sorted(allowed)}")
    assert not wrong, show(wrong)


def test_modules_are_imported_by_their_full_name() -> None:
    wrong = []
    for source in everything():
        for node in source.nodes(ast.ImportFrom):
            if node.level:
                wrong.append(f"{source.at(node)}: relative import; write `from windlass....`")
        for node, name in source.imports():
            if name.split(".")[0] in LAYERS:
                wrong.append(f"{source.at(node)}: `{name}` would be a second copy of the module; write windlass.{name}")
    assert not wrong, show(wrong)


def test_the_thin_package_holds_nothing_but_the_entry() -> None:
    names = {path.name for path in (ROOT / "windlass").iterdir() if path.name != "__pycache__"}
    assert names == {"__init__.py", "__main__.py", "py.typed"}, f"windlass/ holds {sorted(names)}; put code in a layer"


# -- single owners ---------------------------------------------------------------------------------------------------


def _inside_autograd_function(source: Source, node: ast.AST) -> bool:
    return any(
        inner is node
        for owner in source.nodes(ast.ClassDef)
        if any(ast.unparse(base).endswith("Function") for base in owner.bases)
        for inner in ast.walk(owner)
    )


def _autograd(source: Source) -> Iterator[ast.AST]:
    yield from source.mentions("torch.autograd.grad", "torch.autograd.backward", "autograd.grad", "autograd.backward")
    for call in source.nodes(ast.Call):
        if isinstance(call.func, ast.Attribute) and call.func.attr == "backward":
            yield call


def _cuda(source: Source) -> Iterator[ast.AST]:
    yield from source.mentions("torch.cuda")
    for node in source.nodes((ast.Attribute, ast.keyword)):
        if (node.attr if isinstance(node, ast.Attribute) else node.arg) == "pin_memory":
            yield node


def _job_config(source: Source) -> Iterator[ast.AST]:
    for node in source.nodes((ast.Name, ast.alias)):
        if (node.id if isinstance(node, ast.Name) else node.name) == "JobConfig":
            yield node


OWNERS: dict[str, tuple[Callable[[Source], Iterator[ast.AST]], Callable[[str], bool]]] = {
    "torch.distributed belongs to dist/": (
        lambda s: s.mentions("torch.distributed"),
        lambda path: path.startswith("dist/"),
    ),
    "torch.cuda and pinned memory belong to dist/device.py": (
        _cuda,
        lambda path: path in ("dist/device.py", "dist/group_transport.py"),
    ),
    "the environment is read in dist/env.py": (
        lambda s: s.mentions("os.environ", "os.environb", "os.getenv", "os.putenv"),
        lambda path: path == "dist/env.py",
    ),
    "YAML is parsed in launch/config.py": (lambda s: s.mentions("yaml"), lambda path: path == "launch/config.py"),
    "OmegaConf belongs to launch/config.py and the views of it": (
        lambda s: s.mentions("omegaconf"),
        lambda path: path.startswith("launch/config"),
    ),
    "ray belongs to launch/ray/": (lambda s: s.mentions("ray"), lambda path: path.startswith("launch/ray/")),
    "JobConfig belongs to launch/": (
        _job_config,
        lambda path: path.startswith("launch/") or path == "windlass/__init__.py",  # which re-exports it to users
    ),
}


@pytest.mark.parametrize("rule", OWNERS)
def test_every_side_effect_has_one_owner(rule: str) -> None:
    find, owns = OWNERS[rule]
    wrong = [f"{s.at(node)}: {rule}" for s in house() if not owns(s.path) for node in find(s)]
    assert not wrong, show(wrong)


BREACHES = {
    "torch.distributed belongs to dist/": "from torch import distributed as dist",
    "torch.cuda and pinned memory belong to dist/device.py": "import torch\nx = torch.empty(1, pin_memory=True)",
    "the environment is read in dist/env.py": "import os\nos.environ['RANK']",
    "YAML is parsed in launch/config.py": "import yaml",
    "OmegaConf belongs to launch/config.py and the views of it": "def f():\n    from omegaconf import OmegaConf",
    "ray belongs to launch/ray/": "import ray.util",
    "JobConfig belongs to launch/": "from windlass.launch.config import JobConfig",
}


@pytest.mark.parametrize("rule", OWNERS)
def test_a_breach_of_each_rule_is_noticed(rule: str) -> None:
    find, owns = OWNERS[rule]
    source = Source("parallel/example.py", BREACHES[rule], ast.parse(BREACHES[rule]))
    assert list(find(source)) and not owns(source.path)


def test_autograd_runs_in_the_walk_only() -> None:
    wrong = [
        f"{s.at(node)}: autograd grad/backward belongs to parallel/walk.py and to autograd functions of model/"
        for s in house()
        if s.path != "parallel/walk.py"
        for node in _autograd(s)
        if not (s.layer in ("model", "parallel") and _inside_autograd_function(s, node))
    ]
    assert not wrong, show(wrong)


def test_the_command_line_starts_without_heavy_imports() -> None:
    heavy = {"torch", "ray", "transformers", "pyarrow", "deepspeed", "scipy", "tensorboard"}
    wrong = [
        f"{s.at(node)}: {ast.unparse(node)} at module level makes every command slow; import it inside the function"
        for s in house()
        if s.path.startswith("launch/cli/")
        for node in s.tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom)) and heavy & {name.split(".")[0] for name in _names_of(node)}
    ]
    assert not wrong, show(wrong)


def _names_of(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]


# -- the code itself -------------------------------------------------------------------------------------------------


def test_no_file_is_a_drawer() -> None:
    wrong = [s.path for s in everything() if Path(s.path).stem in ("utils", "util", "helpers", "common", "misc")]
    assert not wrong, f"name these files after what they do: {wrong}"


def test_no_file_is_too_long() -> None:
    wrong = [
        f"{s.path}: {n} lines; split it by purpose (at most {LINES_PER_FILE})"
        for s in everything()
        if (n := s.text.count("\n")) > LINES_PER_FILE
    ]
    assert not wrong, show(wrong)


def test_nothing_is_left_for_later() -> None:
    words = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    wrong = []
    for source in everything():
        if source.path == "tests/unit/test_house.py":
            continue
        for number, line in enumerate(source.text.splitlines(), 1):
            if found := words.search(line):
                wrong.append(f"{source.at(number)}: {found[0]}: do it, or open an issue")
        for node in source.nodes(ast.Name):
            if node.id == "NotImplementedError":
                wrong.append(f"{source.at(node)}: NotImplementedError: a stub; write it or use a Protocol")
    assert not wrong, show(wrong)


def test_no_exception_is_swallowed() -> None:
    wrong = []
    for source in everything():
        for handler in source.nodes(ast.ExceptHandler):
            if handler.type is None:
                wrong.append(f"{source.at(handler)}: bare except also catches KeyboardInterrupt; name the exceptions")
            if all(isinstance(statement, ast.Pass) for statement in handler.body):
                wrong.append(
                    f"{source.at(handler)}: this except does nothing; handle it, or use contextlib.suppress with a "
                    "narrow exception and a reason"
                )
        for call in source.nodes(ast.Call):
            if ast.unparse(call.func).endswith("suppress") and any(
                ast.unparse(arg) in ("Exception", "BaseException") for arg in call.args
            ):
                wrong.append(f"{source.at(call)}: suppress(Exception) swallows everything; name the exception")
    assert not wrong, show(wrong)


def test_every_module_and_public_name_of_the_core_is_explained() -> None:
    wrong = []
    for source in house():
        if ast.get_docstring(source.tree) is None and source.text.strip():
            wrong.append(f"{source.path}: module docstring missing (what it is for, what it must not know)")
        if source.layer not in ("dist", "parallel", "checkpoint", "offload"):
            continue
        for node in source.tree.body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            if ast.get_docstring(node) is None:
                wrong.append(f"{source.at(node)}: public {node.name} has no docstring")
            for method in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    long = (method.end_lineno or 0) - method.lineno > 12
                    if long and ast.get_docstring(method) is None:
                        wrong.append(f"{source.at(method)}: {node.name}.{method.name} has no docstring")
    assert not wrong, show(wrong)


def test_errors_live_in_one_tree_and_survive_pickling() -> None:
    known = {name for name, value in vars(errors).items() if _is_error(value)}
    wrong = [
        f"{s.at(node)}: {node.name} belongs to the tree in dist/errors.py"
        for s in house()
        if s.path != "dist/errors.py"
        for node in s.nodes(ast.ClassDef)
        if known & {ast.unparse(base).split(".")[-1] for base in node.bases}
    ]
    assert not wrong, show(wrong)
    for name in sorted(known):
        error = getattr(errors, name)("what, where, why, and the value that works")
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error) and str(copy) == str(error)


def _is_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, errors.WindlassError)


def test_error_codes_tell_errors_apart() -> None:
    codes = {name: value.exit_code for name, value in vars(errors).items() if _is_error(value)}
    assert len(set(codes.values())) == len(codes), f"two errors share an exit code: {codes}"
