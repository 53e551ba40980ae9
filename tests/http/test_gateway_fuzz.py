"""Fuzz the gateway: every request gets an answer or a 4xx in our format, never a 5xx."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from genmodels.storage import open_storage
from services.gateway.model_host import ModelHost
from services.gateway.routes import create_app
from tests.support.published_models import publish

OPERATIONS = 13
NAMES = ["play", "shapes", "clean", "play@1", "shapes@latest", "shapes@live", "shapes@step-1", "play@x:step-1"]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Any:
    storage = open_storage(tmp_path_factory.mktemp("models").as_uri())
    for name, family in (("play", "minigpt"), ("shapes", "vae"), ("clean", "autoencoder")):
        publish(storage, name, family)
    return create_app(ModelHost(storage.url), hosts=None)


@pytest.mark.parametrize("n", [40, pytest.param(1000, marks=pytest.mark.long)])
@pytest.mark.parametrize("number", range(OPERATIONS))
def test_every_route(app: Any, number: int, n: int) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == OPERATIONS
    operation = operations[number]

    @settings(max_examples=n, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy() | operation.as_strategy(GenerationMode.NEGATIVE), st.data())
    def run(case: Any, data: st.DataObject) -> None:
        if "model" in (case.path_parameters or {}) and data.draw(st.booleans()):
            case.path_parameters["model"] = data.draw(st.sampled_from(NAMES))
        if isinstance(case.body, dict) and "model" in case.body and data.draw(st.booleans()):
            case.body["model"] = data.draw(st.sampled_from(NAMES))
        response = case.call()
        case.validate_response(
            response, checks=(not_a_server_error, content_type_conformance, response_schema_conformance)
        )
        if response.status_code >= 400:
            assert set(response.json()) == {"error"}
            assert "Traceback" not in response.json()["error"]["message"]

    run()
