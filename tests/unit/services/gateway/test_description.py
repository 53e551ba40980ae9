"""Test `GET /v1/models/{model}` of the gateway: from the catalogue, without waking a pool that was scaled to zero."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from genmodels.engine.alias_watcher import Refused
from genmodels.errors import RequestError
from genmodels.family import EvaluationMetric, EvaluationResult
from genmodels.registry.store import Registry
from services.gateway import pool_routing, watched_catalogue
from services.gateway.pool_config import Pool, Pools
from services.gateway.pool_routing import PoolRouting
from services.gateway.routes import create_app
from services.gateway.watched_catalogue import WatchedCatalogue
from tests.support.asgi_client import ask, refused
from tests.support.counting_storage import CountingStorage
from tests.support.published_models import publish

ZERO = Pool(name="gpu", min_replicas=0, max_replicas=2, wait_seconds=0.01)


class Hosts:
    """Act as the hosts of a pool: only what a description may ask."""

    def __init__(self) -> None:
        self.running, self.asked = False, []
        self.answer: Any = None
        self.cancelled = False

    def is_running(self) -> bool:
        return self.running

    async def wake(self) -> None:
        self.asked.append("wake")
        await asyncio.Event().wait()

    async def model(self, name: str) -> Any:
        assert self.running, "a call to a pool without hosts wakes it"
        self.asked.append(name)
        try:
            return self.answer or await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise


class Endpoint:
    """Three versions of `m` for the pool `gpu`: the first has no alias, and the third is the latest."""

    def __init__(self) -> None:
        self.storage, self.hosts = CountingStorage(), Hosts()
        for step, alias in ((1, None), (2, "production"), (3, None)):
            publish(self.storage, "m", "vae", step=step, alias=alias, pool="gpu")
        registry = Registry(self.storage)
        metrics = {"fid": EvaluationMetric(value=2.5, unit="", baselines={"noise": 9.0})}
        result = EvaluationResult(metrics=metrics, notes={"validation_examples": 99})
        registry.record_evaluation(registry.version("m", 2), result, thorough=False, seconds=1.0)
        self.catalogue = WatchedCatalogue(self.storage)
        self.routing = PoolRouting(self.catalogue, lambda name: self.hosts)
        self.set_pools(ZERO)
        self.app = create_app(self.routing)

    def set_pools(self, *others: Pool) -> None:
        self.routing.configure(Pools(pools=[Pool(name="default"), *others]))

    def show(self, name: str) -> dict[str, Any]:
        response = ask(self.app, "GET", f"/v1/models/{name}")
        assert response.status_code == 200, response.text
        return response.json()


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Endpoint:
    monkeypatch.setattr(watched_catalogue, "READ_SECONDS", 3600)
    monkeypatch.setattr(pool_routing, "HOST_SECONDS", 0.01)
    return Endpoint()


def test_a_pool_without_hosts_is_not_woken(endpoint: Endpoint) -> None:
    endpoint.storage.forget()
    shown = endpoint.show("m")
    assert (shown["version"], shown["aliases"], shown["kind"]) == (2, {"production": 2}, "image")
    assert "generate" in shown["verbs"]
    assert shown.items() >= endpoint.catalogue.reader.get("m").versions[2].serving.sizes.items()
    assert shown["metrics"] == {"val_loss": 1.5, "odd": None}
    assert shown["evaluation"]["metrics"]["fid"] == {"value": 2.5, "unit": "", "baselines": {"noise": 9.0}}
    assert not {"problem", "refused"} & shown.keys()
    assert endpoint.storage.counts == {"list models": 1, "get models": 1}, "its evaluation alone"
    assert endpoint.show("m@latest")["version"] == endpoint.show("m@3")["version"] == 3
    assert endpoint.hosts.asked == []


def test_a_running_host_tells_what_it_refuses(endpoint: Endpoint) -> None:
    known = endpoint.catalogue.describe("m")
    assert known
    endpoint.hosts.running = True
    endpoint.hosts.answer = replace(known, refused={"production": Refused("too slow", known.resolved)})
    assert endpoint.show("m")["refused"] == [{"alias": "production", "version": 2, "reason": "too slow"}]
    endpoint.hosts.answer = RequestError("damaged", status=503, code="version_damaged")
    assert refused(ask(endpoint.app, "GET", "/v1/models/m"), 503)["code"] == "version_damaged"
    assert endpoint.hosts.asked == ["m", "m"]


def test_a_host_that_does_not_answer_is_not_waited_for(endpoint: Endpoint) -> None:
    endpoint.hosts.running = True
    assert endpoint.show("m")["version"] == 2
    assert endpoint.hosts.cancelled
    endpoint.hosts.answer = RequestError("gone", status=503, code="host_lost")
    assert endpoint.show("m")["version"] == 2


def test_a_missing_pool_is_the_problem_of_its_models(endpoint: Endpoint) -> None:
    endpoint.set_pools()
    shown = endpoint.show("m")
    assert "the pool 'gpu', which the endpoint does not have" in shown["problem"]
    assert shown["version"] == 2


def test_a_version_that_the_catalogue_does_not_have_needs_a_host(endpoint: Endpoint) -> None:
    assert refused(ask(endpoint.app, "GET", "/v1/models/m@1"), 503)["code"] == "pool_starting"
    assert endpoint.hosts.asked == ["wake"]
