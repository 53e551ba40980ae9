"""Gateway and model host as Ray Serve runs them, asked over HTTP."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from asking import JSON, PICTURE, ask, refused
from published import publish

from genmodels.keys import Keys
from genmodels.storage import Storage, open_storage
from services.edge import MAX_BODY
from services.host import ModelHost
from services.routes import create_app

BODY = {"model": "m", "prompt": "x"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A registry with a text model, a VAE of two versions, and one without the alias production."""
    storage = open_storage(tmp_path_factory.mktemp("models").as_uri())
    publish(storage, "play", "minigpt")
    publish(storage, "shapes", "vae")
    publish(storage, "shapes", "vae", step=2, alias="next")
    publish(storage, "clean", "autoencoder", alias=None)
    return storage


@pytest.fixture(scope="module")
def app(models: Storage) -> Any:
    return create_app(ModelHost(models.url))


@pytest.fixture(scope="module")
def token(models: Storage) -> str:
    return Keys(models).create("tests", ("generate",))[1]


@pytest.fixture(scope="module")
def endpoint(ray_cluster: str, models: Storage) -> Iterator[str]:
    """The application as `genmodels run` starts it, asking for keys; its address."""
    from ray import serve

    from services.gateway import HTTP_OPTIONS, build

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={**HTTP_OPTIONS, "port": port}, logging_config={"log_level": "ERROR"})
    serve.run(build(models.url, auth=True), name="genmodels", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def client(endpoint: str, token: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{endpoint}/v1", api_key=token, max_retries=0) as client:
        yield client


def test_the_openai_client_lists_models(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {"play", "shapes", "clean@1"}
    assert client.models.retrieve("shapes@next").model_dump()["version"] == 2


def test_the_openai_client_completes_and_streams_the_same(client: openai.OpenAI, app: Any) -> None:
    fields: dict[str, Any] = {
        "model": "play",
        "prompt": "To be",
        "max_tokens": 60,
        "seed": 5,
        "temperature": 0.8,
        "stop": ["\n"],
    }
    whole = client.completions.create(**fields, n=2)
    parts = list(client.completions.create(**fields, n=2, stream=True, stream_options={"include_usage": True}))
    assert parts[-1].usage == whole.usage
    for choice in whole.choices:
        own = [chunk.choices[0] for chunk in parts[:-1] if chunk.choices[0].index == choice.index]
        assert "".join(part.text for part in own) == choice.text
        assert own[-1].finish_reason == choice.finish_reason
    here = ask(app, "POST", "/v1/completions", {**fields, "n": 2}).json()
    assert [choice.text for choice in whole.choices] == [choice["text"] for choice in here["choices"]]


def test_the_openai_client_generates_images(client: openai.OpenAI, app: Any) -> None:
    response = client.images.with_raw_response.generate(model="shapes", prompt="", n=3, extra_body={"seed": 4})
    made = response.parse()
    assert response.headers["x-genmodels-version"] == "shapes@1"
    here = ask(app, "POST", "/v1/images/generations", {"model": "shapes", "prompt": "", "n": 3, "seed": 4}).json()
    assert [image.b64_json for image in made.data or []] == [image["b64_json"] for image in here["data"]]


def test_the_openai_client_understands_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nothing", prompt="x")
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.BadRequestError) as wrong:
        client.images.generate(model="shapes", prompt="", size="1024x1024")
    assert wrong.value.param == "size"


def test_the_openai_client_understands_that_its_key_is_wrong(endpoint: str) -> None:
    with (
        openai.OpenAI(base_url=f"{endpoint}/v1", api_key="sk-wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as wrong,
    ):
        client.models.list()
    assert wrong.value.code == "wrong_key"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        ("BackPressureError", 429, "too_many_requests"),
        ("DeploymentUnavailableError", 503, "host_lost"),
        ("ActorDiedError", 503, "host_lost"),
        ("RayTaskError", 500, "internal_error"),
    ],
)
def test_what_serve_says_of_a_pool_becomes_an_answer(ray_cluster: str, error: str, status: int, code: str) -> None:
    from ray import exceptions
    from ray.serve import exceptions as serve_exceptions

    from services.gateway import HandlePool

    made = {
        "BackPressureError": lambda: serve_exceptions.BackPressureError(9, 8),
        "DeploymentUnavailableError": lambda: serve_exceptions.DeploymentUnavailableError("default"),
        "ActorDiedError": lambda: exceptions.ActorDiedError(),
        "RayTaskError": lambda: exceptions.RayTaskError(
            "f", "internal detail", ValueError("internal detail")
        ).as_instanceof_cause(),
    }[error]()

    class Handle:
        """A handle whose every method fails."""

        def options(self, stream: bool) -> Handle:
            return self

        def __getattr__(self, name: str) -> Any:
            return self

        def remote(self, *arguments: Any) -> Any:
            raise made

    app = create_app(HandlePool(Handle()))  # type: ignore[arg-type]
    for path, body in (("completions", BODY), ("images/generations", BODY), ("models/m/decode", {"latents": [[0.0]]})):
        found = refused(ask(app, "POST", f"/v1/{path}", body), status)
        assert (found["code"], "internal detail" in found["message"]) == (code, False)


def test_verbs_over_serve(endpoint: str, token: str) -> None:
    headers = {"authorization": f"Bearer {token}"}
    with httpx.Client(base_url=f"{endpoint}/v1/models/shapes", headers=headers) as client:
        latents = client.post("/encode", json={"images": [PICTURE]}).json()["latents"]
        decoded = client.post("/decode", json={"latents": latents})
        assert decoded.json()["data"] == client.post("/reconstruct", json={"images": [PICTURE]}).json()["data"]
        assert len(client.post("/interpolate", json={"start": 1, "end": latents[0], "steps": 3}).json()["data"]) == 3
    assert decoded.headers.get_list("x-request-id") == [str(uuid.UUID(decoded.headers["x-request-id"]))]
    assert decoded.headers["x-genmodels-version"] == "shapes@1"


def test_errors_over_serve_have_one_form(endpoint: str, token: str) -> None:
    with httpx.Client(base_url=endpoint) as client:
        refused(client.get("/nothing"), 404)
        refused(client.put("/v1/completions"), 405)
        refused(client.post("/v1/completions", content=b"{", headers=JSON), 401)
        refused(client.post("/v1/completions", content=b"{", headers={**JSON, "authorization": f"Bearer {token}"}), 400)
        own = client.get("/healthz", headers={"x-request-id": "mine", "x-request-timeout-seconds": "0.000001"})
        assert own.json() == {"status": "ok"}
        assert own.headers.get_list("x-request-id") == [str(uuid.UUID(own.headers["x-request-id"]))]


def test_a_large_body_is_refused_at_the_door(endpoint: str) -> None:
    """The answer is there before the body has been sent: Serve's proxy itself refuses it."""
    host, port = endpoint.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {MAX_BODY + 1}\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    with httpx.Client(base_url=endpoint) as client:
        refused(client.post("/v1/completions", content=(b"x" * 2**20 for _ in range(9)), headers=JSON), 413)
        assert client.get("/healthz").status_code == 200
