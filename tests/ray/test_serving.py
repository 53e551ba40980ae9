"""Test gateway and model host as Ray Serve runs them, with requests over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from genmodels.keys import Keys
from genmodels.storage import Storage
from services.gateway.model_host import ModelHost
from services.gateway.pool_config import Pool, Pools
from services.gateway.pool_routing import PoolRouting
from services.gateway.routes import create_app
from services.gateway.watched_catalogue import WatchedCatalogue
from services.http.middleware import MAX_BODY
from tests.support.asgi_client import JSON, PICTURE, ask, refused
from tests.support.published_models import publish, publish_examples

BODY = {"model": "m", "prompt": "x"}
POOLS = Pools(pools=[Pool(name="default"), Pool(name="spare", min_replicas=0, idle_seconds=15)])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Make a registry with a text model, a VAE of two versions, and a model without the alias production."""
    storage = publish_examples(tmp_path_factory.mktemp("models"))
    publish(storage, "rare", "vae", pool="spare")
    return storage


@pytest.fixture(scope="module")
def app(models: Storage) -> Any:
    return create_app(ModelHost(models.url))


@pytest.fixture(scope="module")
def token(models: Storage) -> str:
    return Keys(models).create("tests", ("generate",))[1]


@pytest.fixture(scope="module")
def endpoint(ray_cluster: str, models: Storage) -> Iterator[str]:
    """Serve the application as `genmodels run` does, with keys required; return its address."""
    from ray import serve

    from services.cluster.ports import HOST
    from services.cluster.ray_start import serve_http_options
    from services.gateway.app import build

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options=serve_http_options(HOST, port), logging_config={"log_level": "ERROR"})
    serve.run(build(models.url, auth=True, pools=POOLS), name="genmodels", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def client(endpoint: str, token: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{endpoint}/v1", api_key=token, max_retries=0) as client:
        yield client


def test_the_openai_client_lists_models(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {"play", "shapes", "clean@1", "rare"}
    assert client.models.retrieve("shapes@next").model_dump()["version"] == 2


def test_the_openai_client_completes_and_streams_the_same(client: openai.OpenAI, app: Any) -> None:
    fields: dict[str, Any] = {
        "model": "play",
        "prompt": ["To be", [7, 8, 9]],
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
def test_what_serve_says_of_a_pool_becomes_an_answer(
    ray_cluster: str, file_storage: Storage, error: str, status: int, code: str
) -> None:
    from ray import exceptions
    from ray.serve import exceptions as serve_exceptions

    from services.gateway.app import HandlePool

    made = {
        "BackPressureError": lambda: serve_exceptions.BackPressureError(9, 8),
        "DeploymentUnavailableError": lambda: serve_exceptions.DeploymentUnavailableError("default"),
        "ActorDiedError": lambda: exceptions.ActorDiedError(),
        "RayTaskError": lambda: exceptions.RayTaskError(
            "f", "internal detail", ValueError("internal detail")
        ).as_instanceof_cause(),
    }[error]()

    class Handle:
        """Act as a handle whose methods all fail."""

        def options(self, **_: Any) -> Handle:
            return self

        def __getattr__(self, name: str) -> Any:
            return self

        def remote(self, *arguments: Any) -> Any:
            raise made

    pools = PoolRouting(WatchedCatalogue(file_storage), lambda _: HandlePool(Handle()))
    pools.configure(Pools(pools=[Pool(name="default")]))
    app = create_app(pools)
    for path, body in (("completions", BODY), ("images/generations", BODY), ("models/m/decode", {"latents": [[0.0]]})):
        error = refused(ask(app, "POST", f"/v1/{path}", body), status)
        assert (error["code"], "internal detail" in error["message"]) == (code, False)


def test_verbs_over_serve(endpoint: str, token: str) -> None:
    headers = {"authorization": f"Bearer {token}"}
    with httpx.Client(base_url=f"{endpoint}/v1/models/shapes", headers=headers) as client:
        latents = client.post("/encode", json={"images": [PICTURE]}).json()["latents"]
        decoded = client.post("/decode", json={"latents": latents})
        assert decoded.json()["data"] == client.post("/reconstruct", json={"images": [PICTURE]}).json()["data"]
        assert len(client.post("/interpolate", json={"start": 1, "end": latents[0], "steps": 3}).json()["data"]) == 3
    assert decoded.headers.get_list("x-request-id") == [str(uuid.UUID(decoded.headers["x-request-id"]))]
    assert decoded.headers["x-genmodels-version"] == "shapes@1"


def test_the_vocabulary_and_head_over_serve(endpoint: str, token: str, app: Any) -> None:
    path, headers = "/v1/models/play/vocabulary", {"authorization": f"Bearer {token}"}
    with httpx.Client(base_url=endpoint, headers=headers) as client:
        for _ in range(3):  # on one connection
            got, head = client.get(path), client.head(path)
            assert got.json() == ask(app, "GET", path).json()
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-length"] == got.headers["content-length"]
        assert client.head("/v1/models/none").status_code == 404


def test_errors_over_serve_have_one_form(endpoint: str, token: str) -> None:
    with httpx.Client(base_url=endpoint) as client:
        refused(client.get("/nothing"), 404)
        refused(client.put("/v1/completions"), 405)
        refused(client.post("/v1/completions", content=b"{", headers=JSON), 401)
        refused(client.post("/v1/completions", content=b"{}", headers={**JSON, "content-encoding": "gzip"}), 415)
        refused(client.post("/v1/completions", content=b"{", headers={**JSON, "authorization": f"Bearer {token}"}), 400)
        own = client.get("/healthz", headers={"x-request-id": "mine", "x-request-timeout-seconds": "0.000001"})
        assert own.json() == {"status": "ok"}
        assert own.headers.get_list("x-request-id") == [str(uuid.UUID(own.headers["x-request-id"]))]


def test_a_large_body_is_refused_at_the_door(endpoint: str, token: str) -> None:
    """Expect the answer before the body is sent: Serve's proxy itself refuses it."""
    host, port = endpoint.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {MAX_BODY + 1}\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    with httpx.Client(base_url=endpoint, headers=JSON) as client:
        whole = [b"x" * 2**20] * 9
        assert client.post("/v1/completions", content=iter(whole)).status_code == 401
        refused(client.post("/v1/completions", content=iter(whole), headers={"authorization": f"Bearer {token}"}), 413)
        assert client.get("/healthz").status_code == 200


def test_a_large_body_waits_for_its_key_in_serves_proxy(endpoint: str, token: str) -> None:
    """Check that without a key only the first part of a body is read; with a key all of it reaches the gateway."""
    host, port = endpoint.removeprefix("http://").split(":")
    head = f"POST /v1/models/shapes/decode HTTP/1.1\r\nHost: {host}\r\nContent-Length: {MAX_BODY}\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(f"{head}\r\n{'x' * 1000}".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 401")
    body = json.dumps({"images": [PICTURE] * 64}).encode() + b" " * 2**22
    with httpx.Client(base_url=endpoint, headers={**JSON, "authorization": f"Bearer {token}"}, timeout=60) as client:
        for _ in range(20):  # no body may lose data
            assert len(client.post("/v1/models/shapes/reconstruct", content=body).json()["data"]) == 64


def test_serves_proxy_bounds_what_comes_before_a_request(endpoint: str) -> None:
    host, port = endpoint.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection, contextlib.suppress(ConnectionError):
        for _ in range(1000):
            connection.sendall(b"x" * 2**16)
        pytest.fail("64 MiB of a header were taken")


LONG = {"model": "play", "prompt": "To be", "max_tokens": 4000, "seed": 1, "stream": True}


def replica(deployment: str) -> int:
    """Return the process of a deployment's replica in this cluster."""
    return until(lambda: running(deployment), f"a replica of {deployment}")


def running(deployment: str) -> int | None:
    """Return the process of a deployment's replica in this cluster; None if there is none."""
    title = f"ray::ServeReplica:genmodels:{deployment}".encode()
    parents, titled = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if (folder / "cmdline").read_bytes().startswith(title):
                titled.append(int(folder.name))
    return next((pid for pid in titled if os.getpid() in ancestors(pid, parents)), None)


def test_replicas_listen_on_this_machine_alone(endpoint: str) -> None:
    for deployment in ("default", "gateway"):
        addresses = listening(replica(deployment))
        assert addresses
        assert all(address.endswith("0100007F") for address in addresses)  # 127.0.0.1, also as an IPv6 address


def listening(pid: int) -> list[str]:
    """Return the addresses that a process listens on, as the kernel writes them."""
    process = Path(f"/proc/{pid}")
    mine = {os.readlink(file) for file in (process / "fd").iterdir() if file.is_symlink()}
    tables = ((process / "net" / name).read_text().splitlines()[1:] for name in ("tcp", "tcp6"))
    rows = [line.split() for table in tables for line in table]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine]


def ancestors(pid: int, parents: dict[int, int]) -> Iterator[int]:
    while pid := parents.get(pid, 0):
        yield pid


def until(look: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := look()):
        assert time.monotonic() < deadline, f"not in {seconds} s: {what}"
        time.sleep(0.05)
    return value


def test_a_pool_scales_from_zero_and_back_to_zero(endpoint: str, token: str) -> None:
    """Send requests at once to a pool without a host: one waits and is answered, the others may try again."""
    headers = {"authorization": f"Bearer {token}"}
    with httpx.Client(base_url=endpoint, headers=headers, timeout=60) as client, ThreadPoolExecutor(4) as threads:
        assert running("spare") is None
        body = {"model": "rare", "prompt": "", "n": 1, "seed": 4}
        bodies = [{**body, "model": name} for name in ("rare", "rare@1", "rare@latest", "rare@production")]
        answers = list(threads.map(lambda body: client.post("/v1/images/generations", json=body), bodies))
        assert sorted(answer.status_code for answer in answers) == [200, 429, 429, 429]
        for answer in answers:
            if answer.status_code == 429:
                assert (refused(answer, 429)["code"], answer.headers["retry-after"]) == ("pool_starting", "5")
        assert running("spare")
        assert client.post("/v1/images/generations", json=body).status_code == 200
        until(lambda: running("spare") is None, "the pool is not used, and has no host")
        for _ in range(3):
            assert client.get("/healthz").json() == {"status": "ok"}
        assert {model["id"] for model in client.get("/v1/models").json()["data"]} >= {"rare"}
        assert running("spare") is None


def data(lines: Iterator[str]) -> Iterator[str]:
    return (line.removeprefix("data: ") for line in lines if line.startswith("data: "))


def test_clients_that_leave_free_their_slots_over_serve(endpoint: str, token: str) -> None:
    """Open more streams than there are slots, one after the other, and read none to its end."""
    with httpx.Client(base_url=endpoint, headers={"authorization": f"Bearer {token}"}, timeout=60) as client:
        for _ in range(20):
            with client.stream("POST", "/v1/completions", json={**LONG, "n": 4}) as stream:
                assert stream.status_code == 200
                assert next(data(stream.iter_lines()))
        began = time.process_time()
        answer = client.post("/v1/completions", json={**BODY, "model": "play", "max_tokens": 5})
        assert answer.status_code == 200, answer.text
        assert time.process_time() - began < 5


@pytest.mark.parametrize("kill", [1, *(pytest.param(number, marks=pytest.mark.long) for number in range(2, 11))])
def test_a_stream_whose_host_dies_ends_in_an_error_and_a_new_host_answers(endpoint: str, token: str, kill: int) -> None:
    with httpx.Client(base_url=endpoint, headers={"authorization": f"Bearer {token}"}, timeout=60) as client:
        host = replica("default")
        with client.stream("POST", "/v1/completions", json=LONG) as stream:
            lines = data(stream.iter_lines())
            for _ in range(random.Random(kill).randint(1, 8)):
                assert json.loads(next(lines))["choices"]
            os.kill(host, signal.SIGKILL)
            rest = list(lines)
        assert rest[-1] != "[DONE]"
        assert json.loads(rest[-1])["error"]["code"] == "host_lost"
        assert all("choices" in json.loads(line) for line in rest[:-1])

        def answered() -> bool:
            answer = client.post("/v1/completions", json={**BODY, "model": "play"})
            if answer.status_code != 200:
                assert refused(answer, 503)["code"] in ("host_lost", None)
                assert answer.headers["retry-after"]
            return answer.status_code == 200

        until(answered, "another host answers")


def test_a_replica_that_has_to_go_finishes_what_is_in_flight(endpoint: str, token: str, models: Storage) -> None:
    """Replace both replicas by a new configuration during a stream."""
    from ray import serve

    from services.gateway.app import build

    with httpx.Client(base_url=endpoint, headers={"authorization": f"Bearer {token}"}, timeout=120) as client:
        old = replica("default")
        with client.stream("POST", "/v1/completions", json=LONG) as stream:
            lines = data(stream.iter_lines())
            first = next(lines)
            rolling = threading.Thread(
                target=serve.run,
                args=(build(models.url, auth=True, pools=Pools(pools=[Pool(name="default", workers=3)])),),
                kwargs={"name": "genmodels", "route_prefix": "/"},
            )
            rolling.start()
            parts = [first, *lines]
        assert parts[-1] == "[DONE]"
        text = "".join(json.loads(line)["choices"][0]["text"] for line in parts[:-1])
        rolling.join()
        until(lambda: replica("default") != old, "the old host is gone")
        whole = client.post("/v1/completions", json={**LONG, "stream": False}).json()
    assert whole["choices"][0]["text"] == text
