"""The configuration as a listing, as YAML and as a JSON schema; the command line around it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from rich.console import Console

from windlass import __version__
from windlass.launch import cli
from windlass.launch.config import CONFIGS, load_job
from windlass.launch.config_view import json_schema, print_config
from windlass.launch.job import job_keys

JOBS = sorted(CONFIGS.glob("*.yaml"))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        cli.main(list(arguments))
    out = capsys.readouterr()
    return int(left.value.code or 0), out.out, out.err


def listing(*overrides: str, only_given: bool = False) -> str:
    console = Console(file=io.StringIO(), width=120)
    print_config(load_job("quickstart", overrides), only_given=only_given, console=console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_the_listing_shows_every_key_with_value_meaning_and_origin() -> None:
    text = listing("zero.stage=2")
    assert all(f"{path.rpartition('.')[2]} = " in text for path in job_keys())
    assert "stage = 2   <- override" in text
    assert "preset = 'tiny'   <- configs/quickstart.yaml:" in text
    assert "hidden_size = 192   <- preset configs/model/tiny.yaml:" in text
    assert "prefetch = 1 units   <- default" in text
    assert "longest wait for a peer" in text


def test_only_given_leaves_defaults_out() -> None:
    text = listing(only_given=True)
    assert "default" not in text and "preset = 'tiny'" in text


@pytest.mark.parametrize("path", JOBS, ids=[p.stem for p in JOBS])
def test_every_shipped_job_fits_the_schema(path: Path) -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    tree = _numbers(yaml.safe_load(path.read_text()))
    errors = [e.message for e in jsonschema.Draft202012Validator(schema).iter_errors(tree)]
    assert not errors


def _numbers(tree: object) -> object:
    """Read 6e-4 as the number it is in YAML 1.2, which editors use."""
    if isinstance(tree, dict):
        return {k: _numbers(v) for k, v in tree.items()}
    if isinstance(tree, str):
        try:
            return float(tree)
        except ValueError:
            return tree
    return tree


@pytest.mark.parametrize(
    ("tree", "fits"),
    [
        ({"zero": {"stage": 3}}, True),
        ({"zero": {"stage": 4}}, False),
        ({"zero": {"stages": 3}}, False),
        ({"zeros": {}}, False),
        ({"train": {"steps": 0}}, False),
        ({"train": {"steps": "many"}}, False),
        ({"data": {"path": None}}, True),
        ({"optimizer": {"betas": [0.9, 0.95]}}, True),
        ({"optimizer": {"betas": [0.9, 0.95, 0.99]}}, False),
        ({"optimizer": {"lr": 0}}, False),
        ({"extends": "base.yaml", "data": {"mixture": [{"path": "a", "weight": 1}]}}, True),
        ({"cluster": {"device_bytes": "80GB"}}, True),
        ({"cluster": {"device_bytes": "lots"}}, False),
        ({"zero": None}, True),
        ({"pipeline": {"vocab": 2, "cut": [3, 1], "speeds": [1, 0.5]}}, True),
        ({"pipeline": {"vocab": "2"}}, True),
        ({"pipeline": {"vocab": 3}}, False),
        ({"pipeline": {"cut": ["many"]}}, False),
    ],
)
def test_the_schema_accepts_and_refuses_what_the_loader_does(tree: dict, fits: bool, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree))
    assert jsonschema.Draft202012Validator(json_schema()).is_valid(tree) == fits
    if fits:
        load_job(tmp_path / "job.yaml")
    else:
        with pytest.raises(cli.WindlassError):
            load_job(tmp_path / "job.yaml")


def test_config_show_prints_yaml_that_loads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "config", "show", "quickstart", "--zero.stage", "1", "--yaml")
    (tmp_path / "job.yaml").write_text(out)
    assert code == 0
    assert load_job(tmp_path / "job.yaml").config == load_job("quickstart", ["zero.stage=1"]).config


def test_config_schema_is_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "config", "schema", "--out", str(tmp_path / "schema.json"))
    assert code == 0 and "wrote" in out
    assert json.loads((tmp_path / "schema.json").read_text()) == json_schema()
    code, _, err = run(capsys, "config", "schema", "--out", str(tmp_path / "no" / "schema.json"))
    assert code == 2 and err.startswith("error: --out")


def test_a_user_mistake_is_one_line_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = run(capsys, "config", "show", "quickstart", "zero.stage=7")
    assert (code, out) == (2, "")
    assert err == "error: zero.stage = 7: must be one of 0, 1, 2, 3.\n"
    monkeypatch.setenv("WINDLASS_TRACEBACK", "1")
    code, _, err = run(capsys, "config", "show", "quickstart", "zero.stage=7")
    assert code == 2 and "Traceback" in err


def test_an_interrupt_exits_with_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("windlass.launch.config.load_job", interrupted)
    assert run(capsys, "config", "show", "quickstart")[0] == 130


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[:2] == (0, f"windlass {__version__}\n")


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "ray", "transformers", "pyarrow", "numpy", "omegaconf")
    script = (
        "import sys\n"
        "from windlass.launch import cli\n"
        "try: cli.main(['--help'])\n"
        f"except SystemExit: print('HEAVY', [m for m in {heavy!r} if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=CONFIGS.parent
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []", done.stdout + done.stderr


def commands(app: object, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    children = getattr(app, "commands", None)
    if not children:
        return [prefix]
    return [found for name, child in children.items() for found in commands(child, (*prefix, name))]


def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    names = commands(typer.main.get_command(cli.app))
    assert {("config", "show"), ("plan",), ("doctor",), ("train",), ("data", "prepare")} <= set(names)
    for name in names:
        code, out, _ = run(capsys, *name, "--help")
        assert code == 0
        assert "Example" in out and f"windlass {' '.join(name)}" in out, name
