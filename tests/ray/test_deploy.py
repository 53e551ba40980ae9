"""Test that the deployer declares the Serve application if it is missing, and leaves a running one alone."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.cluster import dashboard
from services.cluster.dashboard import Dashboard
from services.gateway import deploy
from services.gateway.pool_config import VARIABLE, read_pools


class Serve:
    """Act as Serve's REST API: each request returns the next of `states`; the test ends after the last one.

    A text is the status of all applications as they were declared last, by default from `POOLS`; "" means none.
    """

    class Over(BaseException):
        pass

    def __init__(self, *states: str | int | Callable[[], str] | None, answer: int = 200) -> None:
        self.states, self.answer = list(states), answer
        self.declared: list[dict[str, Any]] = []
        self.there = deploy.declaration("s3://bucket/a", "10.0.0.7", 8123, True, read_pools())
        self.dashboard = Dashboard("http://ray")
        self.dashboard.client = httpx.Client(base_url="http://ray", transport=httpx.MockTransport(self._answer))

    def keep(self) -> list[dict[str, Any]]:
        with pytest.raises(Serve.Over):
            deploy.keep_deployed(self.dashboard, "s3://bucket/a", "10.0.0.7", 8123, auth=True)
        return self.declared

    def _answer(self, request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/api/serve/applications/"
        if request.method == "PUT":
            self.declared.append(json.loads(request.content))
            if self.answer == 200:
                self.there = self.declared[-1]
            return httpx.Response(self.answer)
        if not self.states:
            raise Serve.Over
        state = self.states.pop(0)
        if callable(state):
            state = state()
        if state is None:
            raise httpx.ReadTimeout("no answer")
        if isinstance(state, int):
            return httpx.Response(state)
        applications = {
            application["name"]: {"status": state, "deployed_app_config": {**application, "runtime_env": {}}}
            for application in self.there["applications"]
        }
        return httpx.Response(200, json={"applications": applications if state else {}})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(deploy, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(dashboard, "SILENCE_SECONDS", 0.0)


@pytest.fixture
def pools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file of the pools, with two pools."""
    path = tmp_path / "pools.yaml"
    path.write_text("pools: [{name: default}, {name: gpu, gpus: 0.5, min_replicas: 0}]")
    monkeypatch.setenv(VARIABLE, str(path))
    return path


def by_name(declared: dict[str, Any]) -> dict[str, Any]:
    return {application["name"]: application for application in declared["applications"]}


def test_what_is_declared(pools: Path) -> None:
    [declared] = Serve(None, "", "DEPLOYING", "RUNNING", "RUNNING").keep()
    assert declared["http_options"]["host"] == "10.0.0.7"
    assert declared["http_options"]["port"] == 8123
    applications = by_name(declared)
    assert list(applications) == ["genmodels", "genmodels-default", "genmodels-gpu"]
    assert applications["genmodels"]["args"] == {"storage_url": "s3://bucket/a", "auth": True}
    assert applications["genmodels-gpu"]["args"]["pool"]["gpus"] == 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing Ray Serve defines settings in ways that pydantic warns of
        from services.gateway import app
    built = (app.gateway, app.hosts, app.hosts)
    paths = [application["import_path"] for application in applications.values()]
    assert paths == [f"{function.__module__}:{function.__name__}" for function in built]


def test_a_changed_pool_changes_no_argument_of_the_others(pools: Path) -> None:
    """Serve restarts the replicas of an application if its arguments change; `user_config` changes no replica."""

    def change() -> str:
        pools.write_text("pools: [{name: default}, {name: gpu, gpus: 1}, {name: more}]")
        return "RUNNING"

    serve = Serve("RUNNING", change, "RUNNING", "DEPLOYING", "RUNNING")
    before = by_name(serve.there)
    [declared] = serve.keep()
    after = by_name(declared)
    assert after["genmodels-default"] == before["genmodels-default"]
    assert after["genmodels-gpu"]["args"] != before["genmodels-gpu"]["args"]
    assert "genmodels-more" in after
    gateways = [applications["genmodels"] for applications in (before, after)]
    assert gateways[0]["deployments"] != gateways[1]["deployments"]
    assert [{**gateway, "deployments": None} for gateway in gateways] == [{**gateways[0], "deployments": None}] * 2


def test_a_pool_that_is_no_longer_in_the_file_is_taken_down(pools: Path) -> None:
    serve = Serve("RUNNING", "RUNNING")
    pools.write_text("pools: [{name: default}]")
    [declared] = serve.keep()
    assert list(by_name(declared)) == ["genmodels", "genmodels-default"]


def test_a_file_that_is_damaged_later_changes_nothing(pools: Path) -> None:
    def damage() -> str:
        pools.write_text("pools: [")
        return "RUNNING"

    assert Serve("RUNNING", damage, "RUNNING", "RUNNING").keep() == []


@pytest.mark.parametrize("state", ["RUNNING", "DEPLOYING", "UNHEALTHY", "DELETING", None, 500, 401])
def test_what_is_there_or_unknown_is_left_alone(state: str | int | None) -> None:
    assert Serve(state, state).keep() == []


def test_it_is_declared_again_after_a_restart_of_ray_or_a_failure() -> None:
    assert len(Serve("", "RUNNING", None, None, "", "RUNNING", "DEPLOY_FAILED", "RUNNING").keep()) == 3


def test_a_declaration_that_is_not_taken_is_repeated() -> None:
    assert len(Serve("", "", "RUNNING", answer=500).keep()) == 2


def test_ray_takes_the_declaration(ray_cluster: str) -> None:
    """Validate the declaration with Serve's own schema."""
    from ray.serve.schema import ServeDeploySchema

    declared = deploy.declaration("s3://bucket/a", "127.0.0.1", 8123, True, read_pools())
    schema = ServeDeploySchema.model_validate(declared)
    assert schema.http_options.port == 8123
    assert schema.applications[0].args == {"storage_url": "s3://bucket/a", "auth": True}
