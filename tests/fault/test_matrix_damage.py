"""The fault matrix, real processes: bytes that change, and files that are not what they were.

Row 12  a flipped byte in data, parity, a header, a manifest, a persisted shard
        -> test_a_flipped_byte_in_memory_is_repaired_from_parity_or_passed_over, and the tests below
Row 13  a file that is truncated, zeroed, deleted, or replaced by that of an older step
        -> test_a_damaged_file_in_memory_is_rebuilt_from_parity,
           test_a_damaged_checkpoint_is_passed_over_for_the_one_before,
           test_a_damaged_file_of_the_local_level_is_rebuilt_or_passed_over
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fault.memory_runs import Act, Lab, Live, hold, protected
from windlass.checkpoint.store import list_checkpoints, step_name

Damage = Callable[[Path], object]


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def truncated(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def stored(step: int) -> Act:
    return Act(step, lambda live: live.until_at("storage", step))


def test_a_flipped_byte_in_memory_is_repaired_from_parity_or_passed_over(lab: Lab) -> None:
    def nothing_whole(live: Live) -> None:
        live.flip(1, "data", 1, 7)
        live.lose(0)

    def bad_parity(live: Live) -> None:
        live.flip(2, "parity", 0, 9)
        live.lose(1)

    told = lab.run(
        spares=2,
        settings=["checkpoint.every=3"],
        fault=",".join(hold(2 * g + 1, generation=g) for g in range(1, 5)),
        strikes=[
            *(protected(3), "rank=0@step=3"),
            *(protected(5), "rank=0@step=5"),
            *(protected(7), Act(7, lambda live: live.until_at("storage", 6)), "rank=0@step=7"),
            *(protected(9), stored(9), "rank=0@step=9"),
        ],
        between={
            2: lambda live: live.flip(1, "data", 1, 3),
            3: lambda live: live.wipe(0, "data", 0, 5),
            4: nothing_whole,
            5: bad_parity,
        },
    )
    told.check(lab.undisturbed(), lost=1, restarts=4)
    assert told.restored == [(3, "ram"), (5, "ram"), (6, "storage"), (9, "storage")]
    assert "damaged" in (told.run / "log.txt").read_text()


@pytest.mark.soak
def test_a_damaged_file_in_memory_is_rebuilt_from_parity(lab: Lab) -> None:
    older: dict[str, bytes] = {}

    def data_of(folder: Path) -> Path:
        (path,) = folder.glob("data-00001-*.seg")
        return path

    def damage(how: Damage) -> Callable[[Live], None]:
        def do(live: Live) -> None:
            with live.unserved(1) as folder:
                how(data_of(folder))

        return do

    def replaced(path: Path) -> None:
        draft = path.with_name("older")
        draft.write_bytes(older["data"])
        draft.rename(path)

    told = lab.run(
        fault=",".join(hold(2 * g + 1, generation=g) for g in range(1, 5)),
        strikes=[
            *(protected(3), "rank=1@step=3"),
            *(protected(5), "rank=1@step=5"),
            *(protected(7), "rank=1@step=7"),
            Act(7, lambda live: older.update(data=data_of(live.memory(1).path).read_bytes())),
            *(protected(9), "rank=1@step=9"),
        ],
        between={2: damage(Path.unlink), 3: damage(zeroed), 4: damage(truncated), 5: damage(replaced)},
    )
    told.check(lab.undisturbed(), lost=0, restarts=4)
    assert told.restored == [(step, "ram") for step in (3, 5, 7, 9)]


@pytest.mark.soak
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(lab: Lab) -> None:
    """All memory is empty each time, and the newest checkpoint is damaged in another way."""
    expected: list[tuple[int, str]] = []

    def damage(step: int, name: str, how: Damage) -> Callable[[Live], None]:
        def do(live: Live) -> None:
            live.forget()
            how(live.checkpoints / step_name(step) / name)
            whole = [info.step for info in list_checkpoints(live.checkpoints) if info.problem is None]
            expected.append((max(s for s in whole if s != step), "storage"))

        return do

    def of_another_step(path: Path) -> None:
        shutil.copy(path.parents[1] / step_name(expected[-1][0]) / path.name, path)

    shard, steps = "__1_0.distcp", (3, 5, 6, 7, 8)
    hows: list[tuple[str, Damage]] = [(shard, flipped), ("manifest.json", flipped), (shard, truncated)]
    hows += [(shard, Path.unlink), (shard, of_another_step)]
    told = lab.run(
        spares=0,
        pace=("peers", "storage"),
        settings=["checkpoint.every=1", "checkpoint.keep=0"],
        fault=",".join(hold(step, generation=g) for g, step in enumerate(steps, start=1)),
        strikes=[strike for step in steps for strike in (stored(step), f"rank=0@step={step}")],
        between={g: damage(step, *how) for g, step, how in zip(range(2, 7), steps, hows, strict=True)},
    )
    told.check(lab.undisturbed(), lost=2, restarts=5)
    assert told.restored == expected


@pytest.mark.soak
def test_a_damaged_file_of_the_local_level_is_rebuilt_or_passed_over(lab: Lab) -> None:
    def newest(live: Live, node: int) -> Path:
        local = Path(live.loaded.config.checkpoint.local_dir)
        return max((local / live.memory(node).job / f"node-{node}").glob("step-*"))

    def nothing(live: Live) -> None:
        live.forget()

    def one(how: Damage) -> Callable[[Live], None]:
        def do(live: Live) -> None:
            live.forget()
            how(next(newest(live, 1).glob("data-00001*.seg")))

        return do

    def both(live: Live) -> None:
        live.forget()
        for node, role in ((0, "parity"), (1, "data")):
            zeroed(next(newest(live, node).glob(f"{role}-*.seg")))

    steps = (3, 5, 7, 9)
    told = lab.run(
        spares=0,
        pace=("peers", "local"),
        settings=["checkpoint.local_every=1"],
        fault=",".join(hold(step, generation=g) for g, step in enumerate(steps, start=1)),
        strikes=[
            strike
            for step in steps
            for strike in (Act(step, lambda live, step=step: local_at(live, step)), f"rank=0@step={step}")
        ],
        between={2: nothing, 3: one(flipped), 4: one(truncated), 5: both},
    )
    told.check(lab.undisturbed(), lost=2, restarts=4)
    assert told.restored[:3] == [(step, "local") for step in (3, 5, 7)]
    assert told.restored[3][0] < 9 and told.restored[3][1] == "local"


def local_at(live: Live, step: int) -> None:
    for node in (0, 1):
        live.until_at("local", step, node)
