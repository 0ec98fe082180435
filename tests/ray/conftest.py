"""A Ray cluster of two emulated nodes, once for all tests here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
from ray.cluster_utils import Cluster


@pytest.fixture(scope="session", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Refuse to run beside another process of this session that starts Ray too: each would find the other's cluster."""
    me = os.environ.get("PYTEST_XDIST_WORKER")
    if me is not None:
        owner = tmp_path_factory.getbasetemp().parent / "ray-owner"
        with contextlib.suppress(FileExistsError), open(owner, "x") as file:
            file.write(me)
        assert owner.read_text() == me, "tests/ray must run in one process: see tests/conftest.py"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes of two cores each, on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # a cluster made this way has no token, whatever the machine has
        both = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        both.add_node(num_cpus=2)
        yield both
        both.shutdown()
