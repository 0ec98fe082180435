"""Reading a step out of the memory of nodes: own bytes, peers' bytes, decoded bytes, and never wrong ones."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoint_doubles import FlatSource, blank, even_shards, on_threads, some_state
from tests.held_nodes import CHUNK, HeldNodes, Wires, bytes_of, layout_of
from windlass.checkpoint.agree import Alone
from windlass.checkpoint.memory.inventory import choose
from windlass.checkpoint.memory.segment import Segment
from windlass.checkpoint.memory.source import MemorySource, file_of, kept_layouts, manifest_of
from windlass.checkpoint.reader import CheckpointReader
from windlass.checkpoint.restore import restore
from windlass.dist.box import Box
from windlass.dist.errors import CheckpointError
from windlass.dist.state import Piece


def big_state(seed=0, rows=40):
    g = torch.Generator().manual_seed(seed)
    return {
        "model.w": torch.randn(rows, 12, generator=g),
        "model.b": torch.randn(33, generator=g).bfloat16(),
        "model.none": torch.empty(0, 3),
        "optimizer.exp_avg.w": torch.randn(rows, 12, generator=g),
        "optimizer.step": torch.tensor(7 + seed),
    }


def nodes_of(tmp_path, num_ranks=4, **more):
    state = big_state()
    sources = even_shards(state, num_ranks)
    nodes = HeldNodes(tmp_path, sources, **more)
    nodes.take(8, sources)
    return nodes, state, sources


def source_of(nodes, reader=0, wires=None, *, timeout_s=0.0, holdings=None):
    choice, passed_over = choose(nodes.holdings() if holdings is None else holdings, {nodes.generation: nodes.world})
    assert choice is not None, passed_over
    return MemorySource(choice, nodes.world, nodes.reach(reader, wires), rank=reader, timeout_s=timeout_s)


def restored(nodes, source, num_ranks=1):
    """Restore into another number of ranks and put the parts together."""
    targets = even_shards(blank(big_state()), num_ranks)
    manifest = manifest_of(nodes.layouts, 8, {"step": 8})
    found = on_threads(
        num_ranks, lambda group: restore(source, targets[group.rank], group, verify=False, manifest=manifest)
    )
    for error in found:
        if isinstance(error, Exception):
            raise error
    return {key: torch.cat([t.flat[key] for t in targets]) for key in targets[0].flat}


def assert_state(found, state):
    for key, whole in state.items():
        assert torch.equal(found[key], whole.reshape(-1)), key


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_a_step_in_memory_is_cut_anew_for_any_number_of_ranks(tmp_path, num_ranks):
    nodes, state, _ = nodes_of(tmp_path)
    source = source_of(nodes)
    assert_state(restored(nodes, source, num_ranks), state)
    assert not source.bad and not source.repaired


SCHEMES = [(4, "xor", 1), (3, "replica", 2), (2, "replica", 1), (5, "reed_solomon", 2), (6, "reed_solomon", 3)]
UNEVEN = [(3, "replica", 1), (5, "replica", 2)]  # groups that are larger than copies need


@pytest.mark.parametrize("num_ranks, scheme, k", SCHEMES + UNEVEN)
def test_any_nodes_within_the_tolerance_are_decoded_bit_by_bit(tmp_path, num_ranks, scheme, k):
    nodes, state, _ = nodes_of(tmp_path, num_ranks, scheme=scheme, k=k)
    every = nodes.holdings()
    for lost in itertools.combinations(range(num_ranks), k):
        reader = next(r for r in range(num_ranks) if r not in lost)
        left = [held for held in every if held.rank not in lost]
        assert_state(restored(nodes, source_of(nodes, reader, holdings=left)), state)


def test_own_bytes_come_from_own_memory_without_a_socket(tmp_path):
    nodes, _, sources = nodes_of(tmp_path)
    wires = Wires(nodes)
    source = source_of(nodes, 2, wires)
    own = bytes_of(sources[2], nodes.layouts[2])
    out = np.zeros(len(own) + 50, np.uint8)
    assert source.open(file_of(2)).read_into(memoryview(out), 0) == len(own) == source.size(file_of(2))
    assert np.array_equal(out[: len(own)], own) and wires.asked == []
    restore(source, FlatSource(blank(big_state())), Alone(), verify=False, manifest=manifest_of(nodes.layouts, 8, {}))
    assert {node for node, _, _ in wires.asked} == {"node-0", "node-1", "node-3"}


def test_a_rank_reads_only_the_chunks_it_needs(tmp_path):
    nodes, state, _ = nodes_of(tmp_path)
    wires = Wires(nodes)
    source = source_of(nodes, 0, wires)
    piece = Piece("model.w", (40, 12), Box((25, 0), (2, 12)), torch.zeros(2, 12))
    with CheckpointReader(source, manifest_of(nodes.layouts, 8, {}), verify=False) as reader:
        reader.fill([piece])
    assert torch.equal(piece.tensor, state["model.w"][25:27])
    assert {node for node, _, _ in wires.asked} == {"node-2"}
    assert sum(size for _, _, size in wires.asked) <= 3 * CHUNK


def test_a_chunk_that_two_reads_share_is_fetched_once(tmp_path):
    nodes, _, sources = nodes_of(tmp_path)
    wires = Wires(nodes)
    source = source_of(nodes, 0, wires)
    own = bytes_of(sources[1], nodes.layouts[1])
    out = np.zeros(10, np.uint8)
    for offset in (0, 10, 40, 90):
        source.read(1, offset, memoryview(out))
        assert np.array_equal(out, own[offset : offset + 10])
    assert wires.asked == [("node-1", "data", CHUNK)]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_part_of_any_rank_is_read_right(tmp_path_factory, data):
    nodes, _, sources = nodes_of(tmp_path_factory.mktemp("nodes"))
    lost = data.draw(st.integers(0, 3))
    left = [held for held in nodes.holdings() if held.rank != lost]
    source = source_of(nodes, (lost + 1) % 4, holdings=left)
    for _ in range(5):
        rank = data.draw(st.integers(0, 3))
        whole = bytes_of(sources[rank], nodes.layouts[rank])
        low = data.draw(st.integers(0, len(whole)))
        out = np.zeros(data.draw(st.integers(0, 600)), np.uint8)
        count = source.read(rank, low, memoryview(out))
        assert count == min(len(out), len(whole) - low)
        assert np.array_equal(out[:count], whole[low : low + count])


def test_a_flipped_byte_is_computed_anew_and_told(tmp_path):
    nodes, state, _ = nodes_of(tmp_path)
    nodes.flip("data", 2, 300)
    for reader in (0, 2):
        source = source_of(nodes, reader)
        assert_state(restored(nodes, source), state)
        (told,) = source.repaired
        assert "chunk 2 of rank 2 was computed" in told and "node-2's memory: chunk 2 is damaged" in told


def test_a_rank_whose_header_is_lost_is_told_in_one_line_however_many_chunks_it_has(tmp_path):
    nodes, state, _ = nodes_of(tmp_path)
    source = source_of(nodes, 0)
    segment = Segment.open(next(s.path for s in nodes.folders[2].segments() if s.role == "data"), writable=True)
    segment.slots[0].free()
    segment.close()
    assert_state(restored(nodes, source), state)
    (told,) = source.repaired
    assert "chunks of rank 2 were computed: data of rank 2" in told


def test_flipped_bytes_of_every_node_are_computed_anew_where_they_are_in_different_places(tmp_path):
    nodes, state, _ = nodes_of(tmp_path, 3)
    stripes = nodes.world
    assert stripes.world_size == 3
    nodes.flip("data", 0, 0)
    nodes.flip("parity", 1, CHUNK)
    source = source_of(nodes, 2)
    assert_state(restored(nodes, source), state)
    assert len(source.repaired) == 1


def test_damage_beyond_the_tolerance_is_said_and_nothing_wrong_is_returned(tmp_path):
    nodes, _, _ = nodes_of(tmp_path, 2, scheme="xor")
    nodes.flip("data", 0, 5)
    nodes.flip("parity", 1, 5)
    source = source_of(nodes, 1)
    with pytest.raises(CheckpointError, match=r"chunk 0 of rank 0 is lost: .*node-0's memory: chunk 0 is damaged"):
        restored(nodes, source)
    assert {(held.role, held.rank) for held in source.bad} == {("data", 0), ("parity", 1)}


def test_without_redundancy_a_damaged_chunk_is_lost(tmp_path):
    nodes, _, _ = nodes_of(tmp_path, 2, scheme="none")
    nodes.flip("data", 0, 5)
    with pytest.raises(CheckpointError, match="nothing else in memory makes up for it"):
        restored(nodes, source_of(nodes, 1))


def test_a_node_that_dies_while_it_is_read_is_replaced_by_decoding(tmp_path):
    nodes, state, _ = nodes_of(tmp_path)
    wires = Wires(nodes)
    source = source_of(nodes, 0, wires)
    wires.cut_after["node-3"] = 2
    assert_state(restored(nodes, source), state)
    assert "node-3" in wires.cut and len([a for a in wires.asked if a[0] == "node-3"]) == 2


def test_a_decode_source_that_dies_is_replaced_by_another(tmp_path):
    nodes, state, _ = nodes_of(tmp_path, 5, scheme="reed_solomon", k=2)
    wires = Wires(nodes)
    left = [held for held in nodes.holdings() if held.rank != 1]
    source = source_of(nodes, 0, wires, holdings=left)
    wires.cut_after["node-3"] = 3
    assert_state(restored(nodes, source), state)
    assert "node-3" in wires.cut


def test_a_decode_source_that_dies_and_has_no_substitute_is_named(tmp_path):
    nodes, _, _ = nodes_of(tmp_path)
    wires = Wires(nodes)
    left = [held for held in nodes.holdings() if held.rank != 1]
    source = source_of(nodes, 0, wires, holdings=left)
    wires.cut_after["node-3"] = 1
    with pytest.raises(
        CheckpointError, match=r"chunk \d+ of rank 1 is lost: no copy of it is left; .*node-3 did not answer"
    ):
        restored(nodes, source)
    assert any(held.node == "node-3" and "did not answer" in why for held, why in source.bad.items())


def test_a_snapshot_process_that_comes_back_is_asked_again(tmp_path, monkeypatch):
    nodes, state, _ = nodes_of(tmp_path, 2, scheme="none")
    wires = Wires(nodes)
    source = source_of(nodes, 0, wires, timeout_s=20.0)
    wires.cut.add("node-1")
    monkeypatch.setattr("windlass.checkpoint.memory.source.time.sleep", lambda seconds: wires.cut.clear())
    assert_state(restored(nodes, source), state)


def test_a_copy_that_was_away_for_a_moment_is_not_to_blame_for_what_fails_later(tmp_path, monkeypatch):
    nodes, _, _ = nodes_of(tmp_path, 2, scheme="none")
    wires = Wires(nodes)
    source = source_of(nodes, 0, wires, timeout_s=20.0)
    wires.cut.add("node-1")
    monkeypatch.setattr("windlass.checkpoint.memory.source.time.sleep", lambda seconds: wires.cut.clear())
    assert source.facts(1)["rng"] == "of rank 1" and not source.bad
    wires.cut.add("node-1")
    assert source.read(1, 0, memoryview(bytearray(CHUNK))) == CHUNK and not source.bad
    nodes.flip("data", 0, 5)
    with pytest.raises(CheckpointError, match="chunk 0 of rank 0 is lost"):
        source.read(0, 0, memoryview(bytearray(CHUNK)))
    assert [held.node for held in source.bad] == ["node-0"]


def test_a_copy_that_stays_away_is_to_blame_until_it_can_be_read(tmp_path):
    nodes, _, _ = nodes_of(tmp_path, 2, scheme="none")
    wires = Wires(nodes)
    source = source_of(nodes, 0, wires)
    wires.cut.add("node-1")
    with pytest.raises(CheckpointError, match=r"chunk 0 of rank 1 is lost: .*node-1 is not there"):
        source.read(1, 0, memoryview(bytearray(CHUNK)))
    assert [held.node for held in source.bad] == ["node-1"]
    wires.cut.clear()
    source._away.clear()
    assert source.read(1, 0, memoryview(bytearray(CHUNK))) == CHUNK and not source.bad


def test_a_slot_that_was_overwritten_since_it_was_listed_is_not_read(tmp_path):
    nodes, _, sources = nodes_of(tmp_path, 2, scheme="none")
    listed = nodes.holdings()
    nodes.take(9, sources)
    with pytest.raises(CheckpointError, match="step 8 of generation 1, in node-0's memory is not there any more"):
        restored(nodes, source_of(nodes, 0, holdings=listed))


def test_a_segment_of_another_layout_is_not_read(tmp_path):
    nodes, _, _ = nodes_of(tmp_path, 2, scheme="none")
    (tmp_path / "other").mkdir()
    other = HeldNodes(tmp_path / "other", even_shards(some_state(), 2), scheme="none")
    source = MemorySource(choose(nodes.holdings(), {1: nodes.world})[0], other.world, nodes.reach(0), timeout_s=0.0)
    with pytest.raises(CheckpointError, match="is of another job or layout"):
        source.read(0, 0, memoryview(bytearray(8)))


def test_facts_of_a_rank_survive_its_node(tmp_path):
    nodes, _, _ = nodes_of(tmp_path)
    left = [held for held in nodes.holdings() if held.rank != 1]
    source = source_of(nodes, 0, holdings=left)
    assert [source.facts(rank)["rng"] for rank in range(4)] == [f"of rank {rank}" for rank in range(4)]
    assert source.any_facts()["extra"] == {"step": 8}


def test_facts_of_a_rank_that_nobody_keeps_are_none(tmp_path):
    nodes, _, _ = nodes_of(tmp_path, 2, scheme="none")
    source = source_of(nodes, 0)
    source._copies.clear()
    source.choice.data.pop(1)
    assert source.facts(1) is None and source.any_facts()["rng"] == "of rank 0"


def test_a_lost_layout_is_named(tmp_path):
    nodes, _, _ = nodes_of(tmp_path, 2)
    documents = {layout.digest: layout for layout in nodes.layouts}
    assert kept_layouts(documents, nodes.world) == nodes.layouts
    del documents[nodes.layouts[1].digest]
    with pytest.raises(CheckpointError, match=r"no node has the layout of ranks \[1\]"):
        kept_layouts(documents, nodes.world)


def test_ranks_that_disagree_on_a_tensor_are_refused():
    layouts = [layout_of(FlatSource(big_state(rows=rows))) for rows in (4, 5)]
    with pytest.raises(CheckpointError, match=r"tensor 'model.w' is float32 of shape \[5, 12\] on rank 1"):
        manifest_of(layouts, 8, {})


def test_names_that_are_no_ranks_are_not_found(tmp_path):
    nodes, _, _ = nodes_of(tmp_path, 2)
    source = source_of(nodes)
    for name in ("manifest.json", "rank-00002", "rank-x"):
        with pytest.raises(FileNotFoundError):
            source.open(name)
