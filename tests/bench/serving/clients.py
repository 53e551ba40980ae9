"""Clients over HTTP. They share the machine with the server that they measure, so those of text are plain sockets."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field

import httpx

from genmodels.registry.store import Registry
from genmodels.storage import Storage
from tests.bench.serving.text import SIXTEEN


@dataclass
class Stream:
    """The figures of streamed texts: tokens per second, seconds to the first characters and between later ones."""

    rate: float = 0.0
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


async def text(url: str, streams: int, tokens: int, batches: int = 1) -> Stream:
    """Read `streams` texts at once, `batches` times."""
    host, port = url.removeprefix("http://").split(":")
    content = json.dumps({"model": "play", "prompt": SIXTEEN, "max_tokens": tokens, "seed": 1, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    sent = f"{head}Connection: close\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content
    figures = Stream()

    async def one() -> None:
        before, received, is_first = time.perf_counter(), b"", True
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(sent)
        while part := await reader.read(65536):
            received += part
            if b'"text":' in part:
                now = time.perf_counter()
                (figures.first if is_first else figures.gaps).append(now - before)
                before, is_first = now, False
        writer.close()
        assert b"[DONE]" in received, received[:500]

    started = time.perf_counter()
    for _ in range(batches):
        await asyncio.gather(*(one() for _ in range(streams)))
    figures.rate = batches * streams * tokens / (time.perf_counter() - started)
    return figures


async def empty(url: str, times: int) -> list[float]:
    """Return the seconds of requests that compute nothing."""
    seconds = []
    async with httpx.AsyncClient() as client:
        for _ in range(times):
            started = time.perf_counter()
            (await client.get(f"{url}/healthz")).raise_for_status()
            seconds.append(time.perf_counter() - started)
    return seconds


async def refusals(url: str, times: int) -> list[float]:
    """Return the seconds to a refusal, at most `times`, while all slots and all places in the queue are taken."""
    body = {"model": "play", "prompt": SIXTEEN, "max_tokens": 256, "n": 64, "seed": 1}
    seconds: list[float] = []
    async with httpx.AsyncClient(timeout=120) as client:

        async def ask() -> bool:
            started = time.perf_counter()
            answer = await client.post(f"{url}/v1/completions", json=body)
            if answer.status_code == 429:
                seconds.append(time.perf_counter() - started)
            return answer.status_code == 429

        taken: list[asyncio.Task[bool]] = []
        while not any(task.done() for task in taken):  # the last one finds no place
            taken.append(asyncio.create_task(ask()))
            await asyncio.wait(taken[-1:], timeout=0.3)
        held = [task for task in taken if not task.done()]
        while held and len(seconds) < times and not any(task.done() for task in held):
            await ask()
        await asyncio.gather(*taken)
    return seconds


async def swaps(url: str, storage: Storage, count: int, seconds: float) -> list[float]:
    """Return the seconds of requests while their alias moves `count` times; none may fail."""
    body = {"model": "shapes", "prompt": "", "n": 8, "seed": 1}
    taken: list[float] = []
    until = time.perf_counter() + seconds

    async def one(client: httpx.AsyncClient) -> None:
        while time.perf_counter() < until:
            started = time.perf_counter()
            (await client.post(f"{url}/v1/images/generations", json=body)).raise_for_status()
            taken.append(time.perf_counter() - started)

    async def move() -> None:
        for number in range(count):
            await asyncio.to_thread(Registry(storage).promote, "shapes", "production", 2 - number % 2, "a swap")
            await asyncio.sleep(seconds / count)

    async with httpx.AsyncClient(timeout=60) as client:
        await asyncio.gather(one(client), one(client), move())
    return taken


async def images(url: str, pictures: int, requests: int) -> float:
    """Return the images per second of requests that are sent at once."""
    body = {"model": "shapes", "prompt": "", "n": pictures, "seed": 1}
    async with httpx.AsyncClient(timeout=60) as client:
        started = time.perf_counter()
        posts = (client.post(f"{url}/v1/images/generations", json=body) for _ in range(requests))
        answers = await asyncio.gather(*posts)
        seconds = time.perf_counter() - started
    assert all(len(answer.json()["data"]) == pictures for answer in answers)
    return requests * pictures / seconds
