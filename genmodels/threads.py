"""Run rounds of a background thread: log and count the errors of a round, and continue with the next round.

If a background thread ended, its work would stop unnoticed. So the body of each loop that runs in parallel to requests
or training is in `with rounds.round():`, and the health check of the process calls `stalled`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from genmodels.errors import GenmodelsError, contained
from genmodels.metrics import THREAD_FAILURES, THREAD_PROGRESS

STALLED_SECONDS = 300.0  # without progress; the largest model is loaded in less


class Rounds:
    """Run the rounds of one thread; other threads may call `stalled` and `stuck`.

    Args:
        thread: its name in metrics, from the list in `genmodels.metrics`.
        lasting: the thread lives as long as the process, so that a metric shows when it last made progress.
    """

    def __init__(self, thread: str, log: logging.Logger, *, lasting: bool = False) -> None:
        self._thread, self._log, self._lasting = thread, log, lasting
        self._last_error = ""
        self._ended = time.monotonic()  # when a round last ended, with or without an error
        self.progress()

    @contextmanager
    def round(self, *passing: type[Exception]) -> Iterator[None]:
        """Contain all exceptions of a round, except the types in `passing`."""
        try:
            yield
        except passing:
            raise
        except Exception as error:
            self._report(error)
        else:
            self._last_error = ""
            self.progress()
        self._ended = time.monotonic()

    def progress(self) -> None:
        """Record progress within a round, whose parts may take long."""
        self._ended = self._progress = time.monotonic()
        if self._lasting:
            THREAD_PROGRESS.labels(self._thread).set_to_current_time()

    def stalled(self) -> str | None:
        """Return the problem if no round has completed for STALLED_SECONDS, else None."""
        age = time.monotonic() - self._progress
        if age < STALLED_SECONDS:
            return None
        why = f": {self._last_error}" if self._last_error else ""
        return f"the thread {self._thread!r} has made no progress for {age:.0f} s{why}"

    def stuck(self) -> bool:
        """Return whether the thread hangs or has ended, so only a new process helps; failing rounds do not count."""
        return time.monotonic() - self._ended >= STALLED_SECONDS

    def _report(self, error: Exception) -> None:
        THREAD_FAILURES.labels(self._thread).inc()
        message = str(contained(error))
        if message != self._last_error:  # one message each second would fill the log
            trace = None if isinstance(error, GenmodelsError) else error
            self._log.error(
                "a round of the thread %r failed, the next round follows: %s", self._thread, message, exc_info=trace
            )
        self._last_error = message
