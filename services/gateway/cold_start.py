"""Let a bounded number of requests wait, for a bounded time, for the first host of a pool that was scaled to zero."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from genmodels.errors import RequestError
from genmodels.metrics import POOL_WAIT_SECONDS, POOL_WAITING
from services.gateway.pool_config import Pool

SETTLE_SECONDS = 5.0  # in which a new gateway learns from Serve which hosts run
POLL_SECONDS = 0.05  # in that time
RETRY_SECONDS = 5  # after which another client should try again: a host takes some seconds to start


class ColdStart:
    """The requests of one gateway that wait for a pool. All methods are for one event loop.

    Args:
        is_running: return whether a host runs.
        wake: return when a host answers; Serve starts a host for this call.
    """

    def __init__(self, pool: Pool, is_running: Callable[[], bool], wake: Callable[[], Awaitable[None]]) -> None:
        self._pool, self._is_running, self._wake = pool, is_running, wake
        self._waiting = 0
        self._settles = time.monotonic() + SETTLE_SECONDS
        if not pool.min_replicas:
            POOL_WAITING.labels(pool.name).set(0)

    def is_needed(self) -> bool:
        """Return whether a request has to wait: no host is known to run."""
        return not (self._pool.min_replicas or self._is_running())

    async def wait(self) -> None:
        """Return as soon as a host runs, at once if one runs already.

        Raises:
            RequestError: too many requests wait already, or no host has started in time.
        """
        while self._waiting >= self._pool.max_waiting and self.is_needed() and time.monotonic() < self._settles:
            await asyncio.sleep(POLL_SECONDS)
        if not self.is_needed():
            return
        if self._waiting >= self._pool.max_waiting:
            raise self._refusal("another request waits for it", status=429)
        self._change_waiting(1)
        began = time.monotonic()
        try:
            await asyncio.wait_for(self._wake(), self._pool.wait_seconds)
        except TimeoutError:
            raise self._refusal(f"none has started in {self._pool.wait_seconds:g} s", status=503) from None
        finally:
            self._change_waiting(-1)
            POOL_WAIT_SECONDS.labels(self._pool.name).observe(time.monotonic() - began)

    def _change_waiting(self, by: int) -> None:
        self._waiting += by
        POOL_WAITING.labels(self._pool.name).inc(by)

    def _refusal(self, reason: str, *, status: int) -> RequestError:
        message = f"the pool {self._pool.name!r} starts its first model host, and {reason}; try again"
        return RequestError(message, status=status, code="pool_starting", retry_after=RETRY_SECONDS)
