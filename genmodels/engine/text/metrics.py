"""Metrics of a loaded text model."""

from __future__ import annotations

import time
from collections.abc import Collection

from genmodels.engine.metrics import GaugeShare, observe_many
from genmodels.engine.text.sequence import Sequence
from genmodels.metrics import (
    BATCH_SIZE,
    BETWEEN_TOKENS_SECONDS,
    FIRST_TOKEN_SECONDS,
    KV_SLOTS,
    TOKENS,
    WAITING,
    Labels,
)


class TextMetrics:
    """Count the tokens and the load of one text model.

    All methods are for the batcher's thread; `prompt` and `first_token` may be used from any thread.

    Args:
        slots: sequences in one decoding step.
    """

    def __init__(self, labels: Labels, slots: int) -> None:
        self.first_token, self.batch_size = FIRST_TOKEN_SECONDS.labels(*labels), BATCH_SIZE.labels(*labels)
        self.prompt, self._completion = (TOKENS.labels(*labels, kind) for kind in ("prompt", "completion"))
        self._between = BETWEEN_TOKENS_SECONDS.labels(*labels)
        self._waiting = GaugeShare(WAITING.labels(*labels))
        self._total, self._used = (GaugeShare(KV_SLOTS.labels(*labels, state)) for state in ("total", "used"))
        self._total.set(slots)

    def add_tokens(self, sequences: Collection[Sequence]) -> None:
        """Count one new token of each of these sequences."""
        now = time.monotonic()
        previous: dict[float | None, int] = {}  # usually one time: that of the previous step
        for sequence in sequences:
            previous[sequence.last_token_time] = previous.get(sequence.last_token_time, 0) + 1
            sequence.last_token_time = now
        for then, count in previous.items():
            if then is not None:
                observe_many(self._between, now - then, count)
        self._completion.inc(len(sequences))

    def set_load(self, waiting: int, running: int) -> None:
        """Set the numbers of sequences without and with a slot."""
        self._waiting.set(waiting)
        self._used.set(running)

    def close(self) -> None:
        """Set all gauges to 0 when the version is unloaded: a series ends only when its process ends."""
        self.set_load(0, 0)
        self._total.set(0)
