"""The environment that a worker in a Ray cluster gets."""

from __future__ import annotations

import pytest

from windlass.dist.env import read_process_env
from windlass.launch.local import LaunchConfig
from windlass.launch.ray.placement import seat_workers
from windlass.launch.ray.workers import ActorFacts, worker_variables


def test_workers_of_a_node_see_all_their_gpus_in_the_order_of_local_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    facts = [
        ActorFacts("a", "10.0.0.1", "eth0", 8, ("3",)),
        ActorFacts("b", "10.0.0.2", "ens1", 4, ("0",)),
        ActorFacts("a", "10.0.0.1", "eth0", 8, ("1",)),
    ]
    meeting = {"master_addr": "10.0.0.1", "master_port": 29500}
    seats = seat_workers([fact.node_id for fact in facts])
    seen = []
    for seat in seats:
        node = [facts[other.worker] for other in seats if other.node_rank == seat.node_rank]
        variables = worker_variables(seat, len(seats), meeting, node, LaunchConfig(workers=3))
        env = read_process_env(variables)
        assert (env.rank, env.local_rank, env.node_rank, env.launcher) == (
            seat.rank,
            seat.local_rank,
            seat.node_rank,
            "ray",
        )
        assert variables["NCCL_DEBUG"] == "WARN"
        seen.append([variables[name] for name in ("CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS")])
    assert seen == [["3,1", "eth0", "4"], ["3,1", "eth0", "4"], ["0", "ens1", "4"]]
