"""Test that the gateway checks verbs and options of requests: an invalid request does not reach a model host."""

from __future__ import annotations

from typing import Any

import pytest

from genmodels.engine.image.answers import ImageAnswer
from genmodels.engine.model import Contract
from genmodels.errors import ModelNotFound, RequestError
from genmodels.models.vae import VAE
from genmodels.nn.sampling import SamplingOptions
from genmodels.registry.catalogue import CatalogueReader
from services.gateway import contracts
from services.gateway.routes import create_app
from tests.support.asgi_client import ask, refused
from tests.support.published_models import publish
from tests.support.storages import MemoryStorage

CONTRACTS = {
    "play": Contract("play@1", "minigpt", frozenset({"complete"}), SamplingOptions),
    "shapes": Contract("shapes@2", "vae", frozenset({"generate", "decode"}), VAE.Request),
}


class Pool:
    """Record the names of the calls that reach the pool."""

    def __init__(self) -> None:
        self.catalogue = CatalogueReader(MemoryStorage())
        self.calls: list[str] = []
        self.error: RequestError | None = None

    async def contract(self, name: str) -> Contract | RequestError:
        self.calls.append("contract")
        return self.error or CONTRACTS.get(name) or ModelNotFound(f"there is no model {name!r}")

    async def answer(self, name: str, request: Any) -> ImageAnswer:
        self.calls.append("answer")
        return ImageAnswer("shapes@2", "vae", (b"PNG",), seed=1)

    async def complete(self, name: str, request: Any) -> Any:
        self.calls.append("complete")
        yield RequestError("busy", status=429, code="queue_full")


@pytest.fixture
def pool() -> Pool:
    return Pool()


@pytest.fixture
def app(pool: Pool) -> Any:
    return create_app(pool)


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/completions", {"model": "play", "prompt": "x", "temperatur": 1}, 400, "temperatur"),
        ("/v1/completions", {"model": "play", "prompt": "x", "temperature": -1}, 400, "temperature"),
        ("/v1/completions", {"model": "shapes", "prompt": "x"}, 404, "model"),
        ("/v1/images/generations", {"model": "shapes", "prompt": "", "top_k": 1}, 400, "top_k"),
        ("/v1/images/generations", {"model": "play", "prompt": ""}, 404, "model"),
        ("/v1/models/shapes/decode", {"latents": [[0.0]], "temperature": "hot"}, 400, "temperature"),
        ("/v1/models/shapes/denoise", {"images": [[[0.0]]]}, 404, "model"),
        ("/v1/models/other/decode", {"latents": [[0.0]]}, 404, "model"),
    ],
)
def test_a_wrong_request_does_not_reach_a_host(
    app: Any, pool: Pool, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    assert refused(ask(app, "POST", path, body), status)["param"] == param
    assert pool.calls == ["contract"]


@pytest.mark.parametrize("name", ["shapes", "shapes@next", "shapes@latest", "shapes@3", "shapes@1"])
def test_the_catalogue_tells_contracts_without_a_call_to_a_host(app: Any, pool: Pool, name: str) -> None:
    storage = MemoryStorage()
    for step, alias in ((1, "production"), (2, "next"), (3, None)):
        publish(storage, "shapes", "gan", step=step, alias=alias)
    pool.catalogue = CatalogueReader(storage)
    pool.catalogue.refresh()
    for body, status in (({"top_k": 1}, 400), ({}, 200)):
        assert ask(app, "POST", "/v1/images/generations", {"model": name, "prompt": "", **body}).status_code == status
    error = refused(ask(app, "POST", "/v1/models/shapes/encode", {"images": [[[0.0]]]}), 404)
    assert error["message"] == "shapes@1 (gan) has no 'encode'; it answers: decode, generate, interpolate"
    assert pool.calls == ["answer"]


def test_an_older_version_is_checked_by_a_host(app: Any, pool: Pool) -> None:
    storage = MemoryStorage()
    for step in (1, 2, 3):
        publish(storage, "shapes", "gan", step=step)
    pool.catalogue = CatalogueReader(storage)
    pool.catalogue.refresh()
    refused(ask(app, "POST", "/v1/images/generations", {"model": "shapes@1", "prompt": ""}), 404)
    assert pool.calls == ["contract"]


def test_a_contract_is_read_once_while_it_is_fresh(app: Any, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"model": "shapes", "prompt": ""}
    for _ in range(3):
        assert ask(app, "POST", "/v1/images/generations", body).status_code == 200
    assert pool.calls == ["contract", "answer", "answer", "answer"]
    monkeypatch.setattr(contracts, "CONTRACT_TTL_SECONDS", 0.0)
    assert ask(app, "POST", "/v1/images/generations", body).status_code == 200
    assert pool.calls[4:] == ["contract", "answer"]


def test_a_failed_read_is_tried_again(app: Any, pool: Pool) -> None:
    body = {"model": "shapes", "prompt": ""}
    pool.error = RequestError("the model host is gone", status=503, code="host_lost")
    assert refused(ask(app, "POST", "/v1/images/generations", body), 503)["code"] == "host_lost"
    pool.error = None
    assert ask(app, "POST", "/v1/images/generations", body).status_code == 200


def test_the_number_of_kept_contracts_is_bounded(app: Any, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contracts, "MAX_CONTRACTS", 1)
    for model in ("shapes", "other", "shapes"):
        ask(app, "POST", "/v1/images/generations", {"model": model, "prompt": ""})
    assert pool.calls == ["contract", "answer", "contract", "contract", "answer"]
