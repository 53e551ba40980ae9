"""Write and read the metrics of a run: rows of numbers, one for each logged step.

Each attempt writes its own series (`parts.py`), whose positions are steps. A superseded attempt that still runs merges
only its own parts: readers cut each series at the step where the next attempt took over, whatever its parts are.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from genmodels.errors import KeyNotFound
from genmodels.runs.parts import Part, PartWriter, list_parts, merged
from genmodels.runs.records import ChainLink
from genmodels.runs.store import Run
from genmodels.storage import decode_floats, encode_floats
from genmodels.storage.documents import read_lines


@dataclass(frozen=True)
class MetricPart:
    """A part of an attempt of the chain."""

    link: ChainLink
    part: Part


class MetricWriter:
    """Write the metrics of one attempt. Not thread-safe.

    Args:
        start: step that the attempt continues from.
    """

    def __init__(self, run: Run, attempt: int, start: int = 0) -> None:
        self._parts = PartWriter(run.storage, _folder(run, attempt), start)
        self._tried = 0  # rows of the part that is being stored

    def write(self, rows: list[dict[str, Any]]) -> int:
        """Store the first rows; return how many. Each has a `step`; non-finite numbers are stored as text.

        Raises:
            StorageUnavailable: call again with the same rows; later ones may follow.
        """
        count = self._tried = self._tried or len(rows)
        if count:
            data = "".join(json.dumps(encode_floats(row)) + "\n" for row in rows[:count]).encode()
            self._parts.write(rows[count - 1]["step"], data)
            self._tried = 0
        return count

    def merge(self) -> None:
        """Merge stored parts. After StorageUnavailable, the next call does the rest."""
        self._parts.merge()


def metric_rows(run: Run) -> Iterator[dict[str, Any]]:
    """Yield the rows of the whole chain; each attempt's rows end at the step where the next attempt began."""
    for _, row in _read(run, -1):
        yield decode_floats(row)


def metric_lines(run: Run, after: int = 0) -> Iterator[bytes]:
    """Yield the same rows as they are stored, each a JSON object.

    Args:
        after: only rows of later steps.
    """
    for line, _ in _read(run, after):
        yield line


def metric_parts(run: Run, after: int = -1, chain: list[ChainLink] | None = None) -> Iterator[MetricPart]:
    """Yield the parts of the chain that can have rows of steps above `after`, in order.

    Args:
        chain: of the run, if the caller has read it.
    """
    for link in run.chain() if chain is None else chain:
        if link.goes_beyond(after):
            folder = _folder(run, link.attempt)
            start = link.parent.step if link.parent else 0
            for part in list_parts(run.storage, folder, start).get(folder, []):
                if part.last > after and link.holds(part.after + 1):
                    yield MetricPart(link, part)


def read_part(run: Run, part: MetricPart, after: int = -1) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the rows of a part that are of the chain and of steps above `after`, each as stored and parsed.

    Raises:
        KeyNotFound: a longer part has these rows now (`parts_again`), or the run was deleted. No row was yielded, since
            a part that is read with more than one request is never merged.
    """
    for line, row in read_lines(run.storage, part.part.key, "metrics", {"step": int}):
        if row["step"] > after and part.link.holds(row["step"]):
            yield line, row


def parts_again(run: Run, gone: MetricPart) -> list[MetricPart]:
    """Return the parts from one on that was merged just now. Raises KeyNotFound if no longer part has its rows."""
    parts = list(metric_parts(run, gone.part.after))
    merged(gone.part, [part.part for part in parts])
    return parts


def training_seconds(run: Run) -> float:
    """Return the seconds that steps and evaluations took in the chain; steps that were trained again count once.

    The seconds of an attempt only grow, so its last part is enough.
    """
    seconds: dict[int, float] = {}  # by attempt
    for part in reversed(list(metric_parts(run))):
        if part.link.attempt not in seconds:
            last = _last_seconds(run, part)
            seconds |= {} if last is None else {part.link.attempt: last}
    return sum(seconds.values())


def _last_seconds(run: Run, part: MetricPart) -> float | None:
    try:
        times = [row.get("seconds") for _, row in read_part(run, part)]
    except KeyNotFound:
        return _last_seconds(run, parts_again(run, part)[0])
    return max((time for time in times if isinstance(time, (int, float))), default=None)


def _read(run: Run, after: int) -> Iterator[tuple[bytes, dict[str, Any]]]:
    unread = deque(metric_parts(run, after))
    while unread:
        try:
            yield from read_part(run, unread[0], after)
        except KeyNotFound:
            after = max(after, unread[0].part.after)
            unread = deque(parts_again(run, unread[0]))
        else:
            unread.popleft()


def _folder(run: Run, attempt: int) -> str:
    return f"{run.prefix}/attempt-{attempt}/metrics/"
