"""Prometheus helpers of loaded models: gauges that several models share, and many observations at the cost of one.

A decoding step may take only a millisecond, and each update of a metric takes a microsecond. So the series of a model
are looked up once, and a step adds its counts for all sequences in one update.
"""

from __future__ import annotations

from bisect import bisect_left

from prometheus_client import Gauge, Histogram


class GaugeShare:
    """The part of a gauge that belongs to one loaded model; all checkpoints of a model share one gauge.

    Not thread-safe.
    """

    def __init__(self, gauge: Gauge) -> None:
        self._gauge, self._value = gauge, 0

    def set(self, value: int) -> None:
        if value != self._value:
            self._gauge.inc(value - self._value)
            self._value = value


def observe_many(histogram: Histogram, amount: float, count: int) -> None:
    """Observe an amount `count` times at the cost of one observation; prometheus-client has no public method."""
    histogram._sum.inc(amount * count)
    histogram._buckets[bisect_left(histogram._upper_bounds, amount)].inc(count)
