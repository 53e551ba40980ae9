"""Read what the processes of a run printed.

    runs/<job>/<model>/attempt-<n>/logs/<source>/<process>/<parts>      lines of JSON, `{"time", "line"}` each

Each process writes its own series (`parts.py`), whose positions are bytes, because a driver may be started again within
its attempt. An earlier release wrote parts that are numbered, and not in a folder of their process.
"""

from __future__ import annotations

import contextlib
import heapq
import math
import secrets
import time
from collections import deque
from collections.abc import Iterable, Iterator

from genmodels.errors import DamagedObject, KeyNotFound
from genmodels.runs.parts import Part, list_parts, merged
from genmodels.runs.records import LogLine
from genmodels.runs.store import Run
from genmodels.storage.documents import read_lines

Cursor = dict[str, int]  # by folder, the position up to which it was read


def new_log_folder(run: Run, attempt: int, source: str) -> str:
    """Return a folder for the log of this process; later processes get later names."""
    process = f"{round(time.time() * 1000)}-{secrets.token_hex(4)}"
    return f"{run.prefix}/attempt-{attempt}/logs/{source}/{process}/"


def log_lines(run: Run, source: str | None = None, cursor: Cursor | None = None) -> Iterator[LogLine]:
    """Yield what the processes of a run printed, attempt by attempt, by time, up to the start of the next one.

    Attempts outside the chain are included: why a worker group never started is in its driver's log.

    Args:
        source: "driver" or a rank; None: all of them.
        cursor: pass an empty one at first; it then holds what was read. With the same cursor the next call yields
            only later lines: so a caller follows a log.
    """
    cursor = {} if cursor is None else cursor
    taken_over: str | None = None  # time at which the next attempt started
    spans: list[tuple[int, str | None]] = []
    for attempt in reversed(run.attempts()):
        spans.insert(0, (attempt, taken_over))
        with contextlib.suppress(DamagedObject):  # then the lines of two attempts may mix
            start = run.attempt_start(attempt)
            taken_over = start.time if start else taken_over
    for attempt, until in spans:
        logs = f"{run.prefix}/attempt-{attempt}/logs/"
        sources = [source] if source else run.storage.folders(logs)
        streams = [
            _series(run, LogLine(attempt, name, "", ""), folder, parts, cursor)
            for name in sources
            for folder, parts in list_parts(run.storage, f"{logs}{name}/").items()
        ]
        for line in heapq.merge(*streams, key=lambda line: line.time):
            if until is None or line.time < until:
                yield line


def _series(run: Run, of: LogLine, folder: str, parts: Iterable[Part], cursor: Cursor) -> Iterator[LogLine]:
    """Yield the lines of one folder that were not read yet."""
    unread = deque(parts)
    while unread:
        part, read = unread[0], cursor.get(folder, 0)
        end = (
            part.after + 1 if part.last == math.inf else int(part.last)
        )  # infinite: the last one of an earlier release
        if end > read:
            rows = read_lines(run.storage, part.key, "log", {"time": str, "line": str}, start=max(0, read - part.after))
            try:
                for _, row in rows:
                    yield LogLine(of.attempt, of.source, row["time"], row["line"])
            except KeyNotFound:
                unread = deque(merged(part, list_parts(run.storage, folder).get(folder, [])))
                continue
            cursor[folder] = end
        unread.popleft()
