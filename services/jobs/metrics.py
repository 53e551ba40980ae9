"""The metrics of the job service: only counts, without names of jobs or models, so reading them needs no key.

They include the counters of this process, unless an exporter reads these counters too: else they would count twice.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import datetime
from typing import get_args

from prometheus_client import CollectorRegistry, Gauge, Metric, generate_latest

from genmodels.errors import StorageError
from genmodels.metrics import (
    ATTEMPTS,
    DAMAGED,
    JOB_METRICS_AGE,
    OPEN_RUNS,
    PROMOTED,
    QUEUE_LENGTH,
    QUEUE_OLDEST,
    QUEUE_WAIT_SECONDS,
    RUNS_ENDED,
    STORAGE_ERRORS,
    STORAGE_SECONDS,
    STORAGE_UP,
    THREAD_FAILURES,
    THREAD_PROGRESS,
    exported,
)
from genmodels.runs.records import State, Status
from genmodels.storage.documents import now
from services.jobs.views import Views

COUNTED = (  # by this process
    ATTEMPTS,
    RUNS_ENDED,
    QUEUE_WAIT_SECONDS,
    PROMOTED,
    STORAGE_SECONDS,
    STORAGE_ERRORS,
    DAMAGED,
    THREAD_PROGRESS,
    THREAD_FAILURES,
)
CACHE_TTL_SECONDS = 5.0  # frequent scrapes must not cause many reads of the storage
WAIT_SECONDS = 0.2  # that a scrape waits for storage; then it returns the older values, with their age


@dataclass(frozen=True)
class _Snapshot:
    """The open runs at one time; empty if storage did not answer."""

    began: float  # on this process's monotonic clock
    ended: float
    answered: bool
    states: Counter[str]
    waiting: list[Status]


class JobMetrics:
    """A Prometheus collector over storage. A thread of its own reads storage, so that scrapes do not wait for it."""

    def __init__(self, views: Views) -> None:
        self._views, self._lock = views, threading.Lock()
        self._thread = ThreadPoolExecutor(1, "metrics")
        self._reading: Future[None] | None = None
        self._last: _Snapshot | None = None
        self._registry = CollectorRegistry()
        for metric in COUNTED if not exported() else ():
            self._registry.register(metric)
        self._registry.register(self)

    def text(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Return nothing, so that registering the collector does not read storage."""
        return []

    def collect(self) -> Iterator[Metric]:
        self._refresh()
        last = self._last
        if last is None:
            return
        yield _metric(STORAGE_UP, {"": last.answered})
        if not last.answered:
            return
        yield _metric(OPEN_RUNS, {state: last.states[state] for state in (*get_args(State), "damaged")})
        yield _metric(QUEUE_LENGTH, {"": len(last.waiting)})
        yield _metric(QUEUE_OLDEST, {"": max(map(_age, last.waiting), default=0.0)})
        yield _metric(JOB_METRICS_AGE, {"": time.monotonic() - last.began})

    def _refresh(self) -> None:
        """Read storage again if the snapshot is old. Slow storage is read at most one fifth of the time."""
        with self._lock:
            last, reading = self._last, self._reading
            if reading is None or reading.done():
                if last and time.monotonic() - last.ended < max(CACHE_TTL_SECONDS, 4 * (last.ended - last.began)):
                    return
                reading = self._reading = self._thread.submit(self._read)
        wait([reading], WAIT_SECONDS)

    def _read(self) -> None:
        began, answered = time.monotonic(), True
        runs: list[tuple[str, Status | None]] = []
        queued: set[str] = set()
        try:
            runs = self._views.open_runs()
            queued = {f"{waiting.job}/{waiting.model}" for waiting in self._views.queue().queue}
        except StorageError:
            answered = False
        states = Counter(status.state if status else "damaged" for _, status in runs)
        waiting = [status for name, status in runs if status and status.state == "queued" and name in queued]
        self._last = _Snapshot(began, time.monotonic(), answered, states, waiting)


def _metric(gauge: Gauge, values: dict[str, float]) -> Metric:
    """Return a gauge with values by state; the state "" is for a gauge without labels."""
    (metric,) = gauge.describe()
    for state, value in values.items():
        metric.add_sample(metric.name, {"state": state} if state else {}, value)
    return metric


def _age(status: Status) -> float:
    """Return the seconds since a run was queued."""
    queued = [change.time for change in status.history if change.state == "queued"]
    since = datetime.fromisoformat(now()) - datetime.fromisoformat(queued[-1]) if queued else None
    return max(0.0, since.total_seconds()) if since else 0.0
