"""What a snapshot process can be asked, verb by verb. Every answer is JSON fields and bytes; nothing is unpickled.

Requests of an older generation than the node's never get here, except the verbs in OPEN.
Must not know: sockets, threads.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from windlass.checkpoint.memory.base import Base
from windlass.checkpoint.memory.fencing import fence
from windlass.checkpoint.memory.header import SlotHeader, State
from windlass.checkpoint.memory.membership import Membership
from windlass.checkpoint.memory.segment import Slot
from windlass.checkpoint.memory.settings import Settings
from windlass.checkpoint.memory.votes import NOTHING, Decree, Report
from windlass.checkpoint.memory.writing import Writing
from windlass.dist.errors import CheckpointError

if TYPE_CHECKING:
    from windlass.checkpoint.memory.service import Service

Fields = dict[str, Any]
Answer = tuple[Fields, Any]
OPEN = frozenset({"hello", "status", "fence", "adopt", "stop"})  # they say themselves which generation they speak for
LONGEST_WAIT_S = 30.0
LOOK_S = 0.002
HOP_S = 3.0  # for the refusal of a leader: sooner than whoever asked gives up (client.ANSWER_S)


class Verbs:
    """The handlers of one snapshot process."""

    def __init__(self, process: Service) -> None:
        self.process = process
        self.folder, self.slots = process.folder, process.slots
        self._by_name: dict[str, Callable[[Fields, memoryview], Answer]] = {
            name.removeprefix("do_"): getattr(self, name) for name in dir(self) if name.startswith("do_")
        }

    def handle(self, verb: str, fields: Fields, payload: memoryview) -> Answer:
        """Answer a request.

        Raises: CheckpointError for verbs that do not exist, fields that are missing or of another kind, and refusals
        """
        handler = self._by_name.get(verb)
        if handler is None:
            raise CheckpointError(f"there is no verb {verb!r}; there are {', '.join(sorted(self._by_name))}")
        try:
            return handler(fields, payload)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"'{verb}': a field is missing or malformed: {type(error).__name__}: {error}"
            ) from error

    # -- who and how -------------------------------------------------------------------------------------------------

    def do_hello(self, fields: Fields, payload: memoryview) -> Answer:
        served = self.process.served
        here = {"job": self.folder.job, "node": self.folder.node, "generation": self.folder.read_generation()}
        return {**here, **vars(served)}, None

    def do_status(self, fields: Fields, payload: memoryview) -> Answer:
        return self.process.status(), None

    # -- reading what is held ----------------------------------------------------------------------------------------

    def do_inventory(self, fields: Fields, payload: memoryview) -> Answer:
        self.slots.refresh()
        held = [_described(header, "ram") for _, header in self.slots.held()]
        held += [
            _described(found, "local") if isinstance(found, SlotHeader) else found
            for found in self.process.look_at_drive().inventory()
        ]
        memberships = sorted({*self.folder.memberships(), *self.process.drive.memberships()})
        return {"node": self.folder.node, "generation": self.folder.read_generation(), "held": held} | {
            "memberships": memberships
        }, None

    def _slot(self, fields: Fields) -> tuple[Slot, SlotHeader] | None:
        where = self.process.drive if fields.get("tier", "ram") == "local" else self.slots
        return where.find(str(fields["role"]), int(fields["rank"]), int(fields["step"]), int(fields["slot_generation"]))

    def do_header(self, fields: Fields, payload: memoryview) -> Answer:
        end = time.monotonic() + min(float(fields.get("wait_s", 0.0)), LONGEST_WAIT_S)
        while True:
            found = self._slot(fields)
            if found is not None and found[1].state >= State.FILLED:
                values, tables = found[1].dump()
                return {"header": values}, tables
            if found is None and self._gone(fields):
                return {"gone": True}, None
            if time.monotonic() >= end:
                return ({} if found is None else {"state": int(found[1].state)}), None
            threading.Event().wait(LOOK_S)

    def _gone(self, fields: Fields) -> bool:
        """Whether a rank has surely passed a step of which it holds nothing."""
        duty = self.process.duty
        if duty is None or duty.term.generation != int(fields["slot_generation"]):
            return True
        report = duty.report()
        steps, rank = report.held.get(int(fields["rank"]), {}), int(fields["rank"])
        passed = max([NOTHING, report.passed.get(rank, NOTHING), *steps])
        return int(fields["step"]) not in steps and passed >= int(fields["step"])

    def do_read(self, fields: Fields, payload: memoryview) -> Answer:
        found = self._slot(fields)
        offset, length = int(fields["offset"]), int(fields["length"])
        if found is None:
            raise CheckpointError(
                f"node {self.folder.node} does not hold {fields['role']} of rank {fields['rank']}, step "
                f"{fields['step']} of generation {fields['slot_generation']}"
            )
        if offset < 0 or length < 0 or offset + length > found[1].num_bytes:
            raise CheckpointError(f"bytes {offset} to {offset + length} of {found[1].num_bytes} were asked for")
        return {}, found[0].data[offset : offset + length].data

    def do_layout(self, fields: Fields, payload: memoryview) -> Answer:
        digest, layout = str(fields["digest"]), None
        path = self.folder.layout_path(digest)
        with contextlib.suppress(CheckpointError):  # damaged: on the drive it may be whole
            layout = self.folder.read_layout(digest)
        layout = layout or self.process.drive.read_layout(digest)
        if layout is None:
            how = "only damaged" if path.exists() else "not"
            raise CheckpointError(f"node {self.folder.node} has the layout {digest} {how}")
        return {}, layout.dump()

    def do_membership(self, fields: Fields, payload: memoryview) -> Answer:
        generation = int(fields["of"])
        path = self.folder.membership_path(generation)
        text = path.read_bytes() if path.exists() else self.process.drive.read_membership(generation)
        if text is None:
            raise CheckpointError(f"node {self.folder.node} does not have the membership of generation {generation}")
        return {}, text

    # -- generations -------------------------------------------------------------------------------------------------

    def do_adopt(self, fields: Fields, payload: memoryview) -> Answer:
        membership = Membership.parse(bytes(payload), "adopt")
        restored, anchor = (
            None if at is None else (int(at[0]), int(at[1])) for at in (fields.get("restored"), fields.get("anchor"))
        )
        self.process.adopt(membership, Settings.parse(fields["settings"]), restored, anchor, Base.parse(fields["base"]))
        return {}, None

    def do_fence(self, fields: Fields, payload: memoryview) -> Answer:
        killed = fence(self.folder, int(fields["generation"]))
        self.process.seen()
        return {"killed": killed}, None

    def do_stop(self, fields: Fields, payload: memoryview) -> Answer:
        if int(fields["generation"]) < self.folder.read_generation():
            raise CheckpointError(f"generation {fields['generation']} is over: it cannot stop this process")
        self.process.stop(remove=bool(fields["remove"]))
        return {}, None

    # -- votes -------------------------------------------------------------------------------------------------------

    def do_vote(self, fields: Fields, payload: memoryview) -> Answer:
        report = Report.parse(fields["report"])
        return {"decree": self.process.on_duty(report.generation).term.hear(report).dump()}, None

    def do_decree(self, fields: Fields, payload: memoryview) -> Answer:
        duty = self.process.on_duty()
        wait_s = min(float(fields["wait_s"]), LONGEST_WAIT_S)
        decree: Decree = duty.term.wait(int(fields["after"]), wait_s)
        return {"decree": decree.dump()}, None

    def do_moved(self, fields: Fields, payload: memoryview) -> Answer:
        # Of just this generation: what the one before knows is forgotten with it.
        return {}, self.process.on_duty(int(fields["generation"])).peers.exchange_moves(payload)

    def do_stalled(self, fields: Fields, payload: memoryview) -> Answer:
        watchdog = self.process.on_duty().watchdog
        threading.Thread(target=watchdog.hear, name="snapshot-stalled", daemon=True).start()
        return {}, None

    # -- making steps durable ----------------------------------------------------------------------------------------

    def _writing(self, fields: Fields) -> Writing:
        """Return what writes in the generation that is meant: the leader of one before may ask in the next."""
        return self.process.on_duty(int(fields["generation"])).writing

    def do_persist_start(self, fields: Fields, payload: memoryview) -> Answer:
        level, step, temporary = str(fields["level"]), int(fields["step"]), str(fields["temporary"])
        return self._writing(fields).start(level, step, temporary), None

    def do_persist_poll(self, fields: Fields, payload: memoryview) -> Answer:
        return self._writing(fields).poll(str(fields["level"]), int(fields["step"]))

    def do_persist_commit(self, fields: Fields, payload: memoryview) -> Answer:
        return self._writing(fields).commit_local(int(fields["step"])), None

    def do_persist_forget(self, fields: Fields, payload: memoryview) -> Answer:
        return self._writing(fields).forget(str(fields["level"]), int(fields["step"])), None

    def do_hurry(self, fields: Fields, payload: memoryview) -> Answer:
        self.process.on_duty().writing.persister.hurry()
        return {}, None

    def do_flush(self, fields: Fields, payload: memoryview) -> Answer:
        """Have the leader make a step durable, whichever node is asked."""
        duty = self.process.on_duty()
        deadline_s, at_least = float(fields["deadline_s"]), int(fields.get("at_least", NOTHING))
        self.process.seen()
        if duty.persisting is not None:
            return asdict(duty.persisting.flush(deadline_s, at_least)), None
        end = time.monotonic() + deadline_s
        while True:  # the leader may be in the middle of being replaced
            left = max(end - time.monotonic(), 0.1)
            try:
                asked = {**fields, "deadline_s": left}
                return duty.peers.ask(duty.term.leader, "flush", asked, timeout_s=left + HOP_S)[0], None
            except CheckpointError:
                if time.monotonic() + 1.0 >= end or duty.term.leader not in duty.peers.silent():
                    raise
                threading.Event().wait(0.2)


def _described(header: SlotHeader, tier: str) -> Fields:
    names = ("rank", "role", "step", "generation", "layout", "num_bytes", "chunk_bytes", "world_size")
    ok = header.state >= State.FILLED
    found = {name: getattr(header, name) for name in names} | {"tier": tier, "state": int(header.state), "ok": ok}
    return found if ok else found | {"why": f"only {header.state.name}: its snapshot was not finished"}
