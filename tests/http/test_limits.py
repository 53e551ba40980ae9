"""Test limits: of one key, of a full server, and what is released when clients disconnect."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from genmodels.engine.text.model import TextModel
from genmodels.errors import RequestError
from genmodels.keys import Key, Keys
from genmodels.storage import Storage, open_storage
from services.gateway.model_host import ModelHost
from services.gateway.routes import create_app
from services.http.rate_limits import Limits
from tests.support.asgi_client import ask, refused
from tests.support.asgi_server import served
from tests.support.published_models import publish

BODY = {"model": "play", "prompt": "To be", "max_tokens": 12}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def key(**limits: Any) -> Key:
    return Key(id="00000000", name="k", scopes=("generate",), sha256="", created="2026-01-01T00:00Z", **limits)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    storage = open_storage(tmp_path_factory.mktemp("models").as_uri())
    publish(storage, "play", "minigpt")
    publish(storage, "shapes", "vae")
    return storage


@pytest.fixture(scope="module")
def host(storage: Storage) -> ModelHost:
    return ModelHost(storage.url, pin=["play"])


@pytest.fixture(scope="module")
def url(host: ModelHost) -> Iterator[str]:
    with served(create_app(host)) as url:
        yield url


def batcher(host: ModelHost) -> Any:
    model = host._cache._entries["play@1"].model
    assert isinstance(model, TextModel)
    return model.batcher


def is_idle(host: ModelHost) -> bool:
    return not batcher(host).busy and not host._cache._entries["play@1"].uses


async def until_idle(host: ModelHost) -> None:
    deadline = time.monotonic() + 30
    while not is_idle(host):
        assert time.monotonic() < deadline, "a slot is held"
        await asyncio.sleep(0.01)


# Keys


def test_a_rate_is_a_bucket_that_holds_a_minute() -> None:
    clock = Clock()
    limits, mine = Limits(clock), key(rate=3)
    remaining = [limits.enter(mine)["x-ratelimit-remaining-requests"] for _ in range(3)]
    assert remaining == ["2", "1", "0"]
    with pytest.raises(RequestError) as error:
        limits.enter(mine)
    assert (error.value.status, error.value.code, error.value.retry_after) == (429, "rate_limit_exceeded", 20)
    clock.now += 20
    assert limits.enter(mine)["x-ratelimit-reset-requests"] == "60s"
    with pytest.raises(RequestError, match="3 requests per minute"):
        limits.enter(mine)
    clock.now += 3600
    assert limits.enter(mine)["x-ratelimit-remaining-requests"] == "2"


def test_so_many_at_once() -> None:
    limits, mine = Limits(Clock()), key(concurrency=2)
    assert [limits.enter(mine) for _ in range(2)] == [{}, {}]
    with pytest.raises(RequestError, match="2 requests in progress"):
        limits.enter(mine)
    limits.leave(mine)
    limits.enter(mine)
    limits.enter(Key(**{**key().model_dump(), "id": "11111111"}))


def test_limits_over_http(storage: Storage, host: ModelHost) -> None:
    keys = Keys(storage)
    app = create_app(host, hosts=None, keys=keys)
    _, token = keys.create("slow", ("generate",), rate=2)
    headers = {"authorization": f"Bearer {token}"}
    first = ask(app, "POST", "/v1/completions", BODY, headers=headers)
    assert (first.status_code, first.headers["x-ratelimit-remaining-requests"]) == (200, "1")
    refusal = ask(app, "POST", "/v1/completions", {**BODY, "n": 0}, headers=headers)
    assert (refusal.status_code, refusal.headers["x-ratelimit-limit-requests"]) == (400, "2")
    over = ask(app, "POST", "/v1/completions", BODY, headers=headers)
    assert refused(over, 429)["type"] == "rate_limit_error"
    assert 25 <= int(over.headers["retry-after"]) <= 30
    _, second = keys.create("slow", ("generate",), rate=2)  # the next one, before the first is revoked
    assert ask(app, "POST", "/v1/completions", BODY, headers={"authorization": f"Bearer {second}"}).status_code == 200


def test_a_stream_counts_until_its_last_byte_or_its_client_has_left(
    storage: Storage, host: ModelHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, has_left = batcher(host).step, threading.Event()

    def slow_step() -> bool:
        has_left.wait(0.01)  # else the whole text may be written before the next request arrives
        return step()

    monkeypatch.setattr(batcher(host), "step", slow_step)
    keys = Keys(storage)
    _, token = keys.create("narrow", ("generate",), concurrency=1)
    long = {**BODY, "max_tokens": 4000, "stream": True}

    async def both(url: str) -> list[int]:
        headers = {"authorization": f"Bearer {token}"}
        async with httpx.AsyncClient(headers=headers, base_url=url, timeout=30) as client:
            async with client.stream("POST", "/v1/completions", json=long) as stream:
                await anext(stream.aiter_lines())
                codes = [(await client.post("/v1/completions", json=BODY)).status_code]
            has_left.set()
            deadline = time.monotonic() + 10
            while (code := (await client.post("/v1/completions", json=BODY)).status_code) == 429:
                assert time.monotonic() < deadline
            whole = await client.post("/v1/completions", json={**BODY, "stream": True})
            return [*codes, code, whole.status_code]

    with served(create_app(host, hosts=None, keys=keys)) as url:
        assert asyncio.run(both(url)) == [429, 200, 200]


@pytest.mark.parametrize("limit", [{"rate": 0}, {"concurrency": -1}, {"rate": 10**9}])
def test_what_is_no_limit(storage: Storage, limit: dict[str, int]) -> None:
    with pytest.raises(Exception, match=f"{next(iter(limit))}: got .*, expected 1 to 1,000,000"):
        Keys(storage).create("k", ("generate",), **limit)


# More requests than fit


def test_twenty_times_too_much(host: ModelHost, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every response is correct or says when to try again; afterwards the server is as before."""
    bodies = [{**BODY, "seed": seed, "max_tokens": 1 + seed % 12} for seed in range(20)]
    right = [httpx.post(f"{url}/v1/completions", json=body).json()["choices"] for body in bodies]
    monkeypatch.setattr(batcher(host), "_max_waiting", 4)
    assert len(batcher(host)._slots) == 64

    async def flood() -> list[tuple[int, httpx.Response]]:
        limits = httpx.Limits(max_connections=400)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as client:

            async def one(index: int) -> tuple[int, httpx.Response]:
                return index % 20, await client.post("/v1/completions", json=bodies[index % 20])

            return await asyncio.gather(*(one(index) for index in range(400)))

    answers = asyncio.run(flood())
    assert {answer.status_code for _, answer in answers} == {200, 429}
    for index, answer in answers:
        if answer.status_code == 200:
            assert answer.json()["choices"] == right[index]
        else:
            assert refused(answer, 429)["code"] == "queue_full"
            assert answer.headers["retry-after"] == "1"
    monkeypatch.undo()
    asyncio.run(until_idle(host))
    for body, choices in zip(bodies, right, strict=True):
        assert httpx.post(f"{url}/v1/completions", json=body).json()["choices"] == choices


@pytest.mark.parametrize("clients", [100, pytest.param(1000, marks=pytest.mark.long)])
def test_clients_that_leave_hold_nothing(host: ModelHost, url: str, clients: int) -> None:
    """Clients disconnect before or during a stream, by closing or by a reset."""
    chance = random.Random(clients)
    address = url.removeprefix("http://").split(":")

    async def leave(at: int) -> None:
        reader, writer = await asyncio.open_connection(address[0], int(address[1]))
        body = json.dumps({**BODY, "max_tokens": 3000, "stream": chance.random() < 0.8}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {url[7:]}\r\nContent-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        writer.write(request[: chance.randint(1, len(request))] if chance.random() < 0.2 else request)
        await writer.drain()
        for _ in range(chance.randint(0, 3)):
            with contextlib.suppress(TimeoutError, ConnectionError):
                await asyncio.wait_for(reader.read(200), chance.uniform(0, 0.05))
        if chance.random() < 0.5:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()

    async def all_of_them() -> None:
        waiting = asyncio.Semaphore(20)

        async def one(at: int) -> None:
            async with waiting:
                await leave(at)

        await asyncio.gather(*(one(at) for at in range(clients)))
        await until_idle(host)

    asyncio.run(all_of_them())
    assert httpx.post(f"{url}/v1/completions", json=BODY).status_code == 200


def test_a_slow_reader_delays_no_other_client_and_gets_all(host: ModelHost, url: str) -> None:
    """The slow client reads little at a time, through a small window; other clients are answered meanwhile."""
    whole = httpx.post(f"{url}/v1/completions", json={**BODY, "seed": 1, "max_tokens": 3000}, timeout=60).json()

    def slow() -> str:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            host_name, port = url.removeprefix("http://").split(":")
            connection.connect((host_name, int(port)))
            body = json.dumps({**BODY, "seed": 1, "max_tokens": 3000, "stream": True}).encode()
            connection.sendall(
                f"POST /v1/completions HTTP/1.1\r\nHost: {url[7:]}\r\nConnection: close\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            parts = [connection.recv(256)]
            for _ in range(20):
                assert httpx.post(f"{url}/v1/completions", json=BODY).status_code == 200
                parts.append(connection.recv(256))
            while part := connection.recv(65536):
                parts.append(part)
            return b"".join(parts).decode()

    lines = [line.removeprefix("data: ") for line in slow().splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    text = "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])
    assert text == whole["choices"][0]["text"]


# Too large, before anything is allocated


def bomb(side: int) -> str:
    """Return a PNG file of a few hundred bytes whose header declares side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    file = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )
    return base64.b64encode(file).decode()


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {**BODY, "max_tokens": 4096, "n": 64}, "max_tokens"),
        ("completions", {**BODY, "best_of": 65}, "best_of"),
        ("completions", {**BODY, "prompt": "x" * 65_537}, "prompt"),
        ("completions", {**BODY, "prompt": "x" * 60_000, "echo": True, "logprobs": 1}, "echo"),
        ("completions", {**BODY, "stop": ["x" * 257]}, "stop[0]"),
        ("completions", {**BODY, "logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
        ("images/generations", {"model": "shapes", "n": 65}, "n"),
        ("images/generations", {"model": "shapes", "seed": list(range(65))}, "seed"),
        ("models/shapes/decode", {"latents": [[0.0] * 4] * 65}, "latents"),
        ("models/shapes/decode", {"latents": [[0.0] * 100_000]}, "latents[0]"),
        ("models/shapes/encode", {"images": [bomb(100_000)]}, "images[0]"),
        ("models/shapes/encode", {"images": [bomb(16)] * 65}, "images"),
        ("models/shapes/encode", {"images": [[[0.5] * 3000] * 300]}, "images[0]"),
        ("models/shapes/interpolate", {"start": 1, "end": 2, "steps": 65}, "steps"),
    ],
)
def test_too_large_is_refused_and_named(host: ModelHost, path: str, body: Any, param: str) -> None:
    error = refused(ask(create_app(host), "POST", f"/v1/{path}", body), 400)
    assert (error["param"] or "").startswith(param), error


def test_json_that_is_deep_or_has_endless_numbers_is_refused(host: ModelHost) -> None:
    app = create_app(host)
    deep = b'{"model": "shapes", "start": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    long = b'{"model": "play", "prompt": "x", "seed": ' + b"9" * 1_000_000 + b"}"
    assert refused(ask(app, "POST", "/v1/models/shapes/interpolate", deep), 400)
    assert refused(ask(app, "POST", "/v1/completions", long), 400)


def test_keys_without_limits_are_read_from_before_there_were_any(tmp_path: Path) -> None:
    storage = open_storage(tmp_path.as_uri())
    old, token = Keys(storage).create("old", ("generate",))
    document = json.loads(storage.get(f"keys/{old.id}.json")[0])
    del document["rate"], document["concurrency"]
    storage.put(f"keys/{old.id}.json", json.dumps(document).encode())
    stored = Keys(storage).check(token)
    assert stored is not None
    assert (stored.rate, stored.concurrency) == (None, None)
