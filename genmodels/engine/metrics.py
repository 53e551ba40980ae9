"""What a loaded version counts of itself.

Its series are looked up once, and what a step adds for all its texts is added at once: a step of decoding may take a
millisecond, and an addition that other processes can read takes one of its thousandths.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from typing import Protocol

from prometheus_client import Gauge, Histogram

from genmodels.metrics import (
    BATCH_SIZE,
    BETWEEN_TOKENS_SECONDS,
    FIRST_TOKEN_SECONDS,
    IMAGES,
    KV_SLOTS,
    TOKENS,
    WAITING,
    Labels,
)


class HasTokenTime(Protocol):
    """A text in progress: `written` is the time of its last token, from `time.monotonic`; None before the first."""

    written: float | None


class TextMeter:
    """Of a text model; all but `joined` and `began` is for the engine's thread.

    Args:
        slots: texts in one step.
    """

    def __init__(self, labels: Labels, slots: int) -> None:
        self.first_token, self.batch_size = FIRST_TOKEN_SECONDS.labels(*labels), BATCH_SIZE.labels(*labels)
        self.prompt, self._completion = (TOKENS.labels(*labels, kind) for kind in ("prompt", "completion"))
        self._between = BETWEEN_TOKENS_SECONDS.labels(*labels)
        self._waiting = _Level(WAITING.labels(*labels))
        self._total, self._used = (_Level(KV_SLOTS.labels(*labels, state)) for state in ("total", "used"))
        self._total.set(slots)

    def made(self, texts: Sequence[HasTokenTime]) -> None:
        """One token more of each of these texts."""
        now = time.monotonic()
        before: dict[float | None, int] = {}  # as a rule one moment: that of the step before
        for text in texts:
            before[text.written] = before.get(text.written, 0) + 1
            text.written = now
        for then, count in before.items():
            if then is not None:
                _observe(self._between, now - then, count)
        self._completion.inc(len(texts))

    def holds(self, waiting: int, used: int) -> None:
        """So many texts wait for a slot, and so many have one."""
        self._waiting.set(waiting)
        self._used.set(used)

    def close(self) -> None:
        """The version is gone, and its slots with it. A series itself cannot go before its process does."""
        self.holds(0, 0)
        self._total.set(0)


class ImageMeter:
    """Of an image model."""

    def __init__(self, labels: Labels) -> None:
        self.batch_size = BATCH_SIZE.labels(*labels)
        self.waiting = _Level(WAITING.labels(*labels))
        self._labels = labels

    def answered(self, verb: str, count: int) -> None:
        """So many pictures or latents."""
        IMAGES.labels(*self._labels, verb).inc(count)


class _Level:
    """What one loaded version has of a gauge, which checkpoints of a model share. For one thread at a time."""

    def __init__(self, gauge: Gauge) -> None:
        self._gauge, self._value = gauge, 0

    def set(self, value: int) -> None:
        if value != self._value:
            self._gauge.inc(value - self._value)
            self._value = value


def _observe(histogram: Histogram, amount: float, count: int) -> None:
    """`observe` so many times, for the price of one; prometheus-client has no public way."""
    histogram._sum.inc(amount * count)
    histogram._buckets[bisect_left(histogram._upper_bounds, amount)].inc(count)
