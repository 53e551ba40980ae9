"""HTTP connections of the job service and of Serve's proxy: deadlines and a maximum number.

Without this, uvicorn waits forever for a request's header, keeps its received bytes without a limit, waits forever for
a client to read its answer, and counts an idle connection like a request in progress.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import ClassVar, cast

import uvicorn.config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.cluster.descriptors import file_limit
from services.http.middleware import ABORT

HEADER_SECONDS = 10.0  # for the header of a request, from its first byte or from the start of the connection
HEADER_BYTES = 64 * 1024
READ_SECONDS = 60.0  # for a client to read the send buffer (64 KiB) before more is written
MAX_CONNECTIONS = 2048


def use_in_this_process() -> None:
    """Let servers without a protocol setting use `Connection`: Serve has no option for it."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{Connection.__name__}"


class Connection(HttpToolsProtocol):
    """uvicorn's protocol with deadlines. At the maximum of connections, the connection that is idle longest is closed.

    So a new connection, also of a health check, is accepted as long as one connection is idle: the server must refuse
    requests at a lower number (`max_requests` of IngressMiddleware).
    """

    header_seconds: ClassVar[float] = HEADER_SECONDS
    read_seconds: ClassVar[float] = READ_SECONDS
    max_connections: ClassVar[int] = MAX_CONNECTIONS

    _header_bytes = 0
    _in_body = False
    _used = 0.0  # time of the last received bytes

    @property
    def is_idle(self) -> bool:
        """Return True if no request is in progress."""
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
        is_rest = self._in_body  # of a body after its answer: it is discarded, until the deadline
        super().data_received(data)
        if not self.is_idle:
            self._header_bytes = 0
            self._header.stop()
        elif is_rest and not self._in_body:  # the next header has the whole time; uvicorn has stopped its own timer
            self._header.stop()
            self._header.start(self.header_seconds)
        elif not is_rest:
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
        self.scope[ABORT] = self.transport.abort  # type: ignore[literal-required]

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
        """Close the connection that is idle longest; return False if no connection is idle."""
        idle = [other for other in cast("set[Connection]", self.connections) if other.is_idle]
        if not idle:
            return False
        oldest = min(idle, key=lambda other: other._used)
        self.connections.discard(oldest)  # now, because many connections may arrive before the loop does it
        oldest.transport.abort()
        return True


class _Deadline:
    """Call a function at a deadline, unless the deadline is stopped before."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_late: Callable[[], None]) -> None:
        self._loop, self._on_late = loop, on_late
        self._timer: asyncio.TimerHandle | None = None

    def start(self, seconds: float) -> None:
        """Start the deadline; no effect if it has started already."""
        if self._timer is None:
            self._timer = self._loop.call_later(seconds, self._on_late)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
