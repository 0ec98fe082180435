"""`windlass evaluate`: one number for a checkpoint, and one per token."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from windlass.data.prepare import prepare
from windlass.launch.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"line {number} of a short text\n" * 8)
    prepare([folder], folder / "tokens", tokenizer="bytes", validation=0.3, workers=1)
    job = folder / "job.yaml"
    job.write_text(
        f"model: {{vocab_size: 257, hidden_size: 16, num_layers: 2, num_heads: 2, intermediate_size: 24}}\n"
        f"data: {{path: {folder / 'tokens'}}}\n"
        f"train: {{steps: 2, seq_len: 32, micro_batch: 2, run_dir: {folder / 'run'}, device: cpu}}\n"
        "metrics: {tensorboard: false}\n"
        "loss: {softcap: 20.0}\n"
    )
    with pytest.raises(SystemExit):
        main(["train", str(job)])
    return folder / "run"


def test_a_run_is_evaluated_to_the_loss_it_reported(
    trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, _ = run(capsys, "evaluate", trained, "--json", "--log-probs", tmp_path / "scores.parquet")
    found = json.loads(out)
    events = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    reported = [event for event in events if event.get("event") == "eval"][-1]
    assert code == 0 and found["step"] == 2
    assert found["loss"] == pytest.approx(reported["loss"], rel=1e-5)
    table = pq.read_table(tmp_path / "scores.parquet")
    assert table.num_rows == found["tokens"]
    assert -sum(table["log_prob"].to_pylist()) / table.num_rows == pytest.approx(found["loss"], rel=1e-5)


def test_what_cannot_be_evaluated_is_one_error(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "evaluate", trained.parent / "nothing")[0] != 0
    code, _, err = run(capsys, "evaluate", trained, "--split", "test")
    assert code == 2 and "validation, train" in err
    code, _, err = run(capsys, "evaluate", trained, "--log-probs", "/proc/nowhere/x.parquet")
    assert code == 2 and "Give a file you can write" in err
    assert "Traceback" not in err
