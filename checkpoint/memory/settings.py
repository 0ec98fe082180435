"""What a snapshot process is told by the trainers: cadence, limits, places. Kept in its folder for its successor.

Must not know: configurations of layers above, who fills it in.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from windlass.checkpoint.memory.folder import NodeFolder
from windlass.dist.errors import CheckpointError


@dataclass(frozen=True)
class Settings:
    """The wishes of a job that its snapshot processes carry out. Defaults: keep snapshots in memory, nothing else.

    Units: seconds, steps, bytes, bytes/s
    """

    lease_s: float = 1800.0
    peer_timeout_s: float = 10.0
    link_bytes_per_s: float = 0.0
    hang_s: float = 60.0
    start_s: float = 600.0
    mode: str = "sync"  # sync: trainers write checkpoints themselves
    every: int = 0  # of checkpoints in `storage`
    storage: str = ""  # folder or URL of the checkpoints
    keep: int = 3
    local_every: int = 0
    local_dir: str = ""
    bandwidth_bytes_per_s: float = 0.0
    run_folder: str = ""  # where trainers write their stacks

    @staticmethod
    def parse(values: dict[str, Any]) -> Settings:
        """Read settings that came as JSON.

        Raises: CheckpointError naming a setting that is not known or of another kind
        """
        kinds = {f.name: type(f.default) for f in fields(Settings)}
        for name, value in values.items():
            kind = kinds.get(name)
            accepted = (int, float) if kind is float else (kind,)
            if kind is None or type(value) not in accepted:
                raise CheckpointError(
                    f"settings of a snapshot process: {name} = {value!r}: expected one of {', '.join(kinds)}"
                    + ("" if kind is None else f", {name} as {kind.__name__}")
                )
        return Settings(**values)

    def every_of(self, level: str) -> int:
        """Return after how many steps a level is due, 0 for never."""
        if level == "local":
            return self.local_every if self.local_dir else 0
        return self.every if self.mode != "sync" and self.storage else 0

    def keep_in(self, folder: NodeFolder) -> None:
        """Leave the settings in a node's folder."""
        folder.replace(folder.path / "settings.json", json.dumps(asdict(self)).encode())

    @staticmethod
    def read_from(folder: NodeFolder) -> Settings:
        """Return what was left in a node's folder; the defaults where nothing was."""
        path = folder.path / "settings.json"
        try:
            return Settings.parse(json.loads(path.read_bytes()))
        except FileNotFoundError:
            return Settings()
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: {error}. Start the workers again") from error
