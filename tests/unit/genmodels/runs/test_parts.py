"""Test the merging of parts: how many objects remain, and that no row is lost or doubled whatever happens meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from genmodels.checkpoint import CheckpointRef
from genmodels.errors import KeyNotFound, StorageUnavailable
from genmodels.runs import parts
from genmodels.runs.log_lines import Cursor, log_lines
from genmodels.runs.logs import Spool
from genmodels.runs.metric_rows import MetricWriter, metric_lines, metric_rows, training_seconds
from genmodels.runs.store import Run
from genmodels.runs.thinning import ThinnedHistories
from genmodels.storage import Storage
from tests.support.counting_storage import CountingStorage
from tests.support.run_parts import write_log
from tests.support.storages import MemoryStorage, Wrapped


class Killed(BaseException):
    """The end of the writing process."""


class Mortal(Wrapped):
    """Raise `error` instead of the change number `at` (from 1 on), or after it if `late`."""

    def __init__(self, at: int = 0, late: bool = False, error: type[BaseException] = Killed) -> None:
        super().__init__()
        self.at, self.late, self.error, self.changes = at, late, error, 0

    def before(self, verb: str, key: str) -> None:
        if verb in ("put", "delete"):
            self.changes += 1
            if self.changes == self.at and not self.late:
                raise self.error(key)

    def after(self, verb: str, key: str) -> None:
        if verb in ("put", "delete") and self.changes == self.at and self.late:
            raise self.error(key)


def started(storage: Storage) -> Run:
    run = Run(storage, "job", "m")
    run.start_attempt(1, None, 1)
    return run


def row(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1.0, "seconds": step / 10}


def write(writer: MetricWriter, steps: range) -> None:
    """Write and merge after each row, as the recorder does."""
    for step in steps:
        writer.write([row(step)])
        writer.merge()


def steps(run: Run) -> list[int]:
    return [row["step"] for row in metric_rows(run)]


def keys(storage: Storage, kind: str = "metrics") -> list[str]:
    return [key for key in storage.list("runs/") if f"/{kind}/" in key]


# ---- what a long series costs


@pytest.mark.parametrize(("writes", "most"), [(200, 12), (2000, 12), (17_280, 30)])
def test_the_objects_of_a_long_run_are_few_and_each_is_read_once(writes: int, most: int) -> None:
    """A day has 17,280 writes at one each 5 s."""
    storage = CountingStorage()
    run = started(storage)
    writer = MetricWriter(run, 1)
    storage.forget()
    write(writer, range(1, writes + 1))
    changes = sum(storage.counts.values())
    assert changes <= writes * (1 + 0.12 + 1.12), "a put, a tenth of a longer put, and a deletion"
    assert len(keys(storage)) <= most
    storage.forget()
    assert steps(run) == list(range(1, writes + 1))
    assert storage.counts["get_range runs"] <= most + 1, "one for each part, and whether the attempt has started"
    storage.forget()
    assert training_seconds(run) == writes / 10
    assert sum(storage.counts.values()) <= 6


def test_a_part_that_needs_two_requests_is_never_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a reader that has begun a part can always finish it, and its writer holds few bytes."""
    monkeypatch.setattr(parts, "MAX_MERGED_BYTES", 2000)
    storage = MemoryStorage()
    run = started(storage)
    writer = MetricWriter(run, 1)
    for step in range(1, 1001):
        write(writer, range(step, step + 1))
        assert sum(len(part.data) for part in writer._parts._open) < 10 * 2000
    sizes = [len(storage.objects[key]) for key in keys(storage)]
    assert max(sizes) < 10 * 2000
    assert len(sizes) < 2 * sum(sizes) / 2000 + 20
    assert steps(run) == list(range(1, 1001))


# ---- the end of the writer at any point


def changes_of(work: Callable[[Storage], None]) -> int:
    storage = Mortal()
    work(storage)
    return storage.changes


def write_121(storage: Storage) -> None:
    write(MetricWriter(Run(storage, "job", "m"), 1), range(1, 122))


@pytest.mark.parametrize("late", [False, True])
def test_a_kill_at_any_point_loses_no_row_and_doubles_none(late: bool) -> None:
    """A part is merged into the next level and the level after it; the next attempt goes on from step 121."""
    for at in range(1, changes_of(write_121) + 1):
        storage = Mortal()
        run = started(storage)
        storage.changes, storage.at, storage.late = 0, at, late
        writer, done = MetricWriter(run, 1), 0
        try:
            for step in range(1, 122):
                writer.write([row(step)])
                done = step
                writer.merge()
        except Killed:
            pass
        saw = steps(run)
        assert saw == list(range(1, max(done, len(saw)) + 1))
        assert len(saw) - done <= (1 if late else 0), "at most the part whose put was the last operation"
        run.start_attempt(2, CheckpointRef(attempt=1, step=done), 1)
        write(MetricWriter(run, 2, done), range(done + 1, 131))
        assert steps(run) == list(range(1, 131))


@pytest.mark.parametrize("late", [False, True])
def test_an_outage_at_any_point_loses_no_row_and_doubles_none(late: bool) -> None:
    """The writer tries again; more rows have come meanwhile."""
    for at in range(1, changes_of(write_121) + 1, 3):
        storage = Mortal(error=StorageUnavailable)
        run = started(storage)
        storage.changes, storage.at, storage.late = 0, at, late
        writer, rows = MetricWriter(run, 1), []
        for step in range(1, 122):
            rows.append(row(step))
            try:
                del rows[: writer.write(rows)]
                writer.merge()
            except StorageUnavailable:
                continue
        assert not rows
        writer.merge()
        assert steps(run) == list(range(1, 122))
        assert len(keys(storage)) <= 14


def test_a_late_put_of_a_merged_part_changes_nothing() -> None:
    """A put whose answer was lost may reach the store long after its part was merged and deleted."""
    storage = MemoryStorage()
    run = started(storage)
    puts: dict[str, bytes] = {}
    put = storage.put
    storage.put = lambda key, data, **options: puts.update({key: data}) or put(key, data, **options)
    write(MetricWriter(run, 1), range(1, 122))
    before = keys(storage)
    for key, data in puts.items():
        storage.objects[key] = data
    assert len(keys(storage)) > len(before)
    assert steps(run) == list(range(1, 122))
    for after in range(122):
        assert len(list(metric_lines(run, after))) == 121 - after


def test_a_superseded_attempt_merges_its_own_parts_only() -> None:
    storage = MemoryStorage()
    run = started(storage)
    old = MetricWriter(run, 1)
    write(old, range(1, 6))
    run.start_attempt(2, CheckpointRef(attempt=1, step=5), 1)
    new = MetricWriter(run, 2, 5)
    write(new, range(6, 9))
    for step in range(6, 200):  # it was paused, and wakes
        old.write([row(step) | {"loss": 9.0}])
        old.merge()
    write(new, range(9, 120))
    rows = list(metric_rows(run))
    assert [row["step"] for row in rows] == list(range(1, 120))
    assert {row["loss"] for row in rows} == {1.0}


# ---- readers while parts are merged


class Overtaken(Wrapped):
    """Let a writer go on before each operation of a reader."""

    def __init__(self) -> None:
        super().__init__()
        self.work: Iterator[None] = iter(())

    def before(self, verb: str, key: str) -> None:
        if verb in ("get", "sizes") and "/metrics/" in key:
            next(self.work, None)


@pytest.mark.parametrize("begin", [1, 7, 9, 10, 55, 99, 100, 109, 1000])
@pytest.mark.parametrize("pace", [1, 3, 11])
def test_a_reader_of_parts_that_are_merged_meanwhile_misses_nothing(begin: int, pace: int) -> None:
    storage = Overtaken()
    run = started(storage.inner)
    writer = MetricWriter(run, 1)
    write(writer, range(1, begin + 1))

    def go_on() -> Iterator[None]:
        for first in range(begin + 1, begin + 60, pace):
            yield write(writer, range(first, first + pace))

    storage.work = go_on()
    reader = Run(storage, "job", "m")
    saw = steps(reader)
    assert saw == list(range(1, len(saw) + 1))
    assert len(saw) >= begin
    history = ThinnedHistories().reader(reader, 10_000)
    for _ in range(5):
        rows = [json.loads(line)["step"] for line in history() or ()]
        assert rows == list(range(1, len(rows) + 1))
        assert len(rows) >= len(saw)
        history = ThinnedHistories().reader(reader, 10_000)


def test_a_follower_reads_each_row_once_while_parts_are_merged() -> None:
    storage = CountingStorage()
    run = started(storage)
    writer, histories, read = MetricWriter(run, 1), ThinnedHistories(), 0
    for step in range(1, 401):
        write(writer, range(step, step + 1))
        rows = histories.reader(run, 10_000)()
        assert [json.loads(line)["step"] for line in rows or ()] == list(range(1, step + 1))
        lines = list(metric_lines(run, step - 1))
        read += len(lines)
        assert json.loads(lines[0])["step"] == step
    assert read == 400
    storage.forget()
    histories.reader(run, 10_000)()
    assert storage.counts["get_range runs"] == 0, "nothing is new"


def test_a_deleted_run_is_an_error_not_a_short_answer() -> None:
    run = started(MemoryStorage())
    write(MetricWriter(run, 1), range(1, 30))
    rows = metric_rows(run)
    next(rows)
    for key in keys(run.storage):
        run.storage.delete(key)
    with pytest.raises(KeyNotFound):
        list(rows)


def test_a_listing_that_a_merge_overlaps_is_repeated() -> None:
    """A store may list what was there at different moments: neither the ten parts nor the longer one."""

    class Torn(Wrapped):
        torn = 0

        def sizes(self, prefix: str) -> dict[str, int]:
            sizes = super().sizes(prefix)
            if self.torn:
                self.torn -= 1
                return {key: size for key, size in sizes.items() if "00000010" not in key}
            return sizes

    storage = Torn()
    run = started(storage)
    write(MetricWriter(run, 1), range(1, 26))
    storage.torn = 1
    assert steps(run) == list(range(1, 26))


# ---- logs


def test_a_long_log_has_few_objects_and_is_followed_line_by_line() -> None:
    storage = CountingStorage()
    run = started(storage)
    spool, cursor = Spool(run, 1, "0"), Cursor()
    for number in range(500):
        spool.add(b"line %d\n" % number)
        assert spool.ship()
        if number % 7 == 0:
            assert [line.line for line in log_lines(run, "0", cursor)][-1] == f"line {number}"
    assert len(keys(storage, "logs")) <= 20
    assert [line.line for line in log_lines(run)] == [f"line {number}" for number in range(500)]
    read = [line.line for line in log_lines(run, None, cursor)]
    assert read == [f"line {number}" for number in range(498, 500)]


def test_a_reader_of_a_log_goes_on_while_its_parts_are_merged() -> None:
    run = started(MemoryStorage())
    spool = Spool(run, 1, "0")

    def print_lines(numbers: range) -> None:
        for number in numbers:
            spool.add(b"line %d\n" % number)
            assert spool.ship()

    print_lines(range(9))
    lines = log_lines(run)
    first = [next(lines).line for _ in range(3)]
    print_lines(range(9, 12))
    assert first + [line.line for line in lines] == [f"line {number}" for number in range(12)]


# ---- parts of an earlier release


def test_parts_of_an_earlier_release_are_read() -> None:
    storage = CountingStorage()
    run = started(storage)
    for first in range(10, 1000, 50):
        rows = "".join(json.dumps(row(step)) + "\n" for step in range(first, first + 50, 10))
        storage.put(f"{run.prefix}/attempt-1/metrics/{first:08d}.jsonl", rows.encode())
    assert steps(run) == list(range(10, 1010, 10))
    storage.forget()
    assert [json.loads(line)["step"] for line in metric_lines(run, 980)] == [990, 1000]
    assert storage.counts["get_range runs"] == 1, "the last part"
    assert training_seconds(run) == 100.0
    histories = ThinnedHistories()
    assert len(histories.reader(run, 1000)() or ()) == 100
    storage.forget()
    assert len(histories.reader(run, 1000)() or ()) == 100
    assert storage.counts["get_range runs"] == 0


def test_a_log_of_an_earlier_release_is_followed() -> None:
    run, cursor = started(MemoryStorage()), Cursor()
    for number in range(1, 13):
        line = json.dumps({"time": f"2026-01-01T00:00:{number:02}.000+00:00", "line": str(number)}) + "\n"
        write_log(run, 1, "driver", number, line.encode() * 2)
        assert [line.line for line in log_lines(run, None, cursor)] == [str(number)] * 2
        assert not list(log_lines(run, None, cursor))
