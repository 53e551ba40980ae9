"""What the job service tells Prometheus: counts alone, no names of jobs or models, so it needs no key.

It has no exporter: what its own process counts is here as well. Where one reads that, it is the exporter's to tell.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from typing import get_args

from prometheus_client import CollectorRegistry, Gauge, Metric, generate_latest

from genmodels.errors import StorageError
from genmodels.metrics import (
    ATTEMPTS,
    DAMAGED,
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
from genmodels.run import State, now
from services.views import RunView, Views

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


class JobMetrics:
    """A Prometheus collector over storage."""

    def __init__(self, views: Views) -> None:
        self._views, self._lock = views, threading.Lock()
        self._read: tuple[float, list[RunView]] | None = None
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
        with self._lock:
            answers = self._refresh()
            runs = self._read[1] if self._read else []
        yield _told(STORAGE_UP, {"": answers})
        if not answers:
            return
        states = Counter(run.state for run in runs)
        waiting = [run for run in runs if run.position is not None]
        yield _told(OPEN_RUNS, {state: states[state] for state in (*get_args(State), "damaged")})
        yield _told(QUEUE_LENGTH, {"": len(waiting)})
        yield _told(QUEUE_OLDEST, {"": max(map(_age, waiting), default=0.0)})

    def _refresh(self) -> bool:
        """Whether what is known is no older than BELIEVED_SECONDS."""
        if self._read and time.monotonic() - self._read[0] < BELIEVED_SECONDS:
            return True
        try:
            self._read = time.monotonic(), self._views.open_runs()
        except StorageError:
            return False
        return True


def _told(gauge: Gauge, values: dict[str, float]) -> Metric:
    """A metric as it is named, with values by state; "" where it has no label."""
    (metric,) = gauge.describe()
    for state, value in values.items():
        metric.add_sample(metric.name, {"state": state} if state else {}, value)
    return metric


def _age(run: RunView) -> float:
    """Seconds since a run was queued."""
    queued = [change.time for change in run.history if change.state == "queued"]
    since = datetime.fromisoformat(now()) - datetime.fromisoformat(queued[-1]) if queued else None
    return max(0.0, since.total_seconds()) if since else 0.0
