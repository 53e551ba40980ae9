"""Test that requests go to the pool of their model, and how they wait for the first host of a pool."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest

from genmodels.errors import ModelNotFound, RequestError
from genmodels.metrics import POOL_WAITING
from genmodels.registry.catalogue import CatalogueReader
from services.gateway import cold_start
from services.gateway.pool_config import Pool, Pools
from services.gateway.pool_routing import PoolRouting
from tests.support.metric_values import value
from tests.support.storages import MemoryStorage

ZERO = Pool(name="gpu", min_replicas=0, max_replicas=2, wait_seconds=30, max_waiting=2)
NAMES = {"big": "gpu", "old": "gone"}


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a gateway know from the beginning which hosts run."""
    monkeypatch.setattr(cold_start, "SETTLE_SECONDS", 0.0)


class FakeHosts:
    """Act as the hosts of a pool; without a running one, calls wait as Serve lets them wait."""

    def __init__(self, name: str, running: bool = True) -> None:
        self.name, self.running, self.problem = name, asyncio.Event(), None
        self.asked: list[str] = []
        self.closed = 0
        if running:
            self.running.set()

    def is_running(self) -> bool:
        return self.running.is_set()

    async def wake(self) -> None:
        self.asked.append("wake")
        await self.running.wait()

    async def health(self) -> str | None:
        self.asked.append("health")
        return self.problem

    async def vocabulary(self, name: str) -> Any:
        assert self.is_running(), "a request must not reach a pool without hosts"
        return f"{name} of {self.name}"

    model = contract = vocabulary

    async def answer(self, name: str, request: Any) -> Any:
        return await self.vocabulary(name)

    async def history(self, name: str, points: int) -> Any:
        return await self.vocabulary(name)

    async def sample(self, name: str, step: int, file: str) -> Any:
        return await self.vocabulary(name)

    async def complete(self, name: str, request: Any) -> AsyncGenerator[Any, None]:
        try:
            for number in range(3):
                yield f"{await self.vocabulary(name)}: {number}"
        finally:
            self.closed += 1


class FakeModels:
    """Act as the catalogue."""

    reader = CatalogueReader(MemoryStorage())
    problem: str | None = None

    def pool_of(self, name: str) -> str:
        return NAMES.get(name, "default")

    def describe(self, name: str) -> None:
        """Return None: the catalogue does not have the version."""

    def check(self, name: str) -> None:
        if name == "none":
            raise ModelNotFound("no model 'none'")

    def evaluation(self, model: str, version: int) -> None:
        raise AssertionError("no evaluation is read for a version that the catalogue does not have")

    def stalled(self) -> str | None:
        return self.problem


class Endpoint:
    """A routing to `default`, with a host, and `gpu`, which has none yet."""

    def __init__(self, gpu: Pool = ZERO) -> None:
        self.hosts: dict[str, Any] = {"default": FakeHosts("default"), "gpu": FakeHosts("gpu", running=False)}
        self.models = FakeModels()
        self.routing = PoolRouting(self.models, self.hosts.__getitem__)
        self.routing.configure(Pools(pools=[Pool(name="default"), gpu]))

    async def refused(self, call: Awaitable[Any]) -> RequestError:
        error = await call
        assert isinstance(error, RequestError)
        return error


def run(test: Callable[[Endpoint], Awaitable[None]], gpu: Pool = ZERO) -> None:
    async def whole() -> None:
        async with asyncio.timeout(60):
            await test(Endpoint(gpu))

    asyncio.run(whole())


def test_every_call_goes_to_the_pool_of_its_model() -> None:
    async def test(endpoint: Endpoint) -> None:
        endpoint.hosts["gpu"].running.set()
        anything: Any = None
        for name, pool in (("big", "gpu"), ("small", "default")):
            routing = endpoint.routing
            calls = [
                routing.model(name),
                routing.contract(name),
                routing.vocabulary(name),
                routing.answer(name, anything),
            ]
            assert {await call for call in calls} == {f"{name} of {pool}"}
            assert [item async for item in routing.complete(name, anything)] == [
                f"{name} of {pool}: {n}" for n in range(3)
            ]
        assert await endpoint.routing.history("big", 9) == "big of default", "curves start no host with a GPU"
        assert await endpoint.routing.sample("big", 1, "x") == "big of default"

    run(test)


def test_a_pool_that_is_no_longer_configured_is_named() -> None:
    async def test(endpoint: Endpoint) -> None:
        error = await endpoint.refused(endpoint.routing.vocabulary("old"))
        assert (error.status, error.code) == (503, "pool_missing")
        assert "the pool 'gone'" in error.message
        (item,) = [item async for item in endpoint.routing.complete("old", None)]
        assert isinstance(item, RequestError)

    run(test)


def test_some_requests_wait_for_the_first_host_and_others_are_refused() -> None:
    async def test(endpoint: Endpoint) -> None:
        waiting = [asyncio.ensure_future(endpoint.routing.vocabulary("big")) for _ in range(5)]
        refused = [await endpoint.refused(call) for call in waiting[2:]]
        assert {(error.status, error.code, error.retry_after) for error in refused} == {(429, "pool_starting", 5)}
        assert value(POOL_WAITING, "gpu") == 2
        assert await endpoint.routing.vocabulary("small") == "small of default"
        endpoint.hosts["gpu"].running.set()
        assert [await call for call in waiting[:2]] == ["big of gpu"] * 2
        assert value(POOL_WAITING, "gpu") == 0
        assert [await endpoint.routing.vocabulary("big") for _ in range(9)] == ["big of gpu"] * 9
        assert endpoint.hosts["gpu"].asked == ["wake", "wake"]

    run(test)


def test_a_gateway_that_has_just_started_refuses_no_request_to_a_pool_that_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Serve tells a new gateway a moment later which hosts run."""
    monkeypatch.setattr(cold_start, "SETTLE_SECONDS", 60.0)

    async def test(endpoint: Endpoint) -> None:
        waiting = [asyncio.ensure_future(endpoint.routing.vocabulary("big")) for _ in range(9)]
        while value(POOL_WAITING, "gpu") < 2:
            await asyncio.sleep(0)
        endpoint.hosts["gpu"].running.set()
        assert [await call for call in waiting] == ["big of gpu"] * 9

    run(test)


def test_a_name_without_a_model_wakes_no_pool() -> None:
    async def test(endpoint: Endpoint) -> None:
        hosts = endpoint.hosts["default"] = FakeHosts("default", running=False)
        endpoint.routing = PoolRouting(endpoint.models, endpoint.hosts.__getitem__)
        endpoint.routing.configure(Pools(pools=[ZERO.model_copy(update={"name": "default"})]))
        anything: Any = None
        for call in (
            endpoint.routing.model("none"),
            endpoint.routing.contract("none"),
            endpoint.routing.answer("none", anything),
            endpoint.routing.history("none", 9),
            endpoint.routing.sample("none", 1, "x"),
        ):
            assert isinstance(await endpoint.refused(call), ModelNotFound)
        (item,) = [item async for item in endpoint.routing.complete("none", anything)]
        assert isinstance(item, ModelNotFound)
        assert hosts.asked == []

    run(test)


def test_the_wait_is_bounded_and_the_next_request_may_wait_again() -> None:
    async def test(endpoint: Endpoint) -> None:
        for _ in range(3):
            error = await endpoint.refused(endpoint.routing.vocabulary("big"))
            assert (error.status, error.code) == (503, "pool_starting")
            assert "in 0.01 s" in error.message

    run(test, ZERO.model_copy(update={"wait_seconds": 0.01, "max_waiting": 1}))


def test_a_client_that_leaves_makes_room() -> None:
    async def test(endpoint: Endpoint) -> None:
        for _ in range(5):
            request = asyncio.ensure_future(endpoint.routing.vocabulary("big"))
            while not value(POOL_WAITING, "gpu"):
                await asyncio.sleep(0)
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
        assert value(POOL_WAITING, "gpu") == 0

    run(test)


def test_a_stream_that_a_client_leaves_is_closed_at_once() -> None:
    async def test(endpoint: Endpoint) -> None:
        stream = endpoint.routing.complete("small", None)
        await anext(stream)
        await stream.aclose()
        assert endpoint.hosts["default"].closed == 1

    run(test)


def test_readiness_wakes_no_pool() -> None:
    async def test(endpoint: Endpoint) -> None:
        assert await endpoint.routing.health() is None
        endpoint.hosts["gpu"].running.set()  # a call would also keep its last host from stopping
        endpoint.hosts["default"].problem = "stalled"
        assert await endpoint.routing.health() == "stalled"
        assert endpoint.hosts["gpu"].asked == []
        endpoint.models.problem = "the catalogue is old"
        assert await endpoint.routing.health() == "the catalogue is old"

    run(test)


def test_a_changed_file_leaves_the_requests_of_other_pools_waiting() -> None:
    async def test(endpoint: Endpoint) -> None:
        request = asyncio.ensure_future(endpoint.routing.vocabulary("big"))
        await asyncio.sleep(0)
        endpoint.hosts["more"] = FakeHosts("more")
        NAMES["huge"] = "more"
        endpoint.routing.configure(Pools(pools=[Pool(name="default", slots=4), ZERO, Pool(name="more")]))
        assert await endpoint.routing.vocabulary("huge") == "huge of more"
        endpoint.hosts["gpu"].running.set()
        assert await request == "big of gpu"
        endpoint.routing.configure(Pools(pools=[Pool(name="default")]))
        assert (await endpoint.refused(endpoint.routing.vocabulary("big"))).code == "pool_missing"

    run(test)
