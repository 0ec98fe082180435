"""What goes into and comes out of pipelines: checkpoints under another cut, library models, scores, dead ranks."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.harness import COMM_S, outcomes, run_world
from tests.parity import reference
from tests.parity.test_pipeline import GPT2, LR, SMALL, Case, build_engine, check
from tests.parity.test_zero import assemble
from tests.tolerance import assert_close
from windlass.checkpoint.restore import restore
from windlass.checkpoint.save import save
from windlass.dist.comm import Comm
from windlass.dist.errors import CommError
from windlass.model.loss import LossConfig, label_log_probs
from windlass.parallel.optim import OptimizerConfig
from windlass.parallel.zero import ZeroConfig

TIED = replace(GPT2, tie_embeddings=True)
ADAMW = OptimizerConfig()
RATE = 1e-3


def steps_of(case: Case) -> list[list[Any]]:
    total = case.micro_batches * case.columns
    return [[case.batch(s * total + i) for i in range(total)] for s in range(4)]


def train_and_save(comm: Comm, case: Case, root: Path) -> dict[str, Any]:
    engine, column = build_engine(comm, case), comm.rank % case.columns
    losses = []
    for i, batches in enumerate(steps_of(case)):
        if i == 2:
            report = save(root, 2, engine, {"optimizer_steps": engine.optimizer_steps}, comm.world, keep=2)
            assert report.ok, report.reason
        losses.append(engine.train_step(batches[column :: case.columns], RATE).loss)
    owned = [(p.key, p.global_shape, p.box, p.tensor.clone()) for p in engine.owned()]
    return {"losses": losses, "owned": owned}


def load_and_train(comm: Comm, case: Case, folder: Path) -> dict[str, Any]:
    engine, column = build_engine(comm, case), comm.rank % case.columns
    engine.optimizer_steps = restore(folder, engine, comm.world)["optimizer_steps"]
    losses = [engine.train_step(b[column :: case.columns], RATE).loss for b in steps_of(case)[2:]]
    owned = [(p.key, p.global_shape, p.box, p.tensor.clone()) for p in engine.owned()]
    return {"losses": losses, "owned": owned}


def test_a_checkpoint_loads_under_another_number_of_stages_and_another_cut_of_the_vocabulary(tmp_path: Path) -> None:
    wrote = Case("vhalf", "2", 4, TIED, optimizer=ADAMW, zero=ZeroConfig(stage=1), columns=2)
    through = run_world(4, train_and_save, wrote, tmp_path)
    final = assemble(through)
    others = {
        4: [replace(wrote, schedule="1f1b", vocab="1", columns=1, micro_batches=8)],
        2: [
            replace(wrote, schedule="zb1p", vocab="off", columns=1, micro_batches=8),
            replace(wrote, schedule="1f1b", vocab="2", columns=1, micro_batches=8, pipeline={"vocab_shares": [3, 1]}),
            replace(wrote, schedule="auto", vocab="auto", columns=2, micro_batches=4, zero=ZeroConfig(stage=3)),
        ],
    }
    for ranks, cases in others.items():
        for case in cases:
            resumed = run_world(ranks, load_and_train, case, tmp_path / "step-00000002")
            expected = torch.tensor(through[0]["losses"][2:], dtype=torch.float64)
            assert_close(torch.tensor(resumed[0]["losses"], dtype=torch.float64), expected, str(case))
            got = assemble(resumed)
            assert got.keys() == final.keys()
            for key in got.keys() - {f"model.blocks.{i}.attn.k.bias" for i in range(TIED.num_layers)}:
                # The gradient of a key's bias is nothing but rounding (softmax does not see it), which AdamW magnifies.
                if key.startswith("model."):
                    assert_close(got[key], final[key], f"{case}: {key}", factor=1000)


def score(comm: Comm, cases: list[Case]) -> list[list[torch.Tensor]]:
    return [build_engine(comm, case).log_probs(case.steps()[0]) for case in cases]


def test_scores_of_tokens_are_those_of_one_process() -> None:
    loss = LossConfig(softcap=3.0, temperature=1.5)
    cases = [Case("1f1b", "off", loss=loss), Case("1f1b", "1", loss=loss), Case("vhalf", "2", loss=loss)]
    by_rank = run_world(2, score, cases)
    model = cases[0].build()
    reference.realise(model, torch.float64)
    for i, case in enumerate(cases):
        found = [scores for scores in (of_rank[i] for of_rank in by_rank) if scores]
        assert len(found) == 1, "one pipeline rank has the head"
        for batch, logp_BT in zip(case.steps()[0], found[0], strict=True):
            context = model.context(batch.positions_BT, batch.documents_BT, torch.float64)
            with torch.no_grad():
                h_BTD = model.embed(batch.tokens_BT, context)
                for block in model.blocks:
                    h_BTD = block(h_BTD, context)
            assert_close(logp_BT, label_log_probs(model.head, h_BTD, batch.labels_BT), str(case))


def test_unmodified_library_models_run_in_pipelines(tmp_path: Path) -> None:
    from transformers import AutoConfig

    sizes = {"vocab_size": 71, "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 16}
    AutoConfig.for_model("gpt2", **sizes).save_pretrained(tmp_path)
    model = replace(SMALL, kind="transformers", hf_folder=str(tmp_path), num_layers=4)
    shapes = (("1f1b", "off"), ("zb1p", "1"), ("vhalf", "2"))
    check(2, [Case(schedule, vocab, model=model) for schedule, vocab in shapes])


def dies_in_the_middle(comm: Comm, case: Case) -> float:
    engine = build_engine(comm, case)
    engine.train_step(case.steps()[0], LR)
    began = time.monotonic()
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        engine.train_step(case.steps()[1], LR)
    except CommError as error:
        assert "rank 1" in str(error)
        return time.monotonic() - began
    raise AssertionError("the step went through without rank 1")


def test_a_rank_killed_inside_a_pipeline_stops_the_others_within_seconds() -> None:
    for outcome in outcomes(4, dies_in_the_middle, Case("vhalf", "2", 6)):
        if outcome.rank != 1:
            assert outcome.error is None, outcome.text
            assert outcome.value < COMM_S / 2
