"""Test what a history costs to read: operations, memory, and what a later reader need not read again."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from genmodels.checkpoint import CheckpointRef
from genmodels.errors import StorageUnavailable
from genmodels.runs import thinning
from genmodels.runs.metric_rows import metric_lines, metric_rows, training_seconds
from genmodels.runs.store import Run
from genmodels.runs.thinning import ThinnedHistories, thinned_rows
from genmodels.storage import documents
from tests.support.run_parts import write_metrics
from tests.support.storages import MemoryStorage, Wrapped

ROWS, PARTS = 100, 30  # rows of a part, parts of a run
CUT = 20 * ROWS  # step at which the second attempt began


class Counted(Wrapped):
    """Note the keys of metrics that were read or listed; `read` and `listed` begin anew with each `clear`."""

    def __init__(self) -> None:
        super().__init__()
        self.away_at = ""
        self.clear()

    def clear(self) -> None:
        self.read: list[str] = []
        self.listed: list[str] = []

    def before(self, verb: str, key: str) -> None:
        if "/metrics/" not in key:
            return
        (self.read if verb == "get" else self.listed).append(key.partition("attempt-")[2])
        if self.away_at and self.away_at in key:
            raise StorageUnavailable(key)


def write(run: Run, attempt: int, first: int, count: int = ROWS, **values: float) -> None:
    rows = [{"step": step, "loss": 1.0 * attempt, "seconds": step / 10} for step in range(first, first + count)]
    write_metrics(run, attempt, [row | values for row in rows])


@pytest.fixture
def counted() -> Counted:
    return Counted()


@pytest.fixture
def run(counted: Counted) -> Run:
    """Return a run of two attempts; the first one wrote 10 rows too many."""
    run = Run(counted, "job-00000000", "long")
    run.start_attempt(1, None, 1)
    for first in range(1, CUT, ROWS):
        write(run, 1, first)
    write(run, 1, CUT + 1, 10)
    run.start_attempt(2, CheckpointRef(attempt=1, step=CUT), 1)
    for first in range(CUT + 1, PARTS * ROWS, ROWS):
        write(run, 2, first)
    counted.clear()
    return run


@pytest.mark.parametrize(
    ("after", "read"),
    [
        (PARTS * ROWS - 10, ["2/metrics/00002900-00003000.jsonl"]),
        (PARTS * ROWS - ROWS, ["2/metrics/00002900-00003000.jsonl"]),
        (PARTS * ROWS - ROWS - 1, ["2/metrics/00002800-00002900.jsonl", "2/metrics/00002900-00003000.jsonl"]),
        (PARTS * ROWS, []),
        (10**9, []),
    ],
)
def test_later_rows_cost_their_own_parts(run: Run, counted: Counted, after: int, read: list[str]) -> None:
    """An attempt that ended before is not even listed."""
    rows = [json.loads(line)["step"] for line in metric_lines(run, after)]
    assert rows == list(range(after + 1, PARTS * ROWS + 1))
    assert (counted.read, counted.listed) == (read, ["2/metrics/"])


def test_rows_after_the_end_of_an_attempt_are_not_read(run: Run, counted: Counted) -> None:
    assert len(list(metric_rows(run))) == PARTS * ROWS
    assert len(counted.read) == len(set(counted.read)) == PARTS


def test_seconds_of_training_cost_one_part_of_each_attempt(run: Run, counted: Counted) -> None:
    assert training_seconds(run) == CUT / 10 + PARTS * ROWS / 10
    assert counted.read == ["2/metrics/00002900-00003000.jsonl", "1/metrics/00001900-00002000.jsonl"]


# Reading again


def read(histories: ThinnedHistories, run: Run, most: int = 50, after: int = 0) -> list[bytes]:
    lines = histories.reader(run, most, after)()
    assert lines is not None
    return lines


def from_the_start(run: Run, most: int = 50, after: int = 0) -> list[bytes]:
    return thinned_rows(metric_lines(run, after), most)


def test_a_later_reader_reads_only_new_parts(run: Run, counted: Counted) -> None:
    histories = ThinnedHistories()
    assert read(histories, run) == from_the_start(run)
    counted.clear()
    assert read(histories, Run(run.storage, run.job, run.model)) == from_the_start(
        Run(counted.inner, "job-00000000", "long")
    )
    assert counted.read == []
    write(run, 2, PARTS * ROWS + 1, val_loss=0.5)
    assert read(histories, run)[-1] == from_the_start(Run(counted.inner, "job-00000000", "long"))[-1]
    assert counted.read == ["2/metrics/00003000-00003100.jsonl"]


def a_new_attempt(run: Run) -> None:
    run.start_attempt(3, CheckpointRef(attempt=2, step=2450), 1)
    write(run, 3, 2451, 7)


def a_put_tried_again(run: Run) -> None:
    write(run, 2, PARTS * ROWS - ROWS + 1, 2 * ROWS)


def a_deletion(run: Run) -> None:
    for key in run.storage.list(f"{run.prefix}/"):
        run.storage.delete(key)


@pytest.mark.parametrize("change", [a_new_attempt, a_put_tried_again, a_deletion])
@pytest.mark.parametrize("after", [0, 150])
def test_a_changed_history_is_read_anew(run: Run, change: Callable[[Run], None], after: int) -> None:
    histories = ThinnedHistories()
    before = read(histories, run, after=after)
    change(run)
    rows = read(histories, run, after=after)
    assert rows == from_the_start(run, after=after) != before


def test_a_failed_read_leaves_nothing_behind(run: Run, counted: Counted) -> None:
    histories = ThinnedHistories()
    counted.away_at = "00001400-"
    with pytest.raises(StorageUnavailable):
        read(histories, run)
    counted.away_at = ""
    assert read(histories, run) == from_the_start(run)


def test_readers_take_turns(run: Run, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call reads for a limited time; two readers of one history share its parts."""
    monkeypatch.setattr(thinning, "SLICE_SECONDS", -1.0)
    histories = ThinnedHistories()
    first, second = histories.reader(run, 50), histories.reader(run, 50)
    answers: list[list[bytes] | None] = []
    while len(answers) < 2 * PARTS and not (answers and answers[-1]):
        answers += [first(), second()]
    assert answers[-1] == first() == from_the_start(Run(counted.inner, "job-00000000", "long"))
    assert sum(answer is None for answer in answers) == PARTS - 1
    assert len(counted.read) == PARTS


def test_what_is_remembered_is_bounded(run: Run, counted: Counted) -> None:
    read(histories := ThinnedHistories(), run)
    one = next(iter(histories._histories.values())).bytes
    histories = ThinnedHistories(3 * one)
    for most in range(50, 40, -1):
        read(histories, run, most)
    assert 3 <= len(histories._histories) < 10
    assert sum(history.bytes for history in histories._histories.values()) <= 3 * one
    assert one > 50 * 40
    counted.clear()
    read(histories, run, 41)
    assert counted.read == []
    read(ThinnedHistories(1), run)


# Memory, and the cut of an object into lines


def test_a_long_part_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "CHUNK_BYTES", 2**16)
    run = Run(storage := MemoryStorage(), "j", "m")
    run.start_attempt(1, None, 1)
    write(run, 1, 1, 50_000)
    assert sum(map(len, storage.objects.values())) > 2_000_000
    tracemalloc.start()
    try:
        assert sum(1 for _ in metric_lines(run)) == 50_000
        assert len(read(ThinnedHistories(), run)) == 50
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
@pytest.mark.parametrize("chunk", [*range(33, 45), 64, 90, 10_000])
def test_lines_are_the_same_whatever_the_chunks_are(chunk: int, end: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = MemoryStorage()
    lines = [json.dumps({"step": step, "text": "ö" * (step % 5)}, ensure_ascii=False).encode() for step in range(50)]
    storage.put("k", b"\n".join(lines) + end)
    monkeypatch.setattr(documents, "CHUNK_BYTES", chunk)
    assert [line for line, _ in documents.read_lines(storage, "k", "log", {"step": int})] == lines


def test_a_line_without_an_end_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = MemoryStorage()
    storage.put("k", b'{"step": 1}\n{"step": 2, "x": "' + b"x" * 3_000_000 + b'"}\n{"step": 3}\n')
    monkeypatch.setattr(documents, "CHUNK_BYTES", 2**14)
    tracemalloc.start()
    try:
        assert [row["step"] for _, row in documents.read_lines(storage, "k", "log", {})] == [1, 3]
        assert tracemalloc.get_traced_memory()[1] < 2**17
    finally:
        tracemalloc.stop()


def odd_rows() -> Iterator[tuple[bytes, Any]]:
    """Yield lines, and what they are as rows; None: damaged."""
    for number in (0, -1, 2**63 - 1, -(2**63)):
        yield b'{"a": %d}' % number, {"a": number}
    yield from ((b'{"a": %d}' % number, None) for number in (2**63, -(2**63) - 1, 10**30))
    yield b'{"a": ' + b"9" * 5000 + b"}", None
    for value in (b"NaN", b"Infinity", b"[]", b"{}", b'"\\ud800"', b'"\xff"', b"01", b"1 2", b""):
        yield b'{"a": ' + value + b"}", None
    yield from ((line, None) for line in (b"", b" ", b"7", b"null", b"[" * 9999, b'{"a":' * 9999, b"\0", b'{"a": 1}x'))
    yield b' {"a": "\\u00f6", "b": null, "c": true, "d": 1e3}\t', {"a": "ö", "b": None, "c": True, "d": 1000.0}


@pytest.mark.parametrize(("line", "row"), list(odd_rows()))
def test_odd_rows(line: bytes, row: dict[str, Any] | None) -> None:
    storage = MemoryStorage()
    storage.put("k", line + b"\n")
    assert [parsed for _, parsed in documents.read_lines(storage, "k", "log", {})] == ([] if row is None else [row])
