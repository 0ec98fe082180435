"""The fault matrix, real processes: nodes that are lost with their processes, memory and local folders.

Row 7   one node: idle, while its snapshot is copied, half encoded, between encoded and commit, after the commit
        -> test_a_node_lost_at_any_moment_costs_at_most_the_step_that_was_not_protected
Row 9   two nodes of different groups at once
        -> test_two_nodes_of_different_groups_are_restored_from_memory_and_two_of_one_group_from_the_checkpoint
Row 10  two nodes of one group: parity of one node falls back to the checkpoint, two parities or copies do not
        -> the same test, and
           test_two_nodes_of_one_group_are_restored_from_memory_where_the_scheme_allows_two
Row 11  all nodes
        -> test_all_nodes_lost_at_once_go_on_from_the_newest_checkpoint
"""

from __future__ import annotations

import pytest

from tests.fault.memory_runs import Act, Lab, Live, hold, protected
from tests.waiting import until
from windlass.checkpoint.memory.header import State

FOUR = {"workers": 4, "nodes": 4}


def encoded_on(node: int, rank: int, step: int) -> Act:
    """Wait until a node holds parity of a rank for a step, whether that is committed or not."""

    def there(live: Live) -> bool:
        return any(h.step == step and h.state >= State.ENCODED for h in live.headers(node, "parity", rank))

    return Act(step, lambda live: until(lambda: there(live)))


def test_a_node_lost_at_any_moment_costs_at_most_the_step_that_was_not_protected(lab: Lab) -> None:
    """Five generations, each losing the node of rank 1, whatever its name is by then."""
    told = lab.run(
        spares=5,
        fault=",".join(
            [
                hold(2, generation=1),
                "kill:snapshot.chunk:rank=1:step=4:generation=2",
                hold(6, generation=3),
                "hang:smp.encode:rank=1:step=6:generation=3",
                hold(8, generation=4),
                "hang:smp.vote:rank=1:step=8:generation=4",
                hold(10, generation=5),
                "hang:smp.commit:rank=1:step=10:generation=5",
            ]
        ),
        strikes=[
            protected(2),
            "node=1@step=2",
            # 2: killed by the fault; its node goes with it, see below
            "node=3@step=6",
            encoded_on(0, 0, 8),
            "node=4@step=8",
            protected(10),
            "node=5@step=10",
        ],
        between={3: lambda live: live.lose(2)},
    )
    told.check(lab.undisturbed(), lost=1, restarts=5)
    # Of step 6 the parity on node-0 may be made before node-3, whose own is never made, is lost: then it counts.
    assert told.restored[2] in [(5, "ram"), (6, "ram")]
    assert [*told.restored[:2], *told.restored[3:]] == [(step, "ram") for step in (2, 3, 8, 10)]
    assert [record["nodes"] for record in told.of("lost")] == [[f"node-{number}"] for number in range(1, 6)]


def test_two_nodes_of_different_groups_are_restored_from_memory_and_two_of_one_group_from_the_checkpoint(
    lab: Lab,
) -> None:
    groups: list[object] = []

    def one_group(live: Live) -> None:
        live.lose(*(live.node_of(rank) for rank in live.groups()[0]))

    told = lab.run(
        **FOUR,
        spares=4,
        settings=["snapshot.group=2", "checkpoint.every=3"],
        fault=f"{hold(5)},{hold(8, generation=2)}",
        strikes=[
            Act(5, lambda live: groups.append(live.groups())),
            protected(5),
            "node=1@step=5",
            "node=2@step=5",
            protected(8),
            Act(8, lambda live: live.until_at("storage", 6)),
            Act(8, one_group),
        ],
    )
    told.check(lab.undisturbed(workers=4), lost=2, restarts=2)
    assert groups == [((0, 2), (1, 3))]
    assert [len(record["nodes"]) for record in told.of("lost")] == [2, 2]
    assert told.restored == [(5, "ram"), (6, "storage")]


@pytest.mark.soak
@pytest.mark.parametrize(
    "scheme",
    [
        ("snapshot.redundancy=reed_solomon", "snapshot.parity=2", "snapshot.group=4"),
        ("snapshot.redundancy=replica", "snapshot.parity=2"),
    ],
    ids=["reed_solomon", "replica"],
)
def test_two_nodes_of_one_group_are_restored_from_memory_where_the_scheme_allows_two(
    lab: Lab, scheme: tuple[str, ...]
) -> None:
    told = lab.run(
        **FOUR,
        spares=2,
        settings=[*scheme, "checkpoint.every=3"],
        fault=hold(5),
        strikes=[protected(5), "node=1@step=5", "node=2@step=5"],
    )
    told.check(lab.undisturbed(workers=4), lost=0, restarts=1)
    assert told.restored == [(5, "ram")]


@pytest.mark.soak
def test_all_nodes_lost_at_once_go_on_from_the_newest_checkpoint(lab: Lab) -> None:
    told = lab.run(
        spares=2,
        settings=["checkpoint.every=3"],
        fault=hold(7),
        strikes=[protected(7), Act(7, lambda live: live.until_at("storage", 6)), "node=0@step=7", "node=1@step=7"],
    )
    told.check(lab.undisturbed(), lost=1, restarts=1)
    assert told.restored == [(6, "storage")]
