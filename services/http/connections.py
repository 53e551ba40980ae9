"""HTTP connections of the job service and of Serve's proxy: none keeps a place that it does not use.

uvicorn alone waits for a request's header for ever, holds what has come of it without a bound, waits for ever for a
client to read its answer, and counts a silent connection like a request under way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import ClassVar, cast

import uvicorn.config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.cluster.descriptors import file_limit

HEADER_SECONDS = 10.0  # for a request's header, from its first byte on, or from the connection's start
HEADER_BYTES = 64 * 1024
READ_SECONDS = 60.0  # for a client to read what is in the send buffer (64 KiB) before more is written
MAX_CONNECTIONS = 2048


def use_in_this_process() -> None:
    """Have servers that are started without a protocol of their own use `Connection`: Serve offers no such option."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{Connection.__name__}"


class Connection(HttpToolsProtocol):
    """uvicorn's protocol with deadlines. Where there are too many connections, the one that is idle longest goes.

    So a new connection, a health check's too, always gets in while fewer requests than connections are under way: the
    server has to refuse requests at a lower number (`Edge`'s `max_requests`).
    """

    header_seconds: ClassVar[float] = HEADER_SECONDS
    read_seconds: ClassVar[float] = READ_SECONDS
    max_connections: ClassVar[int] = MAX_CONNECTIONS

    _header_bytes = 0
    _in_body = False
    _used = 0.0  # when something last came

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way: none has come, or all were answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        most = min(self.max_connections, file_limit() // 2)
        has_room = len(self.connections) < most or self._evict()
        super().connection_made(transport)
        self._used = time.monotonic()
        self._header, self._reading = _Deadline(self.loop, transport.abort), _Deadline(self.loop, transport.abort)
        self._header.start(self.header_seconds)
        if not has_room:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        self._used = time.monotonic()
        if self.is_idle:
            self._header.start(self.header_seconds)
        super().data_received(data)
        if not self.is_idle:
            self._header_bytes = 0
            self._header.stop()
        elif not self._in_body:  # the rest of a body whose request was answered is discarded, until the deadline
            self._header_bytes += len(data)
            if self._header_bytes > HEADER_BYTES:
                self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._header.stop()
        self._reading.stop()
        super().connection_lost(exc)

    def on_headers_complete(self) -> None:
        self._in_body = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_body = False
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading.start(self.read_seconds)

    def resume_writing(self) -> None:
        self._reading.stop()
        super().resume_writing()

    def _evict(self) -> bool:
        """Close the connection that is idle longest; whether there was one."""
        idle = [one for one in cast("set[Connection]", self.connections) if one.is_idle]
        if not idle:
            return False
        oldest = min(idle, key=lambda one: one._used)
        self.connections.discard(oldest)  # now, not when the loop gets round to it: many may come at once
        oldest.transport.abort()
        return True


class _Deadline:
    """Calls something unless it is stopped in time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, late: Callable[[], None]) -> None:
        self._loop, self._late = loop, late
        self._timer: asyncio.TimerHandle | None = None

    def start(self, seconds: float) -> None:
        """Begin to wait; one that has begun goes on."""
        if self._timer is None:
            self._timer = self._loop.call_later(seconds, self._late)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
