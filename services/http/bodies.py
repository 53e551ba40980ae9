"""Bodies of requests before they reach the application: limited in size, in time, and in their total memory.

A body is read only when the application reads it, after the check of the key. Serve's proxy is a process of its own and
would read a body at once. So the rest of a large body waits in the proxy until the application announces that it reads
the body (`WANTED`, a message of the ASGI extension `EXTENSION`), and until there is memory for it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from genmodels.errors import RequestError

EXTENSION = "genmodels.body"
WANTED = "genmodels.body.wanted"
SMALL_BYTES = 64 * 1024  # bodies up to this size, and about as much of larger ones, are passed on at once
DISCONNECT: Message = {"type": "http.disconnect"}


@dataclass(frozen=True)
class BodyLimit:
    """The maximum size of a body, and its maximum time: `seconds`, and 1 s more for each `rate` bytes received."""

    bytes: int
    seconds: float
    rate: float = math.inf


class BodyMemory:
    """The memory for the bodies of one process, with a maximum for each caller."""

    def __init__(self, total: int, share: int) -> None:
        self._total, self._share = total, share
        self._held: Counter[bytes] = Counter()

    def take(self, caller: bytes, size: int) -> bool:
        """Reserve memory; return False if there is not enough."""
        if self._held.total() + size > self._total or self._held[caller] + size > self._share:
            return False
        self._held[caller] += size
        return True

    def give_back(self, caller: bytes, size: int) -> None:
        self._held[caller] -= size
        if not self._held[caller]:
            del self._held[caller]


class Body:
    """ASGI's `receive` for one request. A body beyond its limit ends with a disconnect; `error` has the reason."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limit: BodyLimit) -> None:
        self.error: RequestError | None = None
        self.expected = expected_bytes(scope, limit)
        self._receive, self._send, self._limit = receive, send, limit
        self._unannounced = EXTENSION in (scope.get("extensions") or {}) and self.expected > SMALL_BYTES
        self._size, self._waited, self._more = 0, 0.0, True

    async def receive(self) -> Message:
        if self.error:
            return DISCONNECT
        if not self._more:  # after the body comes only the client's disconnect, which has no time limit
            return await self._receive()
        if self._unannounced:
            self._unannounced = False
            await self._send({"type": WANTED})
        try:
            await self._admit()
        except RequestError as error:
            return self._refuse(error)
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._limit.seconds + self._size / self._limit.rate - self._waited):
                message = await self._receive()
        except TimeoutError:
            return self._refuse(_too_slow(self._limit))
        self._waited += time.monotonic() - started  # without the time of the application
        self._size += len(message.get("body", b""))
        if self._size > self._limit.bytes:
            return self._refuse(too_large(self._limit.bytes))
        self._more = message.get("more_body", False)
        return message

    def release(self) -> None:
        """Free the memory of the body; called when the request has ended."""

    async def _admit(self) -> None:
        """Wait until the next part may be read."""

    def _refuse(self, error: RequestError) -> Message:
        self.error = error
        return DISCONNECT


class HeldBody(Body):
    """A body for an application in another process, which announces that it wants more than the beginning."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limit: BodyLimit, memory: BodyMemory) -> None:
        super().__init__(scope, receive, send, limit)
        self._caller = Headers(scope=scope).get("authorization", "").encode()
        self._memory, self._held, self._is_wanted = memory, 0, asyncio.Event()

    def want(self) -> None:
        self._is_wanted.set()

    def release(self) -> None:
        if self._held:
            self._memory.give_back(self._caller, self._held)
            self._held = 0

    async def _admit(self) -> None:
        if not self._size or self.expected <= SMALL_BYTES or self._held:
            return
        await self._is_wanted.wait()
        if not self._memory.take(self._caller, self.expected):
            message = "large bodies of other requests fill the memory; try again in a moment"
            raise RequestError(message, status=503, code="too_many_large_bodies", retry_after=1)
        self._held = self.expected


def expected_bytes(scope: Scope, limit: BodyLimit) -> int:
    """Return the size of a request's body, or the limit if the request does not state a size.

    Raises:
        RequestError: the body is too large, or its Content-Length is not a number.
    """
    headers = Headers(scope=scope)
    if "transfer-encoding" in headers:
        return limit.bytes
    length = headers.get("content-length", "0")
    if not length.isdecimal():
        raise RequestError("the Content-Length header is not a number")
    if int(length[:20]) > limit.bytes:
        raise too_large(limit.bytes)
    return int(length[:20])


def too_large(limit: int) -> RequestError:
    message = f"the request's body is larger than the limit of {limit:,} bytes"
    return RequestError(message, status=413, code="body_too_large")


def _too_slow(limit: BodyLimit) -> RequestError:
    more = "" if math.isinf(limit.rate) else f", and 1 s more for each {limit.rate:,.0f} bytes of it"
    message = f"the request's body did not arrive in time: it may take {limit.seconds:g} s{more}"
    return RequestError(message, status=408, code="body_too_slow")
