"""Test that the deployer declares the Serve application if it is missing, and leaves a running one alone."""

from __future__ import annotations

import json
import warnings
from typing import Any

import httpx
import pytest

from services.cluster import dashboard
from services.cluster.dashboard import Dashboard
from services.gateway import deploy


class Serve:
    """Act as Serve's REST API: each request returns the next of `states`; the test ends after the last one."""

    class Over(BaseException):
        pass

    def __init__(self, *states: str | int | None, answer: int = 200) -> None:
        self.states, self.answer = list(states), answer
        self.declared: list[dict[str, Any]] = []
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
            return httpx.Response(self.answer)
        if not self.states:
            raise Serve.Over
        state = self.states.pop(0)
        if state is None:
            raise httpx.ReadTimeout("no answer")
        if isinstance(state, int):
            return httpx.Response(state)
        return httpx.Response(200, json={"applications": {deploy.APPLICATION: {"status": state}} if state else {}})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(deploy, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(dashboard, "SILENCE_SECONDS", 0.0)


def test_what_is_declared() -> None:
    [declared] = Serve(None, "", "DEPLOYING", "RUNNING", "RUNNING").keep()
    assert declared["http_options"]["host"] == "10.0.0.7"
    assert declared["http_options"]["port"] == 8123
    [application] = declared["applications"]
    assert application["args"] == {"storage_url": "s3://bucket/a", "auth": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing Ray Serve defines settings in ways that pydantic warns of
        from services.gateway import app
    assert application["import_path"] == f"{app.application.__module__}:{app.application.__name__}"


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

    schema = ServeDeploySchema.model_validate(deploy.declaration("s3://bucket/a", "127.0.0.1", 8123, True))
    assert schema.http_options.port == 8123
    assert schema.applications[0].args == {"storage_url": "s3://bucket/a", "auth": True}
