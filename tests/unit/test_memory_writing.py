"""A node's part in making a step durable: a leader that asks is answered at the end, not a while after it."""

import threading
import time
from contextlib import contextmanager, nullcontext

import pytest

from tests.waiting import until
from windlass.checkpoint.memory import writing as writing_module
from windlass.checkpoint.memory.membership import Member, Membership
from windlass.checkpoint.memory.writing import LOCAL, STORAGE, Writing
from windlass.dist.errors import CheckpointError


class NoSlots:
    """Holds nothing: the node has no rank to write."""

    def pinned(self, generation, step):
        return nullcontext()

    def held(self, role):
        return []


class Gated:
    """A persister that writes until it is told to go on."""

    def __init__(self):
        self.go, self.error, self.abandoned = threading.Event(), None, []

    def begin(self, level, step, generation, membership):
        return "local-folder"

    def prepare(self, *args):
        assert self.go.wait(30)
        if self.error is not None:
            raise self.error
        return {"num_bytes": 7}

    def abandon(self, level, temporary):
        self.abandoned.append((level, temporary))


@pytest.fixture
def persister():
    gated = Gated()
    yield gated
    gated.go.set()


@pytest.fixture
def writing(persister):
    member = Member(0, "node-0", "node-0", "", 0, "", 8)
    membership = Membership("a" * 16, 1, 1, "none", 1, ((0,),), (member,), local_parity=False, chunk_bytes=256)
    return Writing(membership, "node-1", NoSlots(), persister, lambda line: None)


@pytest.fixture(autouse=True)
def no_members_here(monkeypatch):
    monkeypatch.setattr(Membership, "by_node", {"node-1": ()})


def until_done(writing, level, step):
    while not (found := writing.poll(level, step))[0]["done"]:
        pass
    return found


def test_a_question_is_answered_as_soon_as_the_step_is_written(writing, persister, monkeypatch):
    monkeypatch.setattr(writing_module, "ANSWER_S", 60.0)
    writing.start(STORAGE, 1, "t")
    threading.Timer(0.1, persister.go.set).start()
    asked = time.monotonic()
    assert writing.poll(STORAGE, 1) == (
        {"known": True, "done": True, "moved": 0, "problem": ""},
        b'{"num_bytes": 7}',
    )
    assert time.monotonic() - asked < 30


def test_a_question_is_answered_in_time_while_the_step_is_written(writing):
    writing.start(STORAGE, 1, "t")
    assert writing.poll(STORAGE, 1) == ({"known": True, "done": False, "moved": 0, "problem": ""}, None)
    assert writing.poll(STORAGE, 2) == ({"known": False}, None)


def test_a_step_that_is_still_written_cannot_be_begun_again_committed_or_forgotten(writing, persister):
    writing.start(LOCAL, 1, "t")
    assert writing.start(LOCAL, 1, "t") == {}  # the same attempt, asked twice
    with pytest.raises(CheckpointError, match="still writing step 1"):
        writing.start(LOCAL, 1, "another")
    with pytest.raises(CheckpointError, match="has not written step 1"):
        writing.commit_local(1)
    assert writing.commit_local(2) == {"known": False}
    writing.forget(LOCAL, 1)
    assert writing.poll(LOCAL, 1)[0]["known"]
    persister.go.set()
    until_done(writing, LOCAL, 1)
    writing.forget(LOCAL, 1)
    assert not writing.poll(LOCAL, 1)[0]["known"] and persister.abandoned == [(LOCAL, "local-folder")]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device", "/full"), RuntimeError("a surprise")])
def test_a_problem_is_told_with_the_node(writing, persister, error):
    persister.error = error
    writing.start(STORAGE, 1, "t")
    persister.go.set()
    answer, _ = until_done(writing, STORAGE, 1)
    assert "node-1" in answer["problem"] and str(error) in answer["problem"]
    writing.start(STORAGE, 1, "again")  # another attempt may follow


@pytest.mark.parametrize(
    ("level", "temporary"),
    [(LOCAL, "/home"), (STORAGE, "../c"), (STORAGE, ".."), (STORAGE, "a/b"), (STORAGE, ""), ("tape", "t")],
)
def test_what_is_no_folder_in_a_level_is_refused(writing, persister, level, temporary):
    with pytest.raises(CheckpointError, match="nothing is written to level"):
        writing.start(level, 1, temporary)
    assert writing.forget(level, 1) == {} and persister.abandoned == []


def test_only_a_folder_that_this_node_has_made_is_removed(writing, persister, monkeypatch):
    def no_room(*args):
        raise CheckpointError("no room")

    monkeypatch.setattr(persister, "begin", no_room)
    writing.start(LOCAL, 1, "attempt-1")
    assert "no room" in until_done(writing, LOCAL, 1)[0]["problem"]
    writing.forget(LOCAL, 1)
    assert persister.abandoned == []


class Pins(NoSlots):
    """Remembers which steps are kept."""

    def __init__(self):
        self.kept = set()

    @contextmanager
    def pinned(self, generation, step):
        self.kept.add(step)
        yield
        self.kept.discard(step)


class Going(Gated):
    """A persister that says how far it has come, and waits between its parts."""

    def prepare(self, *args):
        come_further = args[-1]
        come_further()
        super().prepare()
        come_further()
        return {"num_bytes": 7}


def another_attempt(writing):
    """Ask for a step again, as the successor of a leader that was killed does: it knows of no attempt."""
    with pytest.raises(CheckpointError, match="still writing step 1, for an attempt that is given up"):
        writing.start(STORAGE, 1, "another")


@pytest.mark.parametrize("give_up", [lambda writing: writing.forget(STORAGE, 1), Writing.stop, another_attempt])
def test_a_step_that_was_given_up_keeps_no_slot_and_stops_with_its_next_part(writing, give_up):
    slots, persister = Pins(), Going()
    writing = Writing(writing.membership, "node-1", slots, persister, lambda line: None)
    writing.start(STORAGE, 1, "t")
    until(lambda: writing.poll(STORAGE, 1)[0]["moved"] == 1)
    assert slots.kept == {1}
    give_up(writing)
    assert slots.kept == set()
    persister.go.set()
    assert "step 1 was given up" in until_done(writing, STORAGE, 1)[0]["problem"]


def test_another_step_of_a_level_is_not_begun_while_one_that_was_given_up_is_written(writing, persister):
    writing.start(STORAGE, 1, "t")
    writing.start(LOCAL, 1, "t")  # another level does not mind
    writing.forget(STORAGE, 1)
    with pytest.raises(CheckpointError, match="node-1 is still writing step 1, for an attempt that is given up"):
        writing.start(STORAGE, 2, "another")
    persister.go.set()
    until_done(writing, STORAGE, 1)
    assert writing.start(STORAGE, 2, "another") == {}
    assert not writing.poll(STORAGE, 1)[0]["known"]
    until_done(writing, STORAGE, 2)


def test_a_drive_that_hangs_while_a_step_is_made_to_count_holds_up_no_other_level(writing, persister, monkeypatch):
    there, hangs = threading.Event(), threading.Event()

    def commit(*args):
        there.set()
        assert hangs.wait(30)
        return "place"

    monkeypatch.setattr(persister, "commit", commit, raising=False)
    persister.go.set()
    writing.start(LOCAL, 1, "t")
    until_done(writing, LOCAL, 1)
    committing = threading.Thread(target=writing.commit_local, args=(1,))
    committing.start()
    assert there.wait(30)
    writing.start(STORAGE, 1, "t")
    until_done(writing, STORAGE, 1)
    hangs.set()
    committing.join(30)
    writing.forget(LOCAL, 1)
    assert persister.abandoned == [], "what counts is not removed"
