"""`windlass import deepspeed`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from windlass.launch import cli
from windlass.launch.config import load_job

BATCH = {"train_micro_batch_size_per_gpu": 2}
CONFIG: dict[str, Any] = {
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "nvme", "nvme_path": "/"},
        "offload_param": {"device": "nvme", "nvme_path": "/"},
        "sub_group_size": 1e9,
    },
    "train_micro_batch_size_per_gpu": "auto",
}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        cli.main(["import", "deepspeed", *arguments])
    out = capsys.readouterr()
    return int(left.value.code or 0), out.out, out.err


def test_the_command_writes_a_job_that_config_show_accepts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config, job = tmp_path / "ds.json", tmp_path / "job.yaml"
    config.write_text(json.dumps(CONFIG))
    code, out, err = run(capsys, str(config), "--out", str(job))
    assert code == 0 and f"wrote {job}" in out and "zero_optimization.sub_group_size" in out, err
    with pytest.raises(SystemExit) as left:
        cli.main(["config", "show", str(job), "--given"])
    assert not left.value.code and "zero-infinity" in capsys.readouterr().out
    code, _, err = run(capsys, str(config), "--out", str(job))
    assert code == 2 and "--force" in err
    assert run(capsys, str(config), "--out", str(job), "--force")[0] == 0


def test_without_a_file_the_job_goes_to_standard_output_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config, job = tmp_path / "ds.json", tmp_path / "job.yaml"
    config.write_text(json.dumps(BATCH))
    code, out, err = run(capsys, str(config))
    assert code == 0 and "filled in" in err and "filled in" not in out
    job.write_text(out)
    assert load_job(job).config.train.micro_batch == 2


def test_strict_refuses_what_would_not_be_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config, job = tmp_path / "ds.json", tmp_path / "job.yaml"
    config.write_text(json.dumps(BATCH | {"fp16": {"enabled": True}}))
    code, _, err = run(capsys, str(config), "--out", str(job), "--strict")
    assert code == 2 and "fp16.enabled" in err and not job.exists()
    config.write_text(json.dumps(BATCH | {"bf16": {"enabled": True}}))
    assert run(capsys, str(config), "--out", str(job), "--strict")[0] == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{\n "a": 1,\n // no\n}', ":3: not valid JSON"),
        ('{"bf16": {"enabled": true, "enabled": false}}', "given twice: enabled"),
        ("[]", "must be a JSON object"),
    ],
)
def test_a_file_that_cannot_be_read_is_explained(
    text: str, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "ds.json"
    config.write_text(text)
    code, _, err = run(capsys, str(config))
    assert code == 2 and words in err
    assert run(capsys, str(tmp_path / "none.json"))[0] == 2


def test_a_job_that_does_not_plan_is_said_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "ds.json"
    momentum = {"optimizer": {"type": "SGD", "params": {"momentum": 1}}}
    config.write_text(json.dumps(BATCH | momentum))
    code, _, err = run(capsys, str(config))
    assert code == 0 and "`windlass plan` refuses the job: optimizer.momentum = 1.0 (line" in err
    assert run(capsys, str(config), "--strict")[0] == 2
