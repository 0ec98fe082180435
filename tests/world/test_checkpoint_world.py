"""Checkpoints through real processes: other world sizes, a full disk on one rank, a rank killed while saving."""

import sys
from pathlib import Path

import pytest
import torch

from tests.checkpoint_doubles import FlatSource, blank, even_shards, save_shards, some_state
from tests.harness import outcomes, run_world
from windlass.checkpoint.restore import restore
from windlass.checkpoint.save import save
from windlass.checkpoint.store import choose


def save_on_rank(comm, root, step, seed):
    group = comm.world
    report = save(
        Path(root), step, even_shards(some_state(seed), group.size)[group.rank], {"step": step}, group, keep=2
    )
    assert "torch.distributed.checkpoint" not in sys.modules  # a second and 48 MiB that only its own reader needs
    return report.ok, report.reason


def resume_on_rank(comm, root):
    group = comm.world
    choice = choose(Path(root), group)
    target = even_shards(blank(some_state()), group.size)[group.rank]
    extra = restore(choice.folder, target, group)
    return extra["step"], target.flat, len(choice.skipped)


def restore_another_model(comm, root):
    group = comm.world
    restore(Path(root) / "step-00000001", FlatSource({"model.embed.weight": torch.zeros(8, 5)}), group)


def assert_resumes(root, num_ranks, step, seed, num_skipped=0):
    found = run_world(num_ranks, resume_on_rank, str(root))
    assert {(got, skipped) for got, _, skipped in found} == {(step, num_skipped)}
    for key, whole in some_state(seed).items():
        assert torch.equal(torch.cat([flat[key] for _, flat, _ in found]), whole.reshape(-1)), key


def test_four_ranks_save_and_two_ranks_and_one_load(tmp_path):
    assert run_world(4, save_on_rank, str(tmp_path), 1, 0) == [(True, "")] * 4
    assert len(list(tmp_path.glob("step-00000001/__*_0.distcp"))) == 4
    assert_resumes(tmp_path, 2, 1, 0)
    assert_resumes(tmp_path, 1, 1, 0)


def test_a_truncated_newest_checkpoint_is_passed_over_by_all_ranks(tmp_path):
    for step in (1, 2):
        save_shards(tmp_path, step, even_shards(some_state(step), 2), extra={"step": step})
    with open(tmp_path / "step-00000002" / "__1_0.distcp", "rb+") as file:
        file.truncate(100)
    assert_resumes(tmp_path, 2, 1, 1, num_skipped=1)


def test_a_full_disk_on_one_rank_is_survived_by_all(tmp_path):
    save_shards(tmp_path, 1, [FlatSource(some_state(1))], extra={"step": 1})
    found = run_world(2, save_on_rank, str(tmp_path), 2, 2, env={"WINDLASS_FAULT": "enospc:checkpoint:rank=1"})
    assert [ok for ok, _ in found] == [False, False] and found[0][1] == found[1][1]
    assert "rank 1" in found[0][1] and "No space left on device" in found[0][1] and "were free" in found[0][1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001"]
    assert_resumes(tmp_path, 2, 1, 1)


@pytest.mark.parametrize("fault", ["kill:checkpoint:rank=1", "kill:checkpoint.manifest:rank=0"])
def test_a_rank_killed_while_saving_leaves_the_previous_checkpoint(tmp_path, fault):
    save_shards(tmp_path, 1, [FlatSource(some_state(1))], extra={"step": 1})
    found = outcomes(2, save_on_rank, str(tmp_path), 2, 2, env={"WINDLASS_FAULT": fault})
    assert all(outcome.error is not None for outcome in found)
    assert_resumes(tmp_path, 2, 1, 1)
    assert run_world(2, save_on_rank, str(tmp_path), 2, 2) == [(True, "")] * 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_checkpoint_of_another_model_is_refused_by_all_ranks(tmp_path):
    save_shards(tmp_path, 1, [FlatSource(some_state(1))], extra={"step": 1})
    found = outcomes(2, restore_another_model, str(tmp_path))
    assert all("model.embed.weight' has shape [7, 5] in the checkpoint and [8, 5] here" in str(o.error) for o in found)
