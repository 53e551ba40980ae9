"""What the job service tells Prometheus: counts alone, no names of jobs or models, so it needs no key.

It has no exporter: what its own process counts is here as well. Where one reads that, it is the exporter's to tell.
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
BELIEVED_SECONDS = 5.0  # so that scrapes, and whoever else asks, cost the store little
PATIENCE_SECONDS = 0.2  # that a scrape gives storage; then it tells what was known before, and how old that is


@dataclass(frozen=True)
class _Look:
    """What was seen of the open runs; nothing of them where storage did not answer."""

    began: float  # on this process's monotonic clock
    ended: float
    answered: bool
    states: Counter[str]
    waiting: list[Status]


class JobMetrics:
    """A Prometheus collector over storage. Storage is read beside the scrapes, which do not wait for it."""

    def __init__(self, views: Views) -> None:
        self._views, self._lock = views, threading.Lock()
        self._thread = ThreadPoolExecutor(1, "metrics")
        self._looking: Future[None] | None = None
        self._last: _Look | None = None
        self._registry = CollectorRegistry()
        for metric in COUNTED if not exported() else ():
            self._registry.register(metric)
        self._registry.register(self)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Nothing is read when this is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        self._refresh()
        last = self._last
        if last is None:
            return
        yield _told(STORAGE_UP, {"": last.answered})
        if not last.answered:
            return
        yield _told(OPEN_RUNS, {state: last.states[state] for state in (*get_args(State), "damaged")})
        yield _told(QUEUE_LENGTH, {"": len(last.waiting)})
        yield _told(QUEUE_OLDEST, {"": max(map(_age, last.waiting), default=0.0)})
        yield _told(JOB_METRICS_AGE, {"": time.monotonic() - last.began})

    def _refresh(self) -> None:
        """Have storage read where what is known is old. Slow storage is read for a fifth of the time at most."""
        with self._lock:
            last, looking = self._last, self._looking
            if looking is None or looking.done():
                if last and time.monotonic() - last.ended < max(BELIEVED_SECONDS, 4 * (last.ended - last.began)):
                    return
                looking = self._looking = self._thread.submit(self._look)
        wait([looking], PATIENCE_SECONDS)

    def _look(self) -> None:
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
        self._last = _Look(began, time.monotonic(), answered, states, waiting)


def _told(gauge: Gauge, values: dict[str, float]) -> Metric:
    """A metric as it is named, with values by state; "" where it has no label."""
    (metric,) = gauge.describe()
    for state, value in values.items():
        metric.add_sample(metric.name, {"state": state} if state else {}, value)
    return metric


def _age(status: Status) -> float:
    """Seconds since a run was queued."""
    queued = [change.time for change in status.history if change.state == "queued"]
    since = datetime.fromisoformat(now()) - datetime.fromisoformat(queued[-1]) if queued else None
    return max(0.0, since.total_seconds()) if since else 0.0
