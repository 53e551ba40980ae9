"""How much one key may ask: requests a minute, and at once, or places for what is costly. Each process counts alone."""

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
    tokens: float  # requests that may come at once
    filled: float  # when that was so
    running: int = 0


class Limits:
    """A token bucket for each key's rate, which holds a minute's requests, and a count of those under way.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._uses: dict[str, _Use] = {}  # as many as there are keys

    def enter(self, key: Key) -> dict[str, str]:
        """A request begins; headers that tell what is left.

        Raises:
            RequestError: 429; there is one too many.
        """
        use = self._uses.setdefault(key.id, _Use(math.inf, self._clock()))
        if key.concurrency is not None and use.running >= key.concurrency:
            raise RequestError(
                f"this key may have {key.concurrency} requests under way at once, and has",
                status=429,
                code="too_many_at_once",
            )
        headers = {} if key.rate is None else self._take(use, key.rate)
        use.running += 1
        return headers

    def leave(self, key: Key) -> None:
        """A request has been answered to its last byte, or its client has left."""
        self._uses[key.id].running -= 1

    def _take(self, use: _Use, rate: int) -> dict[str, str]:
        now = self._clock()
        use.tokens, use.filled = min(rate, use.tokens + (now - use.filled) * rate / 60), now
        if use.tokens < 1:
            wait = math.ceil((1 - use.tokens) * 60 / rate)
            raise RequestError(
                f"this key may ask {rate} times a minute; try again in {wait} s",
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
    """Places for something costly: so many at once, of which one key may take a few; safe between threads.

    Args:
        what: what takes them, in the plural: "uploads".
        total: None: any number.
    """

    def __init__(self, what: str, total: int | None, of_one: int) -> None:
        self._what, self._total, self._of_one = what, math.inf if total is None else total, of_one
        self._taken: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def take(self, key: str) -> Iterator[None]:
        """Hold a place.

        Raises:
            RequestError: 429; there is none, or none for this key.
        """
        with self._lock:
            if self._taken[key] >= self._of_one:
                message = f"this key has {self._of_one} {self._what} under way, the most that it may have at once"
                raise RequestError(message, status=429, code="too_many_at_once")
            if self._taken.total() >= self._total:
                message = f"others have {self._total} {self._what} under way; try again in a moment"
                raise RequestError(message, status=429, code="too_many")
            self._taken[key] += 1
        try:
            yield
        finally:
            with self._lock:
                self._taken[key] -= 1
                if not self._taken[key]:
                    del self._taken[key]
