"""What a checkout, a wheel and a reader get: package mapping, pins, type links, documents, shipped configurations."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("dist", "model", "data", "offload", "parallel", "checkpoint", "launch", "configs")


def show(violations: list[str]) -> str:
    return "\n  " + "\n  ".join(violations)


# -- packaging -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as stream:
        return tomllib.load(stream)


def test_the_package_list_equals_the_tree() -> None:
    tool = project()["tool"]["setuptools"]
    folders = sorted(p.parent.relative_to(ROOT) for s in LAYERS for p in (ROOT / s).rglob("__init__.py"))
    tree = {"windlass": "windlass"} | {f"windlass.{'.'.join(f.parts)}": f.as_posix() for f in folders}
    assert tool["package-dir"] == tree, "pyproject.toml [tool.setuptools.package-dir] differs from the tree"
    assert sorted(tool["packages"]) == sorted(tree), "pyproject.toml [tool.setuptools] packages differ from the tree"
    modules = [p for layer in LAYERS for p in (ROOT / layer).rglob("*.py")]
    orphans = sorted(str(p.relative_to(ROOT)) for p in modules if not p.with_name("__init__.py").exists())
    assert not orphans, f"these modules lie in folders without __init__.py, so a wheel would miss them: {orphans}"


def test_package_data_reaches_a_wheel() -> None:
    patterns = project()["tool"]["setuptools"]["package-data"]["windlass.configs"]
    matched = {path for pattern in patterns for path in (ROOT / "configs").glob(pattern)}
    present = {p for p in (ROOT / "configs").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert present == matched, f"not named by package-data: {sorted(str(p) for p in present - matched)}"


def test_type_checkers_see_every_package() -> None:
    wanted = {*LAYERS, *(p.name for p in (ROOT / "windlass").iterdir() if p.name != "__pycache__")}
    links = {p.name: p for p in (ROOT / ".types" / "windlass").iterdir()}
    assert links.keys() == wanted, f"links of .types/windlass differ: {sorted(links.keys() ^ wanted)}"
    for name, link in links.items():
        target = ROOT / name if name in LAYERS else ROOT / "windlass" / name
        assert link.is_symlink() and link.resolve() == target, f"{link} must be a relative link to {target}"


def test_git_does_not_ignore_our_dist_folder() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    folders = ("windlass", *LAYERS, "tests", "benchmarks")
    paths = "\n".join(str(p.relative_to(ROOT)) for f in folders for p in (ROOT / f).rglob("*.py"))
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin"], cwd=ROOT, input=paths, capture_output=True, text=True
    )
    assert done.stdout == "", f".gitignore hides source files:\n{done.stdout}"


def test_every_dependency_is_pinned() -> None:
    pins = {
        re.sub(r"[-_.]+", "-", line.split("==")[0]).lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    }
    wanted = project()["project"]["dependencies"] + project()["project"]["optional-dependencies"]["dev"]
    names = {re.sub(r"[-_.]+", "-", re.split(r"[<>=!~\[; ]", w)[0]).lower() for w in wanted}
    assert names <= pins, f"constraints.txt pins nothing for {sorted(names - pins)}"


# -- what a reader gets ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def written() -> dict[str, str]:
    """Return every text file that git would track."""
    suffixes = {".py", ".md", ".toml", ".yaml", ".txt", ".json"}
    folders = ("windlass", *LAYERS, "tests", "benchmarks", "docs", ".ci")
    paths = [p for p in ROOT.iterdir() if p.suffix in suffixes or p.name == "Makefile"]
    paths += [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in suffixes or p.parent.name == ".ci"]
    return {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in paths if p.is_file()}


def test_nothing_names_the_machine_it_was_written_on() -> None:
    places = re.compile("|".join(re.escape(f"/{place}/") for place in ("work", "opt", "root", "home")))
    wrong = [
        f"{path}:{number}: '{found[0]}' is a path of one machine"
        for path, text in written().items()
        if path != "tests/unit/test_packaging.py"
        for number, line in enumerate(text.splitlines(), 1)
        if (found := places.search(line))
    ]
    assert not wrong, show(wrong)


def test_links_between_documents_lead_somewhere() -> None:
    link = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)[^)]*\)")
    wrong = [
        f"{path}: link to '{target}' leads nowhere"
        for path, text in written().items()
        if path.endswith(".md")
        for target in link.findall(text)
        if not ((ROOT / path).parent / target).exists()
    ]
    assert not wrong, show(wrong)


@pytest.mark.parametrize("path", sorted(p.name for p in (ROOT / "configs").glob("*.yaml")))
def test_every_shipped_job_loads(path: str) -> None:
    from windlass.launch.config import load_job

    loaded = load_job(str(ROOT / "configs" / path), [])
    assert loaded.config.train.steps > 0


@pytest.mark.parametrize("preset", sorted(p.stem for p in (ROOT / "configs" / "model").glob("*.yaml")))
def test_every_model_preset_loads(preset: str) -> None:
    from windlass.launch.config import load_job

    jobs = sorted((ROOT / "configs").glob("*.yaml"))
    assert jobs, "configs/ holds no job"
    loaded = load_job(str(jobs[0]), [f"model.preset={preset}"])
    assert loaded.config.model.num_layers > 0
