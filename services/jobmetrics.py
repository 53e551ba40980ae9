"""What the job service tells Prometheus: counts alone, no names of jobs or models, so it needs no key."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import get_args

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily

from genmodels.errors import StorageError
from genmodels.metrics import ATTEMPTS
from genmodels.run import State
from services.views import RunView, Views

BELIEVED_SECONDS = 5.0  # so that scrapes, and whoever else asks, cost the store little


class JobMetrics:
    """A Prometheus collector over storage."""

    def __init__(self, views: Views) -> None:
        self._views, self._lock = views, threading.Lock()
        self._read: tuple[float, list[RunView]] | None = None
        self._registry = CollectorRegistry()
        self._registry.register(ATTEMPTS)
        self._registry.register(self)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def describe(self) -> list[GaugeMetricFamily]:
        """Nothing is read when this is registered."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        with self._lock:
            answers = self._refresh()
            up = GaugeMetricFamily("genmodels_storage_up", "Whether the storage answered the job service.")
            up.add_metric([], float(answers))
            yield up
            if not answers or self._read is None:
                return
            runs = self._read[1]
        states = Counter(run.state for run in runs)
        gauge = GaugeMetricFamily("genmodels_open_runs", "Runs of open jobs, by state.", labels=["state"])
        for state in get_args(State):
            gauge.add_metric([state], states[state])
        yield gauge
        queue = GaugeMetricFamily("genmodels_queue_length", "Runs that wait for room in the cluster.")
        queue.add_metric([], sum(run.position is not None for run in runs))
        yield queue

    def _refresh(self) -> bool:
        """Whether what is known is no older than BELIEVED_SECONDS."""
        if self._read and time.monotonic() - self._read[0] < BELIEVED_SECONDS:
            return True
        try:
            self._read = time.monotonic(), self._views.open_runs()
        except StorageError:
            return False
        return True
