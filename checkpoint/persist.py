"""Makes snapshots durable from the process that holds them, in two phases and without torch.

    begin     one process makes a staging folder at the target
    prepare   every node writes its ranks' files into it, durably, and tells what it wrote
    commit    one process joins what was told, writes the manifest last and publishes
    retire    afterwards: older ones go

Level "storage" is a folder or URL that all nodes share; what lies there is what `save` writes, for other tools too.
Level "local" is a drive of this node (`local_level.py`). A step that cannot be written leaves nothing behind.
Fault points: persist.open, persist.write, persist.fsync, persist.metadata, persist.manifest, persist.rename,
persist.replace, persist.renamed, persist.purge.
Must not know: torch, sockets, which steps are due, who leads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from windlass.checkpoint.archives import Checked, file_bytes, write_archives
from windlass.checkpoint.commit import ARCHIVE_BYTES, commit
from windlass.checkpoint.fence import read_fence
from windlass.checkpoint.local_level import LocalLevel
from windlass.checkpoint.manifest import readable_bytes
from windlass.checkpoint.memory.folder import NodeFolder
from windlass.checkpoint.memory.header import SlotHeader, State
from windlass.checkpoint.memory.inventory import LOCAL, STORAGE
from windlass.checkpoint.memory.layout import Layout
from windlass.checkpoint.memory.membership import Membership
from windlass.checkpoint.memory.pace import Pace
from windlass.checkpoint.memory.segment import Slot
from windlass.checkpoint.memory.settings import Settings
from windlass.checkpoint.retention import discard, remove_replaced, retain, sweep
from windlass.checkpoint.storage import Storage, storage_of
from windlass.checkpoint.store import PERSIST, CheckpointInfo, begin_generation, staging_name, verify
from windlass.dist.dcp_format import data_file_name
from windlass.dist.env import fault
from windlass.dist.errors import CheckpointError

LEAST_VALID = 2  # checkpoints that retention never touches, whatever checkpoint.keep says; not with mode "sync"


class Persister:
    """Writes the slots of one node, and commits for all nodes where it is asked to. Any thread, one step at a time of a
    level.

    Raises: CheckpointError with where, why, and the bytes needed and free; then nothing was left behind
    """

    def __init__(self, folder: NodeFolder, node: str, settings: Settings, log: Callable[[str], None]) -> None:
        self.folder, self.node, self.settings, self._log = folder, node, settings, log
        self._pace = Pace(settings.bandwidth_bytes_per_s)
        self._storage: Storage | None = None
        self._local = LocalLevel(folder, settings.local_dir) if settings.local_dir else None
        self._valid: set[str] = set()  # seals of checkpoints whose every byte was seen to be right

    @property
    def storage(self) -> Storage:
        """Return the place that all nodes share."""
        if self._storage is None:
            if not self.settings.storage:
                raise CheckpointError("no storage was given for checkpoints: give a run folder or checkpoint.url")
            self._storage = storage_of(self.settings.storage)
        return self._storage

    @property
    def local(self) -> LocalLevel:
        """Return the level on this node's drive."""
        if self._local is None:
            raise CheckpointError(f"node {self.node} was given no checkpoint.local_dir")
        return self._local

    # -- the two phases ----------------------------------------------------------------------------------------------

    def begin(self, level: str, step: int, generation: int, membership: Membership) -> str:
        """Make the folder that a step is written into; return its name.

        What snapshot processes of this generation, and anybody of older ones, left unfinished is removed.
        Level "local": on this node only.
        """
        if level == LOCAL:
            needed = sum(m.num_bytes for m in membership.by_node[self.node])
            with self._reporting(level, step):
                return self.local.begin(step, generation, 2 * needed if membership.scheme != "none" else needed)
        storage = self.storage
        needed = sum(m.num_bytes + self._frames_bytes(m.layout) for m in membership.members)
        with self._reporting(level, step, needed):
            storage.make_folder()
            begin_generation(storage, generation)
            sweep(storage, generation, PERSIST)  # trainers may be writing there at this moment
            free = storage.free_bytes()
            if free is not None and free < needed:
                raise CheckpointError("there is not enough free space")
            temporary = staging_name(storage, step, generation, PERSIST)
            storage.make_folder(temporary)
            return temporary

    def prepare(
        self,
        level: str,
        step: int,
        generation: int,
        temporary: str,
        membership: Membership,
        data: Mapping[int, Slot],
        parity: Mapping[int, Slot],
        come_further: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Write this node's part of a step durably; return what `commit` is to be told of it, as JSON.

        The slots must stay as they are until this returns; one that does not is noticed. `come_further` is called
        before every part, and what it raises ends the writing.

        Blocks: host
        """
        headers = {rank: self._header(slot, rank, step, generation) for rank, slot in data.items()}

        def fault(point: str, rank: int, step: int) -> None:
            come_further()
            self._fault(point, rank, step)

        with self._reporting(level, step):
            if level == LOCAL:
                with self._clearing(level, temporary):
                    layouts = {digest for h in headers.values() for digest in [h.layout, *h.layouts.values()]}
                    pairs = [(slot, headers[rank]) for rank, slot in sorted(data.items())]
                    pairs += [(s, self._header(s, r, step, generation)) for r, s in sorted(parity.items())]
                    texts = {digest: text for digest in layouts if (text := self._text_of(digest)) is not None}
                    num_bytes = self.local.prepare(temporary, pairs, membership.dump(), texts, self._pace, fault)
                return {"num_bytes": num_bytes, "ranks": {}, "extra": {}}
            try:  # and not a look into the listing first, which a network file system may have from earlier
                told = {str(r): self._write(temporary, slot, headers[r], fault) for r, slot in sorted(data.items())}
                self.storage.sync(temporary)
            except FileNotFoundError as error:
                raise CheckpointError(
                    f"the folder {temporary} was made on the leader's node but is not there on node {self.node}: "
                    "checkpoints must be on a file system that all nodes share, or at a checkpoint.url"
                ) from error
        files = [rank["file"] for rank in told.values() if rank["file"] is not None]
        extra = headers[0].facts.get("extra", {}) if 0 in headers else {}
        return {"num_bytes": sum(file[1] for file in files), "ranks": told, "extra": extra}

    def commit(
        self,
        level: str,
        step: int,
        generation: int,
        temporary: str,
        rows: Mapping[str, Mapping[str, Any]],
        membership: Membership,
    ) -> str:
        """Publish a step that all nodes have written, `rows` by node; return where it is.

        Blocks: host
        """
        if level == LOCAL:
            with self._reporting(level, step), self._clearing(level, temporary):
                return self.local.commit(temporary, step, generation, self._fault)
        ranks = {int(rank): told for node in rows.values() for rank, told in node["ranks"].items()}
        missing = [m for m in membership.members if m.rank not in ranks]
        if missing:
            self.abandon(level, temporary)
            who = ", ".join(f"rank {m.rank} on {m.node}" for m in missing)
            raise CheckpointError(f"checkpoint of step {step} was not saved: nothing was written by {who}")
        extra = next((dict(node["extra"]) for node in rows.values() if node["extra"]), {})
        storage = self.storage
        with self._reporting(level, step), self._clearing(level, temporary):
            _, name, _ = commit(
                storage,
                temporary,
                step,
                [ranks[rank] for rank in range(membership.world_size)],
                extra | {"generation": generation},
                lambda point: self._fault(point, 0, step),
            )
        return str(storage.inside(name).address)

    def retire(self, step: int, generation: int) -> None:
        """Remove from storage what is not needed any more once a step was committed there; log what resists.

        Blocks: host, and for long: another process's checkpoint may have to be read first
        """
        try:
            remove_replaced(self.storage)
            self._retain(step, generation)
        except Exception as error:  # of whatever kind: the checkpoint itself counts already
            self._log(f"the checkpoint of step {step} is complete, but an older one could not be removed: {error}")

    def abandon(self, level: str, temporary: str) -> None:
        """Remove what was written of a step that will not be committed."""
        try:
            if temporary:
                discard(self.local.root if level == LOCAL else self.storage, temporary)
        except OSError as error:
            self._log(f"{temporary} could not be removed and will be with the next checkpoint: {error}")

    # -- what is there -----------------------------------------------------------------------------------------------

    def fence(self, generation: int) -> None:
        """Mark at the target that a generation has begun; to be called before it reads what is there."""
        if self.settings.storage:
            with self._reporting(STORAGE, None):
                self.storage.make_folder()
                begin_generation(self.storage, generation)

    def hurry(self) -> None:
        """Write as fast as it goes from now on: training waits for it, or has ended."""
        self._pace.lift()

    def sweep(self, generation: int) -> None:
        """Remove what older generations left unfinished on this node's drive and at the target; log what resists."""
        try:
            if self._local is not None:
                self._local.sweep(generation)
            if self.settings.storage and read_fence(self.storage).generation <= generation:
                sweep(self.storage, generation)
        except (OSError, CheckpointError) as error:
            self._log(f"leftovers of older generations could not be removed: {error}")

    # -- parts -------------------------------------------------------------------------------------------------------

    def _write(
        self, temporary: str, slot: Slot, header: SlotHeader, fault: Callable[[str, int, int], None]
    ) -> dict[str, Any]:
        layout = self._layout(header.layout)
        table = [int(word) for word in header.hashes[header.own_key]]
        what = f"snapshot of step {header.step} of rank {header.rank} in memory of node {self.node}"
        source = Checked(what, slot.data, header.num_bytes, header.chunk_bytes, table)
        name = data_file_name(header.rank)
        path = f"{temporary}/{name}"

        def write() -> dict[str, Any]:
            return write_archives(
                self.storage,
                path,
                layout,
                source,
                pace=self._pace,
                fault=lambda point: fault(point, header.rank, header.step),
            )

        try:
            try:
                told = write()
            except FileExistsError:
                # By a process of this node that was killed before it could answer: its successor is asked for the same.
                self.storage.remove(path)
                told = write()
        except Exception:
            with contextlib.suppress(OSError):  # the folder goes too, but on a full disk every byte counts now
                self.storage.remove(path)
            raise
        now = slot.header()  # hashes are checked before bytes are written: in between, they may have been replaced
        if now is None or (now.generation, now.step) != (header.generation, header.step):
            raise CheckpointError(f"the {what} was replaced while it was written")
        if told["file"] is not None:
            told["file"][0] = name
        return told

    def _retain(self, step: int, generation: int) -> None:
        """Retire old checkpoints. One of another process is read once before older ones are given up for it."""

        def is_valid(info: CheckpointInfo) -> bool:
            own = info.order == (generation, step)
            if not own and info.seal not in self._valid and verify(self.storage.inside(info.name)):
                return False
            self._valid.add(info.seal)
            return True

        # With mode "sync" trainers write, so this is a rare extra one, and must keep what a save would.
        least = LEAST_VALID if self.settings.mode != "sync" else 0
        keep = max(self.settings.keep, least) if self.settings.keep else 0
        removed = retain(
            self.storage,
            generation,
            step,
            keep,
            is_valid=is_valid,
            least=least,
            fault=lambda point: self._fault(point, 0, step),
        )
        if removed:
            self._log(f"removed {', '.join(removed)}")

    def _header(self, slot: Slot, rank: int, step: int, generation: int) -> SlotHeader:
        header = slot.header()
        if header is None or (header.rank, header.step, header.generation) != (rank, step, generation):
            raise CheckpointError(
                f"rank {rank} of node {self.node} does not hold step {step} of generation {generation}"
            )
        if header.state < State.FILLED:
            raise CheckpointError(
                f"rank {rank} of node {self.node}: step {step} is {header.state.name}, not yet hashed"
            )
        return header

    def _layout(self, digest: str) -> Layout:
        layout = self.folder.read_layout(digest)
        if layout is None:
            raise CheckpointError(f"{self.folder.layout_path(digest)} is missing: what the snapshot holds is unknown")
        return layout

    def _text_of(self, digest: str) -> bytes | None:
        layout = self.folder.read_layout(digest) if digest else None
        return None if layout is None else layout.dump()

    def _frames_bytes(self, digest: str) -> int:
        """Return how much larger than its bytes the file of a rank is; other nodes' layouts may not be here."""
        layout = self.folder.read_layout(digest)
        if layout is None:
            return ARCHIVE_BYTES
        return file_bytes(layout) - sum(f.num_bytes for f in layout.fragments)

    def _fault(self, point: str, rank: int, step: int) -> None:
        fault(f"persist.{point}", rank=rank, step=step, generation=self.folder.read_generation())

    @contextmanager
    def _clearing(self, level: str, temporary: str) -> Iterator[None]:
        try:
            yield
        except Exception:
            self.abandon(level, temporary)
            raise

    @contextmanager
    def _reporting(self, level: str, step: int | None, needed: int = 0) -> Iterator[None]:
        """Say what could not be done, where and why."""
        place = self.settings.local_dir if level == LOCAL else self.settings.storage
        try:
            yield
        except (OSError, CheckpointError) as error:
            why = str(error)
            if isinstance(error, OSError) and error.strerror:
                why = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
            if step is None:
                raise CheckpointError(f"{place} cannot be used for checkpoints: {why}") from error
            space = ""
            if needed:
                with contextlib.suppress(OSError):
                    free = self.storage.free_bytes()
                    known = "" if free is None else f"; {readable_bytes(free)} are free"
                    space = f" It needs {readable_bytes(needed)}{known}."
            raise CheckpointError(
                f"checkpoint of step {step} was not saved in {place}: {why}.{space} Older checkpoints are intact and "
                "training goes on. Free space there, or keep fewer with checkpoint.keep"
            ) from error
