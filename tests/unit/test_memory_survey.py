"""What is asked of nodes before a step is chosen, and what stays behind of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.waiting import until
from tests.wire_case import HOST, JOB, TOKEN, serving
from windlass.checkpoint.memory.client import SnapshotClient
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.layout import Layout
from windlass.checkpoint.memory.survey import Survey
from windlass.dist.errors import CheckpointError


def test_nodes_without_ranks_are_asked_and_no_connection_to_them_stays_open(tmp_path: Path) -> None:
    layout = Layout((), 0)

    def handle(verb: str, fields: dict[str, Any], payload: memoryview) -> tuple[dict[str, Any], Any]:
        if verb == "layout" and fields["digest"] == layout.digest:
            return {}, layout.dump()
        if verb != "inventory":
            raise CheckpointError("nothing is here")
        return {"node": "node-9", "generation": 3, "held": [], "memberships": []}, None

    folder = NodeFolder(tmp_path, JOB, "node-0").create(TOKEN)
    with serving() as make:
        case = make(handle=handle)
        nobody = make()
        nobody.server.close()
        with SnapshotClient(HOST, nobody.server.port, JOB, TOKEN, 30.0, generation=3) as own:
            survey = Survey(own, folder, None, 30.0)
            asked = survey.ask([("node-8", HOST, nobody.server.port), ("node-9", HOST, case.server.port)])
            assert [report["node"] for report in asked] == ["node-8", "node-9"]
            assert asked[0]["problem"] and not asked[1]["problem"]
            assert survey.layout(layout.digest) == layout.dump().decode()
            assert survey.layout("0" * 32) == ""
            until(lambda: case.server.num_connections == 0)
            assert case.refused("answered") == 2
