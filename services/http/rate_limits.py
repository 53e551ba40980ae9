"""Limits of each key: requests per minute, requests at once, and costly operations. Each process counts for itself."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from genmodels.errors import RequestError
from genmodels.keys import Key


@dataclass
class _Use:
    tokens: float  # requests that the key may send now
    filled: float  # time of the last update of `tokens`
    running: int = 0


class Limits:
    """A token bucket for each key's rate, which holds the requests of one minute, and a count of running requests.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._uses: dict[str, _Use] = {}  # by key id

    def enter(self, key: Key) -> dict[str, str]:
        """Count the begin of a request; return headers with the remaining number of requests.

        Raises:
            RequestError: 429; the key has reached a limit.
        """
        use = self._uses.setdefault(key.id, _Use(math.inf, self._clock()))
        if key.concurrency is not None and use.running >= key.concurrency:
            raise RequestError(
                f"this key has {key.concurrency} requests in progress, which is its limit",
                status=429,
                code="too_many_at_once",
            )
        headers = {} if key.rate is None else self._take(use, key.rate)
        use.running += 1
        return headers

    def leave(self, key: Key) -> None:
        """Count the end of a request: its answer is complete, or its client has disconnected."""
        self._uses[key.id].running -= 1

    def _take(self, use: _Use, rate: int) -> dict[str, str]:
        now = self._clock()
        use.tokens, use.filled = min(rate, use.tokens + (now - use.filled) * rate / 60), now
        if use.tokens < 1:
            wait = math.ceil((1 - use.tokens) * 60 / rate)
            raise RequestError(
                f"this key is limited to {rate} requests per minute; try again in {wait} s",
                status=429,
                code="rate_limit_exceeded",
                retry_after=wait,
            )
        use.tokens -= 1
        return {
            "x-ratelimit-limit-requests": str(rate),
            "x-ratelimit-remaining-requests": str(int(use.tokens)),
            "x-ratelimit-reset-requests": f"{math.ceil((rate - use.tokens) * 60 / rate)}s",
        }


class Slots:
    """Slots for a costly operation, with a maximum for each key; thread-safe.

    Args:
        operations: name of the operation in error messages, in the plural: "uploads".
        total: slots of all keys; None: no limit.
        per_key: slots of one key.
    """

    def __init__(self, operations: str, total: int | None, per_key: int) -> None:
        self._operations, self._per_key = operations, per_key
        self._total = math.inf if total is None else total
        self._taken: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def take(self, key: str) -> Iterator[None]:
        """Hold a slot during the context.

        Raises:
            RequestError: 429; no slot is free, or none for this key.
        """
        with self._lock:
            if self._taken[key] >= self._per_key:
                message = f"this key has {self._per_key} {self._operations} in progress, which is its limit"
                raise RequestError(message, status=429, code="too_many_at_once")
            if self._taken.total() >= self._total:
                message = (
                    f"{self._total} {self._operations} of all keys are in progress, the limit; try again in a moment"
                )
                raise RequestError(message, status=429, code="too_many")
            self._taken[key] += 1
        try:
            yield
        finally:
            with self._lock:
                self._taken[key] -= 1
                if not self._taken[key]:
                    del self._taken[key]
