"""Test the client of the job API against services that misbehave."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from genmodels.checkpoint import CheckpointRef, File, Lineage
from genmodels.errors import CheckpointError, GenmodelsError, JobNotFound, ModelNotFound, SpecError, StorageError
from genmodels.registry.versions import Version
from services.client import http
from services.client import jobs as client_module
from services.client.http import Unauthorized, Unreachable
from services.client.jobs import Client
from tests.support.asgi_server import served

JOB = {
    "job": "shapes-01234567",
    "name": "shapes",
    "priority": 0,
    "state": "running",
    "submitted": "2026-01-01T00:00:00.000+00:00",
    "models": [{"model": "vae", "state": "running", "from_a_newer_service": 1}],
}


class Scripted:
    """Answer each request with the next answer of a script, and record the requests.

    An answer is (status, body), with the body sent as JSON or as raw bytes; or "break": half of an answer; or a
    list of lines, sent as a stream that breaks off if the last line is None.
    """

    def __init__(self, *script: Any) -> None:
        self.script, self.requests = list(script), []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.requests.append((scope["method"], scope["path"], scope["query_string"].decode(), headers, body))
        answer = self.script.pop(0)
        if isinstance(answer, list):
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
            for line in answer:
                if line is None:
                    raise ConnectionError("the service died")
                await send({"type": "http.response.body", "body": f"{line}\n".encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b""})
            return
        status, content = (200, b"{") if answer == "break" else answer
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        length = str(len(data) + (answer == "break")).encode()
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.body", "body": data})


Connect = Callable[..., tuple[Client, Scripted]]


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    """Return a client of a service that answers as scripted."""
    monkeypatch.setattr(client_module, "RECONNECT_SECONDS", 0.01)
    monkeypatch.setattr(http, "FIRST_PATIENCE_SECONDS", 5.0)
    running: list[Any] = []

    def connect(*script: Any, key: str | None = None) -> tuple[Client, Scripted]:
        app = Scripted(*script)
        server = served(app)
        client = Client(server.__enter__(), key)
        running.append((client, server))
        return client, app

    yield connect
    for client, server in running:
        client.__exit__()
        server.__exit__(None, None, None)


def error(message: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "x", "param": None, "code": code}}


def test_a_submission_is_tried_again_under_one_idempotency_key(connect: Connect) -> None:
    client, app = connect((503, error("not ready")), "break", (502, b"<html>"), (201, JOB), (201, JOB), key="gm_1_2")
    job = client.submit(b"name: shapes", "job.yaml")
    assert (job.job, job.models[0].model) == ("shapes-01234567", "vae")
    assert len(app.requests) == 4
    assert {(verb, path, body) for verb, path, _, _, body in app.requests} == {("POST", "/v1/jobs", b"name: shapes")}
    (first,) = {headers["idempotency-key"] for *_, headers, _ in app.requests}
    assert {headers["content-type"] for *_, headers, _ in app.requests} == {"application/yaml"}
    assert {headers["authorization"] for *_, headers, _ in app.requests} == {"Bearer gm_1_2"}
    client.submit(b"{}", "job.json")
    *_, headers, _ = app.requests[-1]
    assert headers["idempotency-key"] != first
    assert headers["content-type"] == "application/json"


def test_problems_of_a_spec_are_told_of_the_file(connect: Connect) -> None:
    client, app = connect(
        (400, error("spec:3: models[0].name: bad\nmodels[0].train.init_from: none", "invalid_spec")),
        (413, error("too large", "body_too_large")),
    )
    with pytest.raises(SpecError) as refused:
        client.submit(b"x", "jobs/a.yaml")
    assert refused.value.problems == (
        "jobs/a.yaml:3: models[0].name: bad",
        "jobs/a.yaml: models[0].train.init_from: none",
    )
    with pytest.raises(SpecError, match=r"^jobs/a.yaml: too large$"):
        client.dry_run(b"x", "jobs/a.yaml")
    assert app.requests[-1][2] == "dry_run=true"


def test_no_service_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_PATIENCE_SECONDS", 0.1)
    with socket.socket() as taken:  # bound, but without a listener
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with Client(url) as client, pytest.raises(Unreachable) as refused:
            client.jobs()
        assert str(refused.value) == (
            f"no job service answers at {url}; start one with `genmodels up`, or name another by --api or GENMODELS_API"
        )
        with Client(url) as client, pytest.raises(Unreachable):
            next(client.logs("a-01234567", [], follow=True))


@pytest.mark.parametrize("answer", [(200, b"<html>hello</html>"), (404, b"<html>"), (200, b"[]"), (200, {"a": 1})])
def test_something_else_there(connect: Connect, answer: Any) -> None:
    client, _ = connect(answer)
    with pytest.raises(GenmodelsError, match=r"answers \(\d+\), but is not a job service; check the address"):
        client.job("a-01234567")


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://x", "http://", "http://user:secret@host", "http://a b"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(GenmodelsError, match=r"expected e.g. http://127.0.0.1:8080"):
        Client(url)


def test_keys(connect: Connect) -> None:
    refusal = (401, error("no"))
    client, _ = connect(refusal)
    with pytest.raises(Unauthorized, match="requires a key: set GENMODELS_KEY; `genmodels keys create` creates one"):
        client.jobs()
    client, _ = connect(refusal, (403, error("this key has the scope generate, and this needs submit")), key="gm_1_2")
    with pytest.raises(Unauthorized, match=r"refuses the key in GENMODELS_KEY: it is unknown or was revoked"):
        client.jobs()
    with pytest.raises(Unauthorized, match=r"^this key has the scope generate, and this needs submit$"):
        client.jobs()
    with pytest.raises(Unauthorized, match="characters that no key has"):
        Client("http://127.0.0.1:1", "gm_ö\r\nx: y")


def test_the_message_of_the_service_is_the_error(connect: Connect) -> None:
    client, app = connect((404, error("no job 'x'", "job_not_found")), (409, error("not ended")))
    with pytest.raises(JobNotFound, match=r"^no job 'x'$"):
        client.job("x")
    with pytest.raises(GenmodelsError, match=r"^not ended$"):
        client.delete_job("x")
    for name in ("", "..", "a/b", "A", "x?y"):
        with pytest.raises(GenmodelsError, match="lower-case letters"):
            client.job(name)
    assert len(app.requests) == 2  # no request was sent for an invalid name


def test_a_followed_log_goes_on_over_breaks_and_repeats_nothing(connect: Connect) -> None:
    """The stream breaks, the service is down, or the stream ends before the job: each line comes once."""
    ended = JOB | {"state": "succeeded"}
    client, app = connect(
        ["a", "b", "b", None],
        (503, error("the storage does not answer")),
        ["a", "b", "b", "c"],
        (200, JOB),
        ["a", "b", "b", "c", "b", "d"],
        (200, ended),
    )
    waited: list[str] = []
    lines = list(client.logs("x", ["vae"], "driver", follow=True, waiting=waited.append))
    assert lines == ["a", "b", "b", "c", "b", "d"]
    assert len(waited) == 1
    assert "closed the connection (RemoteProtocolError)" in waited[0]
    assert app.requests[0][:3] == ("GET", "/v1/jobs/x/logs", "model=vae&source=driver&follow=true")
    assert not app.script


def test_a_log_that_is_not_followed_is_read_once(connect: Connect) -> None:
    client, app = connect(["a", "b"], ["a", None])
    assert list(client.logs("x", [])) == ["a", "b"]
    with pytest.raises(Unreachable, match="closed the connection"):
        list(client.logs("x", []))
    assert app.requests[0][2] == ""


def test_a_silent_log_is_requested_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(client_module, "RECONNECT_SECONDS", 0.01)
    app = Scripted((200, JOB), ["first", "a"], (200, JOB | {"state": "failed"}))
    with served(_Silent(app)) as url, Client(url) as client:
        waited: list[str] = []
        assert list(client.logs("x", [], follow=True, waiting=waited.append)) == ["first", "a"]
    assert not waited
    assert not app.script


class _Silent:
    """Send one line and then nothing, the first time."""

    def __init__(self, then: Scripted) -> None:
        self.then, self.first = then, True

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if not self.first:
            await self.then(scope, receive, send)
            return
        self.first = False
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"first\n", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass


VAE = {"name": "vae", "family": "vae", "versions": [1, 3], "aliases": {"production": 1}, "metrics": {}}


def test_all_pages_of_models_are_read(connect: Connect) -> None:
    pages = [{"data": [{"name": name}], "has_more": name != "c", "last_id": name} for name in "abc"]
    client, app = connect(*[(200, page) for page in pages])
    assert [model["name"] for model in client.models()] == ["a", "b", "c"]
    assert [query for _, _, query, *_ in app.requests] == ["", "after=a", "after=b"]


def test_names_of_versions(connect: Connect) -> None:
    client, app = connect(*[(200, VAE)] * 4, (404, error("no model 'gan'; ...", "model_not_found")))
    assert client.resolve("vae@7") == ("vae", 7)
    assert client.resolve("vae") == client.resolve("vae@production") == ("vae", 1)
    assert client.resolve("vae@latest") == ("vae", 3)
    with pytest.raises(ModelNotFound, match="no alias 'staging'; aliases: production; versions: 1, 3"):
        client.resolve("vae@staging")
    with pytest.raises(ModelNotFound, match="no model 'gan'; "):
        client.resolve("gan")
    assert {path for _, path, *_ in app.requests} == {"/v1/models/vae", "/v1/models/gan"}, "no list of all models"


def _version(**files: bytes) -> Version:
    described = {name: File(size=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    return Version(
        model="vae",
        version=3,
        family="vae",
        job="x",
        checkpoint=CheckpointRef(attempt=1, step=2),
        metrics={},
        gate=None,
        lineage=Lineage(spec_digest="", data_digest="", code_version="", world_size=1, parent=None),
        created="2026-01-01T00:00Z",
        files=described,
    )


def test_files_of_a_version_are_verified(connect: Connect, tmp_path: Path) -> None:
    client, app = connect((503, error("busy")), (200, b"weights"), (200, b"spoiled"))
    client.fetch(_version(model=b"weights"), tmp_path)
    assert (tmp_path / "model").read_bytes() == b"weights"
    assert app.requests[-1][1] == "/v1/models/vae/versions/3/files/model"
    with pytest.raises(CheckpointError, match="vae@3: model arrived damaged"):
        client.fetch(_version(model=b"weights"), tmp_path)
    with pytest.raises(StorageError, match=r"none of them '.' or '..'"):
        client.fetch(_version(**{"../outside": b"x"}), tmp_path)
    assert len(app.requests) == 3


def test_a_dataset_is_sent_whole_at_each_try(connect: Connect, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"x" * 3_000_000)
    client, app = connect((503, error("busy")), (201, {"name": "mine", "notes": []}))
    with (tmp_path / "text").open("rb") as file:
        assert client.add_dataset("mine", file, image_size=16, channels=None)["name"] == "mine"
    assert [len(body) for *_, body in app.requests] == [3_000_000, 3_000_000]
    assert app.requests[0][:3] == ("PUT", "/v1/datasets/mine", "image_size=16")
