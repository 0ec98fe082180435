"""One lab for all tests of a session that run jobs which lose something."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fault.memory_runs import Lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab
