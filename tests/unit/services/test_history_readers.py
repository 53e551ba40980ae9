"""Test how many histories are read at once, and what happens if their clients leave."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from starlette.requests import ClientDisconnect

from genmodels.engine.history import History
from genmodels.keys import Keys
from genmodels.runs import metric_rows, thinning
from genmodels.runs.store import Run
from genmodels.storage import Storage
from services.gateway import history as gateway_history
from services.gateway.model_host import ModelHost
from services.gateway.routes import create_app as create_gateway
from services.http.app import cancel_on_disconnect
from services.jobs import routes
from services.jobs.app import create_app
from tests.support.asgi_server import served
from tests.support.job_service import Service
from tests.support.published_models import publish
from tests.support.run_parts import write_metrics

PARTS = 8


class Gate:
    """Replace `read_part`: each call is counted, and waits for `let`."""

    def __init__(self, read_part: Callable[..., Iterator[Any]]) -> None:
        self.begun, self.let, self._read_part = 0, threading.Event(), read_part

    def __call__(self, *arguments: Any) -> Iterator[Any]:
        self.begun += 1
        assert self.let.wait(30)
        return self._read_part(*arguments)


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Let one call read one part."""
    gate = Gate(metric_rows.read_part)
    for module in (metric_rows, thinning):
        monkeypatch.setattr(module, "read_part", gate)
    monkeypatch.setattr(thinning, "SLICE_SECONDS", -1.0)
    return gate


def long_run(storage: Storage, job: str, model: str) -> None:
    run = Run(storage, job, model)
    run.start_attempt(1, None, 1)
    for first in range(1, 10 * PARTS, 10):
        write_metrics(run, 1, [{"step": step, "loss": 1.0} for step in range(first, first + 10)])


@pytest.mark.parametrize("query", ["?points=10", ""])
def test_readers_of_metrics_are_bounded_by_key(file_storage: Storage, gate: Gate, query: str) -> None:
    job, keys = Service(file_storage).submit("long"), Keys(file_storage)
    long_run(file_storage, job, "long")
    mine, other = ({"authorization": f"Bearer {keys.create(name, ('submit',))[1]}"} for name in ("mine", "other"))
    most = routes.HISTORIES[1]

    async def play(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:

            def read(key: dict[str, str]) -> asyncio.Task[httpx.Response]:
                return asyncio.create_task(client.get(f"/v1/jobs/{job}/metrics{query}", headers=key))

            requests = [read(mine) for _ in range(most + 5)]
            await until(lambda: sum(request.done() for request in requests) == 5)
            refused = [request.result() for request in requests if request.done()]
            assert {(answer.status_code, answer.headers["retry-after"]) for answer in refused} == {(429, "1")}
            requests.append(read(other))
            assert (await client.get(f"/v1/jobs/{job}", headers=mine)).status_code == 200
            gate.let.set()
            answers = await asyncio.gather(*requests)
            assert [answer.status_code for answer in answers].count(200) == most + 1
            assert len({answer.text for answer in answers if answer.status_code == 200}) == 1
            assert (await read(mine)).status_code == 200  # the places are free again

    with served(create_app(file_storage, keys=keys, hosts=None)) as url:
        asyncio.run(play(url))
    if query:
        assert gate.begun == PARTS  # one read for all


def test_metrics_are_not_read_on_for_a_client_that_left(
    file_storage: Storage, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, left = Service(file_storage).submit("long"), []
    long_run(file_storage, job, "long")

    async def noting(*arguments: Any) -> Any:
        try:
            return await cancel_on_disconnect(*arguments)
        except ClientDisconnect:
            left.append(1)
            raise

    monkeypatch.setattr(routes, "cancel_on_disconnect", noting)

    async def play(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            requests = [
                asyncio.create_task(client.get(f"/v1/jobs/{job}/metrics?points={10 + number}")) for number in range(8)
            ]
            await until(lambda: gate.begun == routes.HISTORY_THREADS)
        await asyncio.gather(*(request for request in requests if request.cancel()), return_exceptions=True)
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            await until(lambda: len(left) == 8)
            gate.let.set()
            await client.get(f"/v1/jobs/{job}/metrics?points=500")

    with served(create_app(file_storage, keys=None, hosts=None)) as url:
        asyncio.run(play(url))
    assert gate.begun == routes.HISTORY_THREADS + PARTS


def test_a_model_host_does_not_read_on_for_a_client_that_left(file_storage: Storage, gate: Gate) -> None:
    version = publish(file_storage, "long", "vae")
    long_run(file_storage, version.job, "long")
    host = ModelHost(file_storage.url)

    async def play() -> None:
        request = asyncio.create_task(host.history("long", 10))
        await until(lambda: gate.begun == 1)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        gate.let.set()
        answer = await host.history("long", 10)
        assert isinstance(answer, History)
        assert [answer.rows[0]["step"], answer.rows[-1]["step"]] == [1, 10 * PARTS]

    asyncio.run(play())
    assert gate.begun == PARTS  # the second reader went on where the first one had stopped


class SlowPool:
    """A pool whose histories wait for `let`."""

    def __init__(self) -> None:
        self.begun, self.left, self.let = 0, 0, threading.Event()

    async def history(self, name: str, points: int) -> History:
        self.begun += 1
        try:
            await until(self.let.is_set)
        except asyncio.CancelledError:
            self.left += 1
            raise
        return History(f"{name}@1", "vae", "job-00000000", 1, [{"step": 1}], {})


def test_histories_of_the_gateway_are_bounded_by_key() -> None:
    pool, most = SlowPool(), gateway_history.HISTORIES[1]

    async def play(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            requests = [asyncio.create_task(client.get("/v1/models/m/history")) for _ in range(most + 3)]
            await until(lambda: sum(request.done() for request in requests) == 3)
            refused = [request.result() for request in requests if request.done()]
            assert {(answer.status_code, answer.headers["retry-after"]) for answer in refused} == {(429, "1")}
        for request in requests:
            request.cancel()
        await until(lambda: pool.left == most)
        pool.let.set()
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            assert (await client.get("/v1/models/m/history")).status_code == 200

    with served(create_gateway(pool)) as url:
        asyncio.run(play(url))
