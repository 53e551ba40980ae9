"""Rounds of a background thread: what one raises is told and counted, and the next one begins all the same.

A thread that ended would take with it what it is for, and nobody would see. So the body of each loop that runs beside
the requests or the training stands in `with rounds.round():`, and whoever answers for the process asks `stalled`.
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
    """For one thread; `stalled` and `stuck` may be called from others.

    Args:
        thread: its name in metrics, from the list in `genmodels.metrics`.
        lasting: the thread lives as long as the process, so that a metric tells when it last made progress.
    """

    def __init__(self, thread: str, log: logging.Logger, *, lasting: bool = False) -> None:
        self._thread, self._log, self._lasting = thread, log, lasting
        self._said = ""
        self._ended = time.monotonic()  # when a round last ended, however it did
        self.progress()

    @contextmanager
    def round(self, *passing: type[Exception]) -> Iterator[None]:
        """Contain whatever a round raises, but for the kinds in `passing`."""
        try:
            yield
        except passing:
            raise
        except Exception as error:
            self._tell(error)
        else:
            self._said = ""
            self.progress()
        self._ended = time.monotonic()

    def progress(self) -> None:
        """Note that the round gets on: its parts may take long."""
        self._ended = self._progress = time.monotonic()
        if self._lasting:
            THREAD_PROGRESS.labels(self._thread).set_to_current_time()

    def stalled(self) -> str | None:
        """Say why the process is not well: no round has completed for STALLED_SECONDS. None: all is well."""
        age = time.monotonic() - self._progress
        if age < STALLED_SECONDS:
            return None
        why = f": {self._said}" if self._said else ""
        return f"the thread {self._thread!r} has made no progress for {age:.0f} s{why}"

    def stuck(self) -> bool:
        """Whether the thread hangs or has ended, so that only a new process helps; failing rounds are not that."""
        return time.monotonic() - self._ended >= STALLED_SECONDS

    def _tell(self, error: Exception) -> None:
        THREAD_FAILURES.labels(self._thread).inc()
        said = str(contained(error))
        if said != self._said:  # a round a second would fill the log
            trace = None if isinstance(error, GenmodelsError) else error
            self._log.error(
                "a round of the thread %r failed, the next is tried: %s", self._thread, said, exc_info=trace
            )
        self._said = said
