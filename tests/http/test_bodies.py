"""Test request bodies: which are read, how slow they may be, and how much memory all of them may hold."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect, Request

from genmodels.keys import Keys
from genmodels.storage import Storage
from services.gateway import routes
from services.http.bodies import SMALL_BYTES, BodyLimit, BodyMemory
from services.http.middleware import MAX_BODY, IngressMiddleware, StreamedRoute
from services.jobs import app as jobs
from services.jobs import upload_slots
from tests.support.asgi_server import served

PATIENCE = 20.0  # seconds; for what has to happen at all


# The key comes first


@pytest.fixture(params=["jobs", "gateway"])
def keyed(request: pytest.FixtureRequest, file_storage: Storage) -> Any:
    """Return each of the two APIs, with keys required."""
    keys = Keys(file_storage)
    if request.param == "jobs":
        return jobs.create_app(file_storage, keys=keys, hosts=None)
    return routes.create_app(None, hosts=None, keys=keys)  # no request reaches a model


def with_bodies(app: Any) -> list[tuple[str, str]]:
    """Return method and path of all routes that may have a body."""
    routes = [(method, route.path) for route in app.routes if isinstance(route, APIRoute) for method in route.methods]
    return [(method, path.replace("{", "").replace("}", "")) for method, path in routes if method in ("POST", "PUT")]


def test_a_request_without_a_key_is_answered_before_its_body(keyed: Any) -> None:
    """Each client sends a part of a body and then nothing."""
    assert len(with_bodies(keyed)) > 3
    with served(keyed) as url:
        address = httpx.URL(url)
        for method, path in with_bodies(keyed):
            for key in ("", "authorization: Bearer gm_00000000_invented\r\n"):
                with socket.create_connection((address.host, address.port), timeout=PATIENCE) as client:
                    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\n{key}content-type: application/json\r\n"
                    client.sendall(f"{head}content-length: 60000\r\n\r\n{{".encode())
                    assert client.recv(100).startswith(b"HTTP/1.1 401"), path


# Memory of large bodies in a proxy


class Proxy:
    """Act as Serve does before the application: fetch a body as quickly as it arrives."""

    def __init__(self, app: Any, memory: BodyMemory) -> None:
        self.taken = 0
        self.edge = IngressMiddleware(self._fetch, memory=memory)
        self._app = IngressMiddleware(app)

    async def _fetch(self, scope: Any, receive: Any, send: Any) -> None:
        queue: asyncio.Queue[Any] = asyncio.Queue()

        async def fetch() -> None:
            while (message := await receive())["type"] != "http.disconnect":
                self.taken += len(message["body"])
                queue.put_nowait(message)
            queue.put_nowait(message)

        fetching = asyncio.create_task(fetch())
        try:
            await self._app(scope, queue.get, send)
        finally:
            fetching.cancel()


class Client:
    """Send a body in parts of 16 KiB; keep the status and the body of the response."""

    def __init__(self, size: int, key: str = "", chunked: bool = False) -> None:
        self.remaining, self.status, self.body, self.gone = size, 0, b"", asyncio.Event()
        self.more = True
        length = (b"transfer-encoding", b"chunked") if chunked else (b"content-length", str(size).encode())
        self.headers = [length, (b"authorization", key.encode())]

    async def receive(self) -> dict[str, Any]:
        await asyncio.sleep(0)
        if not self.more:
            await self.gone.wait()
            return {"type": "http.disconnect"}
        part = min(self.remaining, 2**14)
        self.remaining -= part
        self.more = self.remaining > 0
        return {"type": "http.request", "body": b"x" * part, "more_body": self.more}

    async def send(self, message: dict[str, Any]) -> None:
        self.status = message.get("status", self.status)
        self.body += message.get("body", b"")

    async def ask(self, edge: IngressMiddleware) -> None:
        scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": self.headers}
        await asyncio.wait_for(edge(scope, self.receive, self.send), PATIENCE)


class Application:
    """Answer with the size of the body once it may; refuse a request without a key, as the gateway does."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.read = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        for _ in range(20):  # as long as the lookup of a key takes
            await asyncio.sleep(0)
        status, size = 401, 0
        if request.headers["authorization"]:
            status, size = 200, len(await request.body())
            self.read += 1
            await self.may_answer.wait()
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": str(size).encode(), "more_body": False})


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_without_a_key_are_not_fetched(chunked: bool) -> None:
    async def play() -> None:
        proxy = Proxy(Application(), BodyMemory(MAX_BODY, MAX_BODY))
        clients = [Client(MAX_BODY, chunked=chunked) for _ in range(100)]
        await asyncio.gather(*(client.ask(proxy.edge) for client in clients))
        assert {client.status for client in clients} == {401}
        assert proxy.taken <= 100 * SMALL_BYTES

    asyncio.run(play())


@pytest.mark.parametrize("size", [0, 1, SMALL_BYTES, SMALL_BYTES + 1, MAX_BODY])
@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_with_a_key_come_whole(size: int, chunked: bool) -> None:
    async def play() -> None:
        proxy = Proxy(app := Application(), BodyMemory(MAX_BODY, MAX_BODY))
        app.may_answer.set()
        for _ in range(3):  # the memory of each body must be released
            client = Client(size, "a", chunked=chunked and size > 0)
            await client.ask(proxy.edge)
            assert (client.status, client.body) == (200, str(size).encode())

    asyncio.run(play())


def test_bodies_share_what_memory_there_is() -> None:
    async def play() -> None:
        proxy = Proxy(app := Application(), BodyMemory(4 * MAX_BODY, 2 * MAX_BODY))
        first = [Client(MAX_BODY, key) for key in "aab"]
        asking = [asyncio.create_task(client.ask(proxy.edge)) for client in first]
        while app.read < len(first):
            await asyncio.sleep(0.001)
        third_of_a, second_of_b, of_c = Client(MAX_BODY, "a"), Client(MAX_BODY, "b"), Client(MAX_BODY, "c")
        await third_of_a.ask(proxy.edge)
        assert third_of_a.status == 503
        assert json.loads(third_of_a.body)["error"]["code"] == "too_many_large_bodies"
        asking.append(asyncio.create_task(second_of_b.ask(proxy.edge)))
        while app.read < 4:
            await asyncio.sleep(0.001)
        await of_c.ask(proxy.edge)
        assert of_c.status == 503
        small = Client(SMALL_BYTES, "a")
        asking.append(asyncio.create_task(small.ask(proxy.edge)))
        app.may_answer.set()
        await asyncio.gather(*asking)
        assert {client.status for client in (*first, second_of_b, small)} == {200}
        again = Client(MAX_BODY, "a")
        await again.ask(proxy.edge)
        assert again.status == 200

    asyncio.run(play())


# Slow ones


async def swallow(scope: Any, receive: Any, send: Any) -> None:
    async for _ in Request(scope, receive).stream():
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


class Slow(Client):
    """Send one byte at regular intervals."""

    def __init__(self, size: int, seconds: float) -> None:
        super().__init__(size)
        self.seconds = seconds

    async def receive(self) -> dict[str, Any]:
        await asyncio.sleep(self.seconds)
        self.remaining -= 1
        return {"type": "http.request", "body": b"x", "more_body": self.remaining > 0}


@pytest.mark.parametrize("limit", [BodyLimit(10**6, 0.1), BodyLimit(10**6, 0.05, rate=1000)])
def test_a_body_must_come_in_time_as_a_whole(limit: BodyLimit) -> None:
    """No single pause between two parts is long."""

    async def play() -> None:
        client = Slow(10**6, 0.005)
        await client.ask(IngressMiddleware(swallow, streamed=StreamedRoute("POST", "/", limit)))
        assert client.status == 408
        assert client.remaining > 10**6 - 1000

    asyncio.run(play())


def test_what_the_application_takes_is_not_the_clients_time() -> None:
    async def busy(scope: Any, receive: Any, send: Any) -> None:
        async for _ in Request(scope, receive).stream():
            await asyncio.sleep(0.02)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    client = Client(20 * 2**14)
    asyncio.run(client.ask(IngressMiddleware(busy, body_seconds=0.2)))
    assert client.status == 200


def test_slow_uploads_give_their_places_to_others(file_storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "UPLOADS", StreamedRoute("PUT", "/v1/datasets/", BodyLimit(10**6, 1.5, rate=1e6)))
    monkeypatch.setattr(upload_slots, "UPLOADS_AT_ONCE", 2)
    keys = Keys(file_storage)
    tokens = [keys.create(name, ("submit",))[1] for name in ("one", "two", "three")]
    with served(jobs.create_app(file_storage, keys=keys, hosts=None)) as url:
        address = httpx.URL(url)

        def upload(token: str) -> socket.socket:
            head = f"PUT /v1/datasets/slow HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\n"
            client = socket.create_connection((address.host, address.port), timeout=PATIENCE)
            client.sendall(f"{head}content-length: 20000\r\n\r\nx".encode())
            return client

        def add(token: str, name: str = "whole") -> httpx.Response:
            headers = {"authorization": f"Bearer {token}"}
            return httpx.put(f"{url}/v1/datasets/{name}", content=b"To be or not\n" * 400, headers=headers)

        with upload(tokens[0]) as first, upload(tokens[1]) as second:
            refused = until(lambda: add(tokens[2]), 429)
            assert refused.json()["error"]["code"] == "too_many"
            assert add(tokens[0]).json()["error"]["code"] == "too_many_at_once"
            assert {client.recv(100)[9:12] for client in (first, second)} == {b"408"}
        assert until(lambda: add(tokens[2], "later"), 201)


def test_a_slow_upload_gives_its_place_to_another_key(file_storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_slots, "UPLOADS_AT_ONCE", 1)
    monkeypatch.setattr(upload_slots, "MIN_SECONDS", 0.0)
    keys = Keys(file_storage)
    slow, other = (keys.create(name, ("submit",))[1] for name in ("slow", "other"))
    with served(jobs.create_app(file_storage, keys=keys, hosts=None)) as url:
        address = httpx.URL(url)
        with socket.create_connection((address.host, address.port), timeout=PATIENCE) as client:
            head = f"PUT /v1/datasets/slow HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {slow}\r\n"
            client.sendall(f"{head}content-length: 20000\r\n\r\nx".encode())
            same_key = {"content": b"x", "headers": {"authorization": f"Bearer {slow}"}}
            until(lambda: httpx.put(f"{url}/v1/datasets/again", **same_key), 429)  # the slow upload has begun
            headers = {"authorization": f"Bearer {other}"}
            content = b"To be or not\n" * 400
            assert httpx.put(f"{url}/v1/datasets/whole", content=content, headers=headers).status_code == 201
            answer = client.recv(2000).decode()
    assert answer.startswith("HTTP/1.1 429")
    assert "retry-after: 30" in answer
    assert '"upload_too_slow"' in answer
    assert file_storage.list("datasets/slow/") == []


def until(send: Any, status: int) -> httpx.Response:
    deadline = time.monotonic() + PATIENCE
    while (response := send()).status_code != status:
        assert time.monotonic() < deadline, response.text
    return response


def test_a_client_that_leaves_in_its_body_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    async def gone(scope: Any, receive: Any, send: Any) -> None:
        with pytest.raises(ClientDisconnect):
            await Request(scope, receive).body()
        raise ClientDisconnect

    async def leave() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    client = Client(1)
    client.receive = leave
    asyncio.run(client.ask(IngressMiddleware(gone)))
    assert (client.status, caplog.text) == (0, "")
