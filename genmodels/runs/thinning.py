"""Thin long series in little memory: keep some items, evenly spaced."""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeVar

from genmodels.errors import KeyNotFound
from genmodels.runs.metric_rows import MetricPart, metric_parts, parts_again, read_part
from genmodels.runs.parts import Part
from genmodels.runs.records import ChainLink
from genmodels.runs.store import Run
from genmodels.storage import decode_floats

T = TypeVar("T")

EVALUATION = b'"val_'  # in a row of metrics that comes from an evaluation
SLICE_SECONDS = 0.5  # that one call reads
CACHE_BYTES = 16 * 2**20  # of the rows that are remembered
ENTRY_BYTES, LINE_BYTES = 4096, 150  # memory of an entry, and of a line in addition to its bytes


def thinned(items: Sequence[T], most: int) -> list[T]:
    """Return at most `most` items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]


def thinned_rows(lines: Iterable[bytes], most: int) -> list[bytes]:
    """Return at most `most` (10 or more) lines of metrics in their order; about four times as many are in memory."""
    rows = _Rows(most)
    for line in lines:
        rows.add(line)
    return rows.lines()


def decoded(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """Return the rows that lines of metrics stand for."""
    return [decode_floats(json.loads(line)) for line in lines]


class ThinnedHistories:
    """The thinned metrics of runs, as far as they were read: a later read begins there. Thread-safe.

    Readers of the same history take turns, and each goes on where the others are.
    """

    def __init__(self, most_bytes: int = CACHE_BYTES) -> None:
        self._most_bytes = most_bytes
        self._histories: OrderedDict[tuple[str, int, int], _History] = OrderedDict()
        self._lock = threading.Lock()

    def reader(self, run: Run, most: int, after: int = 0) -> Callable[[], list[bytes] | None]:
        """Return a function that reads at most `most` (10 or more) rows of a run, as stored, in their order.

        The function returns None after SLICE_SECONDS: it has to be called again. So a long history does not block a
        thread that others wait for, and is not read on if the client has disconnected.

        Args:
            after: only rows of later steps.
        """
        name = run.prefix, most, after
        with self._lock:
            history = self._histories.setdefault(name, _History(run, most, after))
            self._histories.move_to_end(name)
        calls = count()

        def read() -> list[bytes] | None:
            lines = history.read(refresh=next(calls) == 0)
            with self._lock:
                while sum(history.bytes for history in self._histories.values()) > self._most_bytes:
                    self._histories.popitem(last=False)
            return lines

        return read


@dataclass
class _Done:
    """What was read of a run: rows, up to which step, of which attempts; and the part that was read last."""

    rows: _Rows
    last: int
    chain: list[ChainLink] = field(default_factory=list)
    newest: Part | None = None


class _History:
    """The rows of a run that were read, and the parts that are still to be read."""

    def __init__(self, run: Run, most: int, after: int) -> None:
        self.bytes = ENTRY_BYTES
        self._run, self._most, self._after = run, most, after
        self._lock = threading.Lock()
        self._done = _Done(_Rows(most), after)
        self._unread: deque[MetricPart] | None = None  # None: not known

    def read(self, refresh: bool) -> list[bytes] | None:
        """Read for SLICE_SECONDS; return None if there is more to read.

        Args:
            refresh: look for new parts.
        """
        with self._lock:
            if refresh or self._unread is None:
                self._unread = self._find_unread()
            until = time.monotonic() + SLICE_SECONDS
            while self._unread:
                part = self._unread[0]
                try:
                    self._add(part)
                except KeyNotFound:
                    self._unread = deque(parts_again(self._run, part))
                    continue
                self._done.newest = self._unread.popleft().part
                if self._unread and time.monotonic() > until:
                    return None
            return self._done.rows.lines()

    def _find_unread(self) -> deque[MetricPart]:
        chain = self._run.chain()
        if not self._continues(chain):  # a new attempt cuts what was read
            self._done = _Done(_Rows(self._most), self._after)
        self._done.chain = chain
        parts = deque(metric_parts(self._run, self._done.last, chain))
        if parts and parts[0].part == self._done.newest:  # the last part of an earlier release: its end is not known
            parts.popleft()
        return parts

    def _continues(self, chain: list[ChainLink]) -> bool:
        """Return whether all rows that were read belong to this chain."""
        before, last = self._done.chain, self._done.last
        return len(chain) >= len(before) and all(
            old.attempt == new.attempt and (old.until == new.until or new.holds(last))
            for old, new in zip(before, chain, strict=False)
        )

    def _add(self, part: MetricPart) -> None:
        for line, row in read_part(self._run, part, self._done.last):
            self._done.rows.add(line)
            self._done.last = row["step"]
        self.bytes = ENTRY_BYTES + self._done.rows.bytes()


class _Rows:
    """Keep at most `most` rows of a stream; about four times as many are in memory.

    Rows of evaluations are rare, so they are kept before rows of training.
    """

    def __init__(self, most: int) -> None:
        self._most, self._count = most, 0
        self._evaluations, self._others = _Spread(most), _Spread(most)

    def add(self, line: bytes) -> None:
        (self._evaluations if EVALUATION in line else self._others).add((self._count, line))
        self._count += 1

    def lines(self) -> list[bytes]:
        rows, most = self._others.items(), self._most
        kept = thinned(self._evaluations.items(), max(most // 2, most - len(rows)))
        return [line for _, line in sorted([*kept, *thinned(rows, most - len(kept))])]

    def bytes(self) -> int:
        return self._evaluations.bytes + self._others.bytes


class _Spread:
    """Keep each n-th item of a stream of unknown length; n doubles when more than twice `most` items are kept."""

    def __init__(self, most: int) -> None:
        self._most, self._every, self._seen = most, 1, 0
        self._kept: list[tuple[int, bytes]] = []
        self._last: tuple[int, bytes] | None = None
        self.bytes = 0

    def add(self, item: tuple[int, bytes]) -> None:
        self._last = item
        if self._seen % self._every == 0:
            self._kept.append(item)
            self.bytes += LINE_BYTES + len(item[1])
        self._seen += 1
        if len(self._kept) > 2 * self._most:
            self._kept = self._kept[::2]
            self.bytes = sum(LINE_BYTES + len(line) for _, line in self._kept)
            self._every *= 2

    def items(self) -> list[tuple[int, bytes]]:
        """Return evenly spaced items, with the first and the last."""
        return self._kept if self._last is None or self._kept[-1] == self._last else [*self._kept, self._last]
