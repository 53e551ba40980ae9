"""Test what clients hold without a request: connections, headers, and responses that they do not read."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import uvicorn.config

from services.gateway.proxy import proxy_middlewares
from services.http.connections import HEADER_BYTES, Connection
from services.http.middleware import IngressMiddleware
from services.jobs import app as jobs
from tests.support.asgi_server import served

PATIENCE = 20.0  # seconds; for what has to happen at all


class Quick(Connection):
    header_seconds = 0.2
    read_seconds = 0.2
    max_connections = 20


class Application:
    """Answer at once, but under /wait when `let` is set, and with 1000 MiB under /large; `waiting` counts requests."""

    def __init__(self) -> None:
        self.let, self.waiting, self.disconnected = threading.Event(), 0, threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.waiting += 1
        while scope["path"] == "/wait" and not self.let.is_set():
            await asyncio.sleep(0.01)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/large":
            for _ in range(1000):
                await send({"type": "http.response.body", "body": b"x" * 2**20, "more_body": True})
                with contextlib.suppress(TimeoutError):
                    if (await asyncio.wait_for(receive(), 0.001))["type"] == "http.disconnect":
                        self.disconnected.set()
                        return
        await send({"type": "http.response.body", "body": b"ok", "more_body": False})


@pytest.fixture
def app() -> Application:
    return Application()


@pytest.fixture
def url(app: Application) -> Iterator[str]:
    with served(IngressMiddleware(app, max_requests=4), http=Quick, timeout_keep_alive=PATIENCE) as url:
        yield url
        app.let.set()


def test_both_servers_use_it(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither server counts connections as requests, as uvicorn's own limit does."""
    monkeypatch.setattr(uvicorn.config, "HTTP_PROTOCOLS", dict(uvicorn.config.HTTP_PROTOCOLS))
    service = jobs._uvicorn(app, "127.0.0.1", 0)
    proxy_middlewares()
    proxy = uvicorn.Config(app)  # as Serve makes it
    for config in (service, proxy):
        config.load()
        assert (config.http_protocol_class, config.limit_concurrency) == (Connection, None)


def connect(url: str) -> socket.socket:
    address = httpx.URL(url)
    return socket.create_connection((address.host, address.port), timeout=PATIENCE)


def is_closed(connection: socket.socket) -> bool:
    """Return True if the server ends the connection, whatever it sends before."""
    with contextlib.suppress(ConnectionError):
        while connection.recv(2**16):
            pass
    return True


def healthy(url: str) -> bool:
    with connect(url) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        return connection.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HTTP/1.1\r\nx-half: "])
def test_silent_connections_take_no_place(url: str, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(Quick, "header_seconds", PATIENCE * 10)  # only the next connections remove them
    with contextlib.ExitStack() as held:
        for _ in range(5 * Quick.max_connections):
            held.enter_context(connect(url)).sendall(sent)
        assert all(healthy(url) for _ in range(10))


def test_requests_under_way_keep_their_connections_and_leave_health_a_place(app: Application, url: str) -> None:
    with contextlib.ExitStack() as held:
        waiting = [held.enter_context(connect(url)) for _ in range(4)]
        for connection in waiting:
            connection.sendall(b"GET /wait HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        deadline = time.monotonic() + PATIENCE
        while app.waiting < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        refused = httpx.get(f"{url}/wait")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        for _ in range(5 * Quick.max_connections):
            held.enter_context(connect(url))
        assert healthy(url)
        app.let.set()
        assert all(connection.recv(100).startswith(b"HTTP/1.1 200") for connection in waiting)


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [b"GET / HTTP/1.1\r\n"],
        [bytes([letter]) for letter in b"GET /healthz HTTP/1.1\r\nx-slow: " + b"x" * 1000],
        [b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n", b"GET /healthz HTTP/1.1\r\n"],
        [b"POST /healthz HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n", *[b"x"] * 900],
    ],
    ids=["nothing", "half a header", "a byte at a time", "half a second header", "a body after its answer"],
)
def test_an_unfinished_header_has_a_deadline(url: str, parts: list[bytes]) -> None:
    with connect(url) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def send() -> None:
            with contextlib.suppress(OSError):
                for part in parts:
                    connection.sendall(part)
                    time.sleep(0.02)

        sending = threading.Thread(target=send)
        sending.start()
        assert is_closed(connection)
        sending.join()


def test_a_header_has_a_size(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Quick, "header_seconds", PATIENCE * 10)
    with connect(url) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"GET / HTTP/1.1\r\nx: ")
        for _ in range(1000):
            connection.sendall(b"x" * HEADER_BYTES)
        pytest.fail("64 MiB of a header were taken")


def test_the_rest_of_a_body_is_no_header(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a connection stays after an early answer, also if the end of the body comes in one large part."""
    monkeypatch.setattr(Quick, "header_seconds", PATIENCE * 10)
    rest = 3 * HEADER_BYTES
    with connect(url) as connection:
        for _ in range(3):
            connection.sendall(f"POST /healthz HTTP/1.1\r\nhost: x\r\ncontent-length: {rest}\r\n\r\n".encode())
            received = b""
            while b"ok" not in received:
                received += connection.recv(1000)
            connection.sendall(b"x" * rest)
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 200")


def test_an_answer_that_is_not_read_is_given_up(app: Application, url: str) -> None:
    with connect(url) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n")
        assert app.disconnected.wait(PATIENCE)
        assert is_closed(connection)


def test_a_keepalive_connection_stays(url: str) -> None:
    with httpx.Client(base_url=url) as client:
        for _ in range(3):
            assert client.get("/healthz").text == "ok"
            time.sleep(2 * Quick.header_seconds)
        pool: Any = client._transport._pool  # type: ignore[attr-defined]
        assert len(pool.connections) == 1
