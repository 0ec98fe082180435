"""Ranks that resume from snapshot processes: from own memory, from peers, by decoding, and around what is damaged."""

import os
import shutil
import signal
import time

import pytest
import torch

from tests.checkpoint_doubles import blank, even_shards
from tests.harness import outcomes, run_world
from tests.held_nodes import JOB, TOKEN, HeldNodes
from windlass.checkpoint.local_level import LocalLevel
from windlass.checkpoint.memory.client import SnapshotClient
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.inventory import Saved
from windlass.checkpoint.memory.pace import Pace
from windlass.checkpoint.memory.segment import Segment
from windlass.checkpoint.memory.settings import Settings
from windlass.checkpoint.memory.supervise import ensure_snapshot_process
from windlass.dist.errors import CheckpointError
from windlass.launch.resume_memory import find_in_memory

ANSWER_S = 20.0
GENERATION = 2  # of the ranks that resume; what they find is of generation 1


def some_state(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "model.w": torch.randn(40, 12, generator=g),
        "model.b": torch.randn(33, generator=g).bfloat16(),
        "optimizer.exp_avg.w": torch.randn(40, 12, generator=g),
        "optimizer.step": torch.tensor(7 + seed),
    }


@pytest.fixture
def nodes_with_processes(tmp_path):
    """Make nodes with their snapshot processes, and end those processes with the test."""
    started = []

    def start(folder):
        folder.raise_generation(1)
        started.append(ensure_snapshot_process(folder, 60.0))
        return started[-1]

    def make(num_nodes, **more):
        folders = [NodeFolder(tmp_path, JOB, f"node-{rank}").create(TOKEN) for rank in range(num_nodes)]
        ports = [start(folder).port for folder in folders]
        return HeldNodes(tmp_path, even_shards(some_state(), num_nodes), ports=ports, **more)

    make.start = start
    yield make
    for process in started:
        if process.alive:
            os.kill(process.pid, signal.SIGKILL)


def resume_on_rank(comm, base, node_of_rank, limits, victim=None):
    """Resume as a rank on a node; `victim`: a node whose snapshot process dies after it was heard."""
    folder = NodeFolder(base, JOB, node_of_rank[comm.rank])
    folder.raise_generation(GENERATION)
    client = SnapshotClient.of(folder, GENERATION)
    began = time.monotonic()
    found = find_in_memory(comm.world, client, folder, speaks=True, timeout_s=ANSWER_S, **limits)
    if found is None:
        return None
    if victim is not None and comm.rank == 0:
        os.kill(NodeFolder(base, JOB, victim).read_smp().pid, signal.SIGKILL)
    comm.world.gather_objects("the victim is dead")
    engine = even_shards(blank(some_state()), comm.size)[comm.rank]
    resumed = found.restore(engine, comm.world)
    client.close()
    return found, resumed, engine.flat, time.monotonic() - began


def resume(nodes, node_of_rank, victim=None, **limits):
    """Resume with a rank on each of the named nodes; every rank must have found the same."""
    told = run_world(len(node_of_rank), resume_and_tell, nodes.base, node_of_rank, limits, victim)
    assert all(t[:4] == told[0][:4] for t in told)
    return told


def resume_and_tell(comm, base, node_of_rank, limits, victim):
    out = resume_on_rank(comm, base, node_of_rank, limits, victim)
    if out is None:
        return (None,) * 6
    found, resumed, flat, seconds = out
    assert set(resumed.seconds) <= {"inventory", "plan", "load"} and seconds < 3 * ANSWER_S
    return str(found.choice), resumed.passed_over, resumed.extra, found.anchor, resumed, flat


def keep_on_drive(nodes, folder, drives, step):
    """Do what the snapshot process of a node does for the local level."""
    level = LocalLevel(folder, drives)
    segments = [Segment.open(file.path) for file in folder.segments()]
    slots = [(slot, slot.header()) for segment in segments for slot in segment.slots if slot.header() is not None]
    layouts = {layout.digest: layout.dump() for layout in nodes.layouts}
    temporary = level.begin(step, 1, 0)
    level.prepare(temporary, slots, nodes.world.dump(), layouts, Pace(), lambda *point: None)
    level.commit(temporary, step, 1, lambda *point: None)


def assert_restored(told, state):
    for key, whole in state.items():
        assert torch.equal(torch.cat([flat[key] for *_, flat in told]), whole.reshape(-1)), key


def test_ranks_go_on_from_the_memory_of_their_own_nodes(nodes_with_processes):
    nodes = nodes_with_processes(2)
    nodes.take(8, even_shards(some_state(1), 2), slot=0)
    nodes.take(9, even_shards(some_state(2), 2), {"step": 9, "consumed": 72}, slot=1)
    told = resume(nodes, ["node-0", "node-1"])
    assert_restored(told, some_state(2))
    for rank, (choice, passed_over, extra, anchor, resumed, _) in enumerate(told):
        assert choice == "step 9 of generation 1 from memory" and passed_over == [] and anchor == (1, 9)
        assert extra == {"step": 9, "consumed": 72} and resumed.own_facts["rng"] == f"of rank {rank}"
        assert (resumed.step, resumed.generation, resumed.tier) == (9, 1, "ram")


def resume_another_model(comm, base):
    folder = NodeFolder(base, JOB, "node-0")
    folder.raise_generation(GENERATION)
    Settings(run_folder="/runs/tiny").keep_in(folder)
    client = SnapshotClient.of(folder, GENERATION)
    found = find_in_memory(comm.world, client, folder, speaks=True, timeout_s=ANSWER_S)
    engine = even_shards({"model.w": torch.zeros(7, 5)}, 1)[0]
    try:
        found.restore(engine, comm.world)
    except CheckpointError as error:
        return str(error)
    finally:
        client.close()


def test_memory_of_another_model_in_the_same_run_folder_is_an_error_that_says_how_to_remove_it(nodes_with_processes):
    nodes = nodes_with_processes(1)
    nodes.take(8, even_shards(some_state(1), 1), slot=0)
    (told,) = run_world(1, resume_another_model, nodes.base)
    assert "is of another model: tensor 'model.w' has shape [40, 12]" in told
    assert "`windlass snapshot gc /runs/tiny --stop`" in told


def test_a_lost_node_is_decoded_and_the_state_cut_for_fewer_ranks(nodes_with_processes):
    nodes = nodes_with_processes(3)
    nodes.take(8, even_shards(some_state(1), 3))
    os.kill(nodes.folders[1].read_smp().pid, signal.SIGKILL)
    nodes.lose(1)
    told = resume(nodes, ["node-0", "node-2"])
    assert_restored(told, some_state(1))
    choice, passed_over, *_, resumed, _ = told[0]
    assert choice == "step 8 of generation 1 from memory, ranks 1 by decoding"
    assert len(passed_over) == 1 and passed_over[0].startswith("node-1 is not counted: ")
    assert resumed.own_facts == {}, "facts of a rank mean nothing in a world of another size"


def test_a_replaced_node_gets_its_bytes_and_facts_from_the_others(nodes_with_processes):
    nodes = nodes_with_processes(3)
    nodes.take(8, even_shards(some_state(1), 3))
    for file in nodes.folders[1].segments():
        file.path.unlink()
    told = resume(nodes, ["node-0", "node-1", "node-2"])
    assert_restored(told, some_state(1))
    assert [resumed.own_facts["rng"] for *_, resumed, _ in told] == ["of rank 0", "of rank 1", "of rank 2"]


def test_drives_are_read_after_all_nodes_were_rebooted_and_one_lost_its_drive(nodes_with_processes, tmp_path):
    drives = tmp_path / "drives"
    nodes = nodes_with_processes(3)
    nodes.take(8, even_shards(some_state(1), 3))
    for folder in nodes.folders:
        keep_on_drive(nodes, folder, drives, 8)
        os.kill(folder.read_smp().pid, signal.SIGKILL)
    nodes.lose(0, 1, 2)
    shutil.rmtree(drives / JOB / "node-1")
    for folder in nodes.folders:
        Settings(local_dir=str(drives)).keep_in(folder.create(TOKEN))
        nodes_with_processes.start(folder)
    told = resume(nodes, ["node-0", "node-1", "node-2"], local_dir=drives)
    assert_restored(told, some_state(1))
    assert told[0][0] == "step 8 of generation 1 from memory and local drives, ranks 1 by decoding"
    assert [t[4].tier for t in told] == ["local"] * 3
    assert [t[4].own_facts["rng"] for t in told] == ["of rank 0", "of rank 1", "of rank 2"]


def test_a_node_without_ranks_is_asked_for_what_it_holds(nodes_with_processes):
    nodes = nodes_with_processes(3, scheme="none")
    nodes.take(8, even_shards(some_state(1), 3))
    told = resume(nodes, ["node-2", "node-0"])
    assert_restored(told, some_state(1))
    assert told[0][0] == "step 8 of generation 1 from memory"


def test_a_node_that_dies_after_it_was_heard_is_replaced_by_decoding(nodes_with_processes):
    nodes = nodes_with_processes(3)
    nodes.take(8, even_shards(some_state(1), 3))
    told = resume(nodes, ["node-0", "node-1"], victim="node-2")
    assert_restored(told, some_state(1))
    assert any("chunks of rank 2 were computed" in text for text in told[0][4].repaired)


def test_damage_beyond_repair_leads_all_ranks_to_the_step_before(nodes_with_processes):
    nodes = nodes_with_processes(2)
    nodes.take(8, even_shards(some_state(1), 2), slot=0)
    nodes.take(9, even_shards(some_state(2), 2), slot=1)
    nodes.flip("data", 0, 70, slot=1)
    nodes.flip("parity", 1, 70, slot=1)
    told = resume(nodes, ["node-0", "node-1"])
    assert_restored(told, some_state(1))
    assert told[0][4].step == 8 and told[0][2] == {"step": 8}
    assert any("chunk 0 of rank 0 is lost" in text for text in told[0][1])
    assert any("step 9 of generation 1 in memory: rank 0" in text for text in told[0][1])


def test_storage_is_named_where_it_is_newer_or_all_that_is_left(nodes_with_processes):
    nodes = nodes_with_processes(2, scheme="none")
    nodes.take(8, even_shards(some_state(1), 2))
    told = resume(nodes, ["node-0", "node-1"], saved=[Saved(9, "step-00000009", 1)])
    assert [(t[4].tier, t[4].place, t[3]) for t in told] == [("storage", "step-00000009", None)] * 2
    nodes.flip("data", 1, 70)
    told = resume(nodes, ["node-0", "node-1"], saved=[Saved(4, "step-00000004", 1)])
    assert [(t[4].tier, t[4].step) for t in told] == [("storage", 4)] * 2


def test_a_run_that_goes_back_takes_the_older_step(nodes_with_processes):
    nodes = nodes_with_processes(2)
    nodes.take(8, even_shards(some_state(1), 2), slot=0)
    nodes.take(9, even_shards(some_state(2), 2), slot=1)
    told = resume(nodes, ["node-0", "node-1"], left={1: 8})
    assert_restored(told, some_state(1))
    assert "left behind when generation 1 went back to step 8" in told[0][1][0]


def test_nothing_left_anywhere_is_an_error_on_every_rank(nodes_with_processes):
    nodes = nodes_with_processes(2, scheme="none")
    nodes.take(8, even_shards(some_state(1), 2))
    nodes.flip("data", 1, 70)
    found = outcomes(2, resume_and_tell, nodes.base, ["node-0", "node-1"], {}, None)
    assert all(isinstance(o.error, CheckpointError) and "no step can be restored" in str(o.error) for o in found)


def test_empty_nodes_have_nothing_to_go_on_from(nodes_with_processes):
    nodes = nodes_with_processes(2)
    assert resume(nodes, ["node-0", "node-1"]) == [(None,) * 6] * 2


def test_a_rank_killed_at_any_moment_of_resuming_loses_nothing(nodes_with_processes):
    nodes = nodes_with_processes(3)
    nodes.take(8, even_shards(some_state(1), 3))
    os.kill(nodes.folders[1].read_smp().pid, signal.SIGKILL)
    nodes.lose(1)
    for point in ("restore.plan", "restore.fetch", "restore.decode", "restore.load"):
        fault = {"WINDLASS_FAULT": f"kill:{point}:rank=1:step=8"}
        found = outcomes(2, resume_and_tell, nodes.base, ["node-0", "node-2"], {}, None, env=fault)
        assert all(outcome.error is not None for outcome in found), point
    assert_restored(resume(nodes, ["node-0", "node-2"]), some_state(1))
