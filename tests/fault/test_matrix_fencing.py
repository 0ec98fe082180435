"""What is of an older generation changes nothing, what hangs is ended, and a restore that loses its source retries.

Rows of the fault matrix:
     8  a source of a restore dies meanwhile  -> test_a_node_that_is_lost_during_a_restore_*, test_a_snapshot_process_*
    14  a zombie                              -> test_a_node_that_was_given_up_but_lives_on_*
    15  a rank that hangs, then goes on       -> test_a_rank_that_hangs_*, test_a_node_that_was_given_up_but_lives_on_*
"""

from __future__ import annotations

import os
import signal
import threading

import pytest

from tests.fault.memory_runs import Act, Lab, Live, hold, protected
from tests.waiting import until
from windlass.checkpoint.memory.client import SnapshotClient
from windlass.checkpoint.memory.heartbeat import Beat, is_alive, read_heartbeat
from windlass.checkpoint.memory.inventory import STORAGE
from windlass.dist.errors import CheckpointError
from windlass.launch.control_log import read_phases


def beat_of(live: Live, node: int, rank: int) -> Beat:
    beat = read_heartbeat(live.memory(node).beat_path(rank))
    assert beat is not None
    return beat


def test_a_node_that_was_given_up_but_lives_on_changes_nothing(lab: Lab) -> None:
    zombie: list[Beat] = []
    refused: list[str] = []

    def give_up(live: Live) -> None:
        """Cut a node off whose rank hangs, so that it does not notice."""
        live.fleet.strike("stop", "1")
        zombie.append(beat_of(live, 1, 1))
        live.fleet.strike("zombie", "node-1")

    def wake(live: Live) -> None:
        """Let it go on while the next generation trains, and let its snapshot process speak for it."""
        assert is_alive(zombie[0].pid, zombie[0].started)
        os.kill(zombie[0].pid, signal.SIGCONT)
        until(lambda: not is_alive(zombie[0].pid, zombie[0].started))
        for ask in (SnapshotClient.inventory, lambda client: client.flush(1.0)):
            with SnapshotClient.of(live.memory(0), generation=1) as client:
                with pytest.raises(CheckpointError, match="generation 1 is over") as said:
                    ask(client)
                refused.append(str(said.value))
        with SnapshotClient.of(live.memory(1), generation=1) as own:
            assert own.status().generation == 1, "it has not heard of the new one"

    # Its watchdog must not end it before it is woken.
    told = lab.run(spares=1, strikes=[Act(5, give_up), Act(8, wake)], settings=["recovery.hang_s=600"])
    told.check(lab.undisturbed(), restarts=1)
    assert told.of("lost")[0]["nodes"] == ["node-1"] and len(refused) == 2


def test_a_rank_that_hangs_is_found_by_its_silence_told_with_stacks_and_ended(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each node finds its own rank, in any order: rank 0 stands still too, and is not ended before both are found."""
    monkeypatch.setattr("windlass.launch.controller.REPORT_S", 60.0)
    told = lab.run(fault=hold(5), strikes=["stop=1@step=5"], settings=["recovery.hang_s=6"])
    told.check(lab.undisturbed(), restarts=1)
    [failure] = told.of("failure")
    assert failure["what"] == "hang" and "stopped by a signal" in failure["message"]
    stacks = (told.run / "stacks" / "gen-1-rank-0.txt").read_text()
    assert "launch/trainer.py" in stacks, "the one that waited has written where"
    assert told.recovered[0]["seconds"]["detect"] < 50, "what is usual is a minute"


@pytest.mark.soak
def test_a_node_that_is_lost_during_a_restore_from_parity_is_made_good_by_more_parity(lab: Lab) -> None:
    settings = ["snapshot.redundancy=reed_solomon", "snapshot.parity=2"]
    told = lab.run(
        workers=4,
        nodes=4,
        spares=2,
        strikes=["node=3@step=5"],
        fault="kill:restore.decode:generation=2",
        between={3: lambda live: live.lose(0)},
        settings=settings,
    )
    told.check(lab.undisturbed(4), restarts=2, recoveries=1)
    assert told.restored[0][1] == "ram"


def test_a_node_that_is_lost_during_a_restore_beyond_what_parity_bears_goes_on_from_a_checkpoint(lab: Lab) -> None:
    told = lab.run(
        spares=2,
        strikes=[protected(7), "node=1@step=7"],
        fault=f"{hold(7)},kill:restore.decode:generation=2",
        between={3: lambda live: live.lose(0)},
        settings=["checkpoint.every=2"],
        pace=("peers", "storage"),
    )
    told.check(lab.undisturbed(), lost=2, restarts=2, recoveries=1)
    assert told.restored[-1] == (6, STORAGE)


@pytest.mark.soak
def test_a_snapshot_process_that_dies_while_it_is_read_from_is_replaced_and_read_again(lab: Lab) -> None:
    def kill_while_read(live: Live) -> None:
        def kill() -> None:
            until(lambda: any(report["phase"] == "met" for report in read_phases(live.run, 2)))
            live.memories["node-0"].kill()

        live.lose(1)
        threading.Thread(target=kill, daemon=True).start()

    told = lab.run(spares=1, fault="kill:train.forward:rank=1:step=6:generation=1", between={2: kill_while_read})
    told.check(lab.undisturbed())
    assert {tier for _, tier in told.restored} == {"ram"}
