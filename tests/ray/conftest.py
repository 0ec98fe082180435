"""A Ray cluster of two emulated nodes, once for all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ray.cluster_utils import Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes of two cores each, on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # a cluster made this way has no token, whatever the machine has
        both = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        both.add_node(num_cpus=2)
        yield both
        both.shutdown()
