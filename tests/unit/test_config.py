"""Reading a job: layers, overrides, origins, and messages that say key, place and remedy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from windlass.dist.errors import ConfigError
from windlass.launch.config import load_dataclass, load_job, to_yaml, write_keys
from windlass.launch.job import JobConfig, job_keys


def job(folder: Path, text: str, name: str = "job.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def message(path: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_job(path, overrides)
    return str(caught.value)


def test_an_empty_job_is_all_defaults(tmp_path: Path) -> None:
    loaded = load_job(job(tmp_path, "# nothing\n"))
    assert loaded.config == JobConfig()
    assert set(loaded.origins.values()) == {"default"}
    assert not loaded.given


def test_later_layers_win_and_every_value_knows_its_origin(tmp_path: Path) -> None:
    path = job(tmp_path, "model:\n  preset: tiny\n  hidden_size: 384\ntrain: {steps: 7, seed: 3}\n")
    loaded = load_job(path, ["train.steps=9"])
    assert (loaded.config.model.hidden_size, loaded.config.train.steps, loaded.config.train.seed) == (384, 9, 3)
    assert loaded.config.model.vocab_size == 4096
    assert loaded.origins["model.vocab_size"].startswith("preset configs/model/tiny.yaml:")
    assert loaded.origins["model.hidden_size"] == f"{path}:3"
    assert loaded.origins["train.seed"] == f"{path}:4"
    assert loaded.origins["train.steps"] == "override"
    assert loaded.origins["zero.stage"] == "default"
    assert {"model.hidden_size", "train.steps", "train.seed"} <= loaded.given
    assert "model.vocab_size" not in loaded.given


def test_derived_sizes_follow_the_final_values_not_the_defaults(tmp_path: Path) -> None:
    config = load_job(job(tmp_path, "model: {hidden_size: 768, num_heads: 12}\n")).config.model
    assert (config.num_kv_heads, config.head_dim) == (12, 64)


def test_an_override_may_choose_the_preset(tmp_path: Path) -> None:
    loaded = load_job(job(tmp_path, "model: {preset: tiny}\n"), ["model.preset=gpt2"])
    assert loaded.config.model.vocab_size == 50257
    assert loaded.origins["model.vocab_size"].startswith("preset configs/model/gpt2.yaml:")


def test_a_job_extends_another_and_lines_are_those_of_each_file(tmp_path: Path) -> None:
    base = job(tmp_path, "train:\n  steps: 5\n  seed: 1\n", "base.yaml")
    path = job(tmp_path, "extends: base.yaml\ntrain: {seed: 2}\n")
    loaded = load_job(path)
    assert (loaded.config.train.steps, loaded.config.train.seed) == (5, 2)
    assert loaded.origins["train.steps"] == f"{base}:2"
    assert loaded.origins["train.seed"] == f"{path}:2"


def test_jobs_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    job(tmp_path, "extends: b.yaml\n", "a.yaml")
    text = message(job(tmp_path, "extends: a.yaml\n", "b.yaml"))
    assert "circle" in text and "b.yaml -> a.yaml -> b.yaml" in text


@pytest.mark.parametrize(
    "arguments", [["zero.stage=3"], ["--zero.stage=3"], ["--zero.stage", "3"], ["zero={stage: 3}"], ["zero.stage = 3"]]
)
def test_overrides_are_understood_in_every_usual_spelling(tmp_path: Path, arguments: list[str]) -> None:
    assert load_job(job(tmp_path, ""), arguments).config.zero.stage == 3


def test_overrides_apply_in_order(tmp_path: Path) -> None:
    assert load_job(job(tmp_path, ""), ["train.steps=1", "--train.steps", "2", "train.steps=3"]).config.train.steps == 3


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("optimizer.lr=1e-3", "optimizer.lr", 1e-3),
        ("optimizer.betas=[0.8, 0.99]", "optimizer.betas", (0.8, 0.99)),
        ("data.path=007", "data.path", "007"),
        ("data.path=no", "data.path", "no"),
        ("data.path=a: b", "data.path", "a: b"),
        ("data.path='null'", "data.path", "null"),
        ("data.path=", "data.path", None),
        ("data.path=null", "data.path", None),
        ("cluster.device_bytes=80e9", "cluster.device_bytes", 80_000_000_000),
        ("cluster.device_bytes=80GB", "cluster.device_bytes", 80_000_000_000),
        ("cluster.host_bytes=1.5 GiB", "cluster.host_bytes", 3 * 2**29),
        ("metrics.tensorboard=false", "metrics.tensorboard", False),
        (
            "model.rope_scaling={rope_type: linear, factor: 2}",
            "model.rope_scaling",
            {"rope_type": "linear", "factor": 2},
        ),
        ("model.rope_scaling.factor=8", "model.rope_scaling", {"factor": 8}),
        ("data.mixture=[{path: a, weight: 2}]", "data.mixture", [{"path": "a", "weight": 2}]),
        ("cluster.nvme_paths=[a, b]", "cluster.nvme_paths", ["a", "b"]),
    ],
)
def test_override_values_are_yaml(tmp_path: Path, override: str, path: str, value: object) -> None:
    loaded = load_job(job(tmp_path, ""), [override])
    assert loaded.value(path) == value
    assert type(loaded.value(path)) is type(value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("zero:\n  stage: 5\n", ["zero.stage = 5 (", "job.yaml:2)", "must be one of 0, 1, 2, 3"]),
        ("zero:\n  stages: 3\n", ["zero.stages (", "job.yaml:2)", "did you mean 'zero.stage'?"]),
        ("zero_optimisation: {stage: 3}\n", ["zero_optimisation", "job.yaml:1", "no such key"]),
        ("train:\n  lr: 1.0\n", ["train.lr", "did you mean 'optimizer.lr'?"]),
        ("training: {steps: 3}\n", ["training", "did you mean 'train'?"]),
        ("train: {max_steps: 3}\n", ["did you mean 'train.steps'?"]),
        ("train: {steps: ten}\n", ["train.steps = 'ten'", "must be a whole number"]),
        ("train: {steps: 2.5}\n", ["train.steps = 2.5", "must be a whole number"]),
        ("train: {steps: null}\n", ["train.steps = null", "must be a whole number"]),
        ("train: {steps: [1]}\n", ["train.steps = [1]", "must be a whole number"]),
        ("train: {steps: 0}\n", ["train.steps = 0", "must be at least 1 steps"]),
        ("optimizer: {lr: -1}\n", ["optimizer.lr", "must be greater than 0"]),
        ("optimizer: {lr: .nan}\n", ["optimizer.lr = nan", "finite"]),
        ("optimizer: {momentum: 1.0}\n", ["must be at least 0 and less than 1"]),
        ("optimizer: {betas: [0.9]}\n", ["optimizer.betas = [0.9]", "a list of 2 numbers"]),
        ("metrics: {tensorboard: maybe}\n", ["metrics.tensorboard = 'maybe'", "true or false"]),
        ("data: {mixture: 3}\n", ["data.mixture = 3", "a list of mappings"]),
        ("zero: 3\n", ["zero = 3", "a group of keys", "stage, reshard, prefetch"]),
        ("- a\n- b\n", ["job.yaml:1", "must be a mapping"]),
        ("train:\n\tsteps: 3\n", ["job.yaml:2", "not valid YAML", "spaces, not tabs"]),
        ("train: {steps: 3\nzero: {}\n", ["job.yaml:", "not valid YAML"]),
        ("train:\n  steps: 3\n  steps: 4\n", ["train.steps", "job.yaml:3", "given before in line 2"]),
        ("zero: {stage: 1}\ntrain: {}\nzero: {stage: 2}\n", ["zero", "job.yaml:3", "given before in line 1"]),
        ("model: {preset: gtp2}\n", ["model.preset = 'gtp2'", "did you mean 'gpt2'?"]),
        ("extends: nowhere.yaml\n", ["extends = 'nowhere.yaml'", "no such file"]),
        ("data: {path: '${data.nothing}'}\n", ["data.path", "nothing"]),
    ],
)
def test_mistakes_in_a_file_name_key_place_and_remedy(tmp_path: Path, text: str, parts: list[str]) -> None:
    told = message(job(tmp_path, text))
    assert all(part in told for part in parts), told
    assert "\n" not in told


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train.steps"], "no value"),
        (["--train.steps"], "no value"),
        (["--train.steps", "--zero.stage=1"], "no value"),
        (["train.stepz=3"], "did you mean 'train.steps'?"),
        (["zero.stage=9"], "zero.stage = 9: must be one of 0, 1, 2, 3"),
        (["optimizer.betas=[1,"], "not valid YAML"),
        (["extends=other.yaml"], "no such key"),
    ],
)
def test_mistakes_in_overrides_name_the_key(tmp_path: Path, arguments: list[str], part: str) -> None:
    assert part in message(job(tmp_path, ""), *arguments)


def test_a_job_that_does_not_exist_names_those_that_do() -> None:
    told = message("quickstrat")
    assert "did you mean 'quickstart'?" in told and "zero-7.5b" in told
    assert "folder" in message("configs" if Path("configs").is_dir() else ".")


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"train: {run_dir: \xff}\n")
    assert "not UTF-8" in message(str(path))


def test_a_resolved_configuration_loads_again_to_the_same(tmp_path: Path) -> None:
    first = load_job("pretrain-7b", ["train.micro_batch=4", "model.rope_scaling={rope_type: linear, factor: 2.0}"])
    again = load_job(job(tmp_path, to_yaml(first.config)))
    assert again.config == first.config
    assert to_yaml(again.config) == to_yaml(first.config)
    assert again.given == first.given


@settings(max_examples=20, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "train.steps": st.integers(1, 10**9),
            "optimizer.lr": st.floats(1e-30, 1e30),
            "train.run_dir": st.text(
                st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="$"), min_size=1
            ),
            "optimizer.betas": st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
        }
    )
)
def test_any_value_survives_being_written_and_read(tmp_path_factory: pytest.TempPathFactory, values: dict) -> None:
    folder = tmp_path_factory.mktemp("job")
    config = JobConfig()
    for path, value in values.items():
        group, _, name = path.rpartition(".")
        config = replace(config, **{group: replace(getattr(config, group), **{name: value})})
    assert load_job(job(folder, to_yaml(config))).config == config


def test_a_file_of_one_group_is_read_with_the_same_care(tmp_path: Path) -> None:
    cluster = load_dataclass(job(tmp_path, "nodes: 4\ndevice_bytes: 80GB\n", "cluster.yaml"), "cluster")
    assert (cluster.nodes, cluster.device_bytes) == (4, 80_000_000_000)
    with pytest.raises(ConfigError, match=r"cluster\.node .*did you mean 'cluster.nodes'"):
        load_dataclass(job(tmp_path, "node: 4\n", "bad.yaml"), "cluster")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "# facts\nnodes: 8\nnvme_paths: ['/a: b', /c]\n"),
        ("", "nodes: 8\nnvme_paths: ['/a: b', /c]\n"),
        (
            "# racks\nnodes: 2  # two\nhost_bytes: 5GB",
            "# racks\nnodes: 8  # two\nhost_bytes: 5GB\nnvme_paths: ['/a: b', /c]\n",
        ),
        (
            "nvme_paths:\n  - /x  # old\n  - /y\n\n# racks\nhost_bytes: 5GB\n",
            "nvme_paths: ['/a: b', /c]\n\n# racks\nhost_bytes: 5GB\nnodes: 8\n",
        ),
        ("nvme_paths:\n- /x\nnodes: 1\n", "nvme_paths: ['/a: b', /c]\nnodes: 8\n"),
        ("{nodes: 2, cpu_adam: torch}\n", "cpu_adam: torch\nnodes: 8\nnvme_paths: ['/a: b', /c]\n"),
    ],
)
def test_keys_are_set_in_a_file_that_keeps_the_rest(tmp_path: Path, before: str | None, after: str) -> None:
    path = tmp_path / "cluster.yaml"
    if before is not None:
        path.write_text(before)
    write_keys(path, "cluster", {"nodes": 8, "nvme_paths": ["/a: b", "/c"]}, heading="facts")
    assert sorted(path.read_text().splitlines()) == sorted(after.splitlines())
    cluster = load_dataclass(path, "cluster")
    assert (cluster.nodes, cluster.nvme_paths) == (8, ["/a: b", "/c"])
    assert cluster.host_bytes == (5_000_000_000 if before and "5GB" in before else 0)


def test_a_file_that_cannot_be_read_or_written_stays_as_it_is(tmp_path: Path) -> None:
    path = job(tmp_path, "node: 4\n", "cluster.yaml")
    with pytest.raises(ConfigError, match=r"did you mean 'cluster\.nodes'"):
        write_keys(path, "cluster", {"nodes": 8})
    assert Path(path).read_text() == "node: 4\n"
    with pytest.raises(ConfigError, match="Give a file that can be written"):
        write_keys(tmp_path / "no" / "cluster.yaml", "cluster", {"nodes": 8})


def test_every_key_has_a_meaning() -> None:
    assert not [path for path, key in job_keys().items() if not key.metadata.get("help")]
