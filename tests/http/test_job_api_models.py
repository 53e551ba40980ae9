"""Test the job API except jobs: logs, models, datasets, metrics, the documentation page, and its process."""

from __future__ import annotations

import contextlib
import html
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from genmodels.checkpoint import sha256_of
from genmodels.data import uploads
from genmodels.data.images import png
from genmodels.errors import GenmodelsError
from genmodels.family import EvaluationMetric, EvaluationResult
from genmodels.keys import Keys
from genmodels.metrics import ATTEMPTS, DIRECTORY
from genmodels.registry.store import Registry
from genmodels.runs.jobs import Jobs
from genmodels.storage import Storage, open_storage
from genmodels.storage.lease import Lease
from services.http import docs
from services.http.auth import Caller
from services.http.bodies import BodyLimit
from services.http.middleware import StreamedRoute
from services.jobs import app, metrics, model_routes, routes
from services.jobs.metrics import JobMetrics
from services.jobs.upload_slots import UPLOADS_AT_ONCE
from services.jobs.views import Views
from tests.support.asgi_client import ask, refused
from tests.support.asgi_server import served
from tests.support.job_service import Service, spec
from tests.support.published_models import publish
from tests.support.storages import FailingStorage


@pytest.fixture
def service(file_storage: Storage) -> Service:
    return Service(file_storage)


# Logs


def test_logs_are_lines_of_all_processes_by_time(service: Service) -> None:
    job = service.submit("a", "b")
    service.log(job, "a", 1, "driver", 1, ("2026-01-01T00:00:01", "first"), ("2026-01-01T00:00:04", "fourth"))
    service.log(job, "a", 1, "0", 1, ("2026-01-01T00:00:02", "second"))
    service.log(job, "b", 1, "driver", 1, ("2026-01-01T00:00:03", "\x1b[31mthird\x07 \u00e9\u4e2d \x9b\t."))
    response = service("GET", f"/v1/jobs/{job}/logs")
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert response.text.splitlines() == [
        "2026-01-01T00:00:01 a/driver first",
        "2026-01-01T00:00:02 a/0 second",
        "2026-01-01T00:00:03 b/driver ?[31mthird? \u00e9\u4e2d ?\t.",  # no control characters for the reader's terminal
        "2026-01-01T00:00:04 a/driver fourth",
    ]
    assert service("GET", f"/v1/jobs/{job}/logs?model=a&source=0").text == "2026-01-01T00:00:02 a/0 second\n"
    both = service("GET", f"/v1/jobs/{job}/logs?model=b&model=a&source=driver").text
    assert [line.split()[1] for line in both.splitlines()] == ["a/driver", "b/driver", "a/driver"]


@pytest.mark.parametrize("query", ["source=..", "source=1/../../x", "source=driver%0a", "source=12345", "model="])
def test_a_wrong_source_or_model_is_refused(service: Service, query: str) -> None:
    job = service.submit("a")
    assert service("GET", f"/v1/jobs/{job}/logs?{query}").status_code in (400, 404)


def test_a_log_is_followed_until_its_job_ends(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "FOLLOW_SECONDS", 0.02)
    job = service.submit("a", "b")
    service.log(job, "a", 1, "0", 1, ("1", "one"))
    with served(service.app) as url, httpx.stream("GET", f"{url}/v1/jobs/{job}/logs?follow=true", timeout=20) as stream:
        lines = stream.iter_lines()
        assert next(lines) == "1 a/0 one"
        service.log(job, "a", 1, "0", 2, ("2", "two"))
        assert next(lines) == "2 a/0 two"
        service.move(job, "a", "succeeded")
        service.log(job, "b", 1, "driver", 1, ("3", "three"))
        assert next(lines) == "3 b/driver three"
        service.log(job, "b", 1, "driver", 2, ("4", "the last words"))
        service.move(job, "b", "failed")
        assert list(lines) == ["4 b/driver the last words"]


def test_followed_logs_end_with_the_service(file_storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "FOLLOW_SECONDS", 0.02)
    closing = threading.Event()
    service = Service(file_storage, closing=closing.is_set)
    job = service.submit("a")
    service.log(job, "a", 1, "0", 1, ("1", "one"))
    with served(service.app) as url, httpx.stream("GET", f"{url}/v1/jobs/{job}/logs?follow=true", timeout=20) as stream:
        lines = stream.iter_lines()
        next(lines)
        closing.set()
        assert list(lines) == []


def test_only_so_many_follow(file_storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "FOLLOW_SECONDS", 0.02)
    monkeypatch.setattr(routes, "FOLLOWERS", (1, 1))
    service = Service(file_storage)
    job = service.submit("a")
    service.log(job, "a", 1, "0", 1, ("1", "one"))
    path = f"/v1/jobs/{job}/logs"
    with served(service.app) as url:
        with httpx.stream("GET", f"{url}{path}?follow=true", timeout=20) as stream:
            lines = stream.iter_lines()
            assert next(lines) == "1 a/0 one"
            assert httpx.get(f"{url}{path}?follow=true", timeout=20).status_code == 429
            assert httpx.get(f"{url}{path}", timeout=20).text == "1 a/0 one\n"
        deadline = time.monotonic() + 20
        while True:  # until the server notices that the first client has disconnected
            with httpx.stream("GET", f"{url}{path}?follow=true", timeout=20) as stream:
                if stream.status_code == 200:
                    break
            assert time.monotonic() < deadline


# Models


def test_models_are_listed_with_versions_and_aliases(service: Service) -> None:
    assert service("GET", "/v1/models").json() == {"object": "list", "has_more": False, "data": []}
    publish(service.storage, "clothes", "vae")
    publish(service.storage, "clothes", "vae", step=2, alias="next")
    (model,) = service("GET", "/v1/models").json()["data"]
    assert model.pop("created")
    assert model == {
        "name": "clothes",
        "family": "vae",
        "versions": [1, 2],
        "aliases": {"next": 2, "production": 1},
        "metrics": {"val_loss": 1.5, "odd": None},
    }


def test_one_model_is_shown_as_in_the_list(service: Service) -> None:
    for name in ("clothes", "digits"):
        publish(service.storage, name, "vae")
    assert service("GET", "/v1/models/digits").json() == service("GET", "/v1/models").json()["data"][1]
    for name in ("nothing", "Clothes", "%2e%2e"):
        error = refused(service("GET", f"/v1/models/{name}"), 404)
        assert error["code"] == "model_not_found"
        assert "clothes" not in error["message"], "a key may be limited to some models"


def test_a_version_is_pulled_file_by_file(storage: Storage, tmp_path: Path) -> None:
    service = Service(storage)
    version = publish(storage, "clothes", "vae")
    document = service("GET", "/v1/models/clothes/versions/1").json()
    assert (document["model"], document["version"], document["metrics"]["odd"]) == ("clothes", 1, "nan")
    assert set(document["files"]) == set(version.files)
    assert document["evaluations"] == []
    result = EvaluationResult(
        metrics={"nll": EvaluationMetric(value=98.5, unit="nats"), "odd": EvaluationMetric(value=float("inf"))}
    )
    Registry(storage).record_evaluation(version, result, thorough=False, seconds=1, publication=True)
    (evaluation,) = service("GET", "/v1/models/clothes/versions/1").json()["evaluations"]
    assert evaluation["metrics"]["nll"] == {"value": 98.5, "unit": "nats", "baselines": {}}
    assert (evaluation["id"], evaluation["metrics"]["odd"]["value"]) == ("publication", "inf")
    Registry(storage).fetch(version, tmp_path)
    for name, file in document["files"].items():
        response = service("GET", f"/v1/models/clothes/versions/1/files/{name}")
        assert response.status_code == 200
        assert response.content == (tmp_path / name).read_bytes()
        assert response.headers["etag"] == f'"{file["sha256"]}"' == f'"{sha256_of(tmp_path / name)}"'
    assert (
        service("GET", "/v1/models/clothes/versions/1/files/config.json", headers={"range": "bytes=0-3"}).content
        == ((tmp_path / "config.json").read_bytes()[:4])
    )


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/clothes/versions/2",
        "/v1/models/nothing/versions/1",
        "/v1/models/Clothes/versions/1",
        "/v1/models/../versions/1",
        "/v1/models/%2e%2e/versions/1",
        "/v1/models/clothes/versions/1/files/nothing",
        "/v1/models/clothes/versions/1/files/../../../keys",
        "/v1/models/clothes/versions/1/files/%2e%2e/x",
        "/v1/models/clothes/versions/1/files//etc/passwd",
        "/v1/models/clothes/versions/1/files/state/model.safetensors",
    ],
)
def test_what_is_not_of_a_version_is_404(service: Service, path: str) -> None:
    publish(service.storage, "clothes", "vae")
    refused(service("GET", path), 404)


@pytest.mark.parametrize("number", ["0", "-1", "x", "1.5", "100000000", "9" * 5000])
def test_a_version_is_a_number(service: Service, number: str) -> None:
    assert refused(service("GET", f"/v1/models/clothes/versions/{number}"), 400)["param"] == "number"


def test_a_damaged_file_is_not_sent(service: Service) -> None:
    version = publish(service.storage, "clothes", "vae")
    service.storage.put(f"models/clothes/blobs/{version.files['model.safetensors'].sha256}", b"nonsense")
    for _ in range(model_routes.DOWNLOADS[0] + 1):  # each download must release its slot
        response = service("GET", "/v1/models/clothes/versions/1/files/model.safetensors")
        assert (refused(response, 500)["code"], b"nonsense" in response.content) == ("damaged", False)
    assert service("GET", "/v1/models/clothes/versions/1/files/config.json").status_code == 200


def test_an_alias_is_moved_both_ways(service: Service) -> None:
    publish(service.storage, "clothes", "vae")
    publish(service.storage, "clothes", "vae", step=2)
    for number in (1, 2, 1):
        response = service("PUT", "/v1/models/clothes/aliases/production", {"version": number})
        assert (response.status_code, response.json()["version"]) == (200, number)
    history = Registry(service.storage).aliases("clothes")["production"].history
    assert [(move.version, move.reason) for move in history[-3:]] == [(1, "by hand"), (2, "by hand"), (1, "by hand")]
    assert refused(service("PUT", "/v1/models/clothes/aliases/latest", {"version": 1}), 400)
    assert refused(service("PUT", "/v1/models/clothes/aliases/beta", {"version": 9}), 404)
    assert refused(service("PUT", "/v1/models/clothes/aliases/beta", {"version": "1"}), 400)["param"] == "version"
    assert refused(service("PUT", "/v1/models/clothes/aliases/beta", {}), 400)["param"] == "version"


def test_a_version_goes_when_no_alias_names_it(service: Service) -> None:
    publish(service.storage, "clothes", "vae")
    publish(service.storage, "clothes", "vae", step=2)
    assert "production" in refused(service("DELETE", "/v1/models/clothes/versions/2"), 409)["message"]
    assert service("DELETE", "/v1/models/clothes/versions/1").status_code == 204
    assert refused(service("GET", "/v1/models/clothes/versions/1"), 404)
    assert service("GET", "/v1/models").json()["data"][0]["versions"] == [2]


# Datasets

TEXT = "".join(f"A line of text, number {i}, to be learnt.\n" for i in range(400)).encode()


def pictures(n: int = 40) -> bytes:
    out, random = io.BytesIO(), np.random.default_rng(0)
    with zipfile.ZipFile(out, "w") as archive:
        for i in range(n):
            archive.writestr(f"set/{i % 2}/{i}.png", png(random.random((1, 16, 16))))
    return out.getvalue()


def test_a_text_is_added_and_may_then_be_named(service: Service) -> None:
    document = spec()
    document["models"][0] |= {"model": {"family": "minigpt"}, "data": {"dataset": "lines"}}
    assert "unknown dataset 'lines'" in refused(service.post(document), 400)["message"]
    first = service("PUT", "/v1/datasets/lines", content=TEXT)
    assert first.status_code == 201
    assert (first.json()["kind"], first.json()["examples"]) == ("text", len(TEXT))
    assert service("PUT", "/v1/datasets/lines", content=TEXT).status_code == 200
    listed = {entry["name"]: entry for entry in service("GET", "/v1/datasets").json()["data"]}
    assert (listed["lines"]["built_in"], listed["digits"]["built_in"]) == (False, True)
    (report,) = service.post(document, "?dry_run=true").json()["models"]
    assert (report["dataset"], report["parameters"] > 0) == ("lines", True)
    job = service.post(document).json()["job"]
    assert service.jobs.spec(job).models[0].data.sha256 == first.json()["sha256"]


def test_another_content_under_a_name_is_409_unless_it_is_to_be_replaced(service: Service) -> None:
    assert service("PUT", "/v1/datasets/lines", content=TEXT).status_code == 201
    error = refused(service("PUT", "/v1/datasets/lines", content=TEXT + b"more\n"), 409)
    assert (error["code"], error["param"]) == ("dataset_exists", "name")
    assert error["message"].startswith("dataset 'lines' exists with another content: ")
    assert error["message"].endswith("; add ?replace=true to replace it")
    assert service("PUT", "/v1/datasets/lines?replace=true", content=TEXT + b"more\n").status_code == 201
    contents = service("DELETE", "/v1/datasets/lines?dry_run=true").json()
    assert (contents["runs"], contents["versions"], len(contents["contents"])) == ([], [], 2)
    assert service("DELETE", "/v1/datasets/lines").json() == contents
    for query in ("", "?dry_run=true"):
        assert refused(service("DELETE", f"/v1/datasets/lines{query}"), 404)["code"] == "dataset_not_found"


def test_what_is_wrong_with_an_upload_names_no_file_of_ours(service: Service) -> None:
    error = refused(service("PUT", "/v1/datasets/lines", content=b"caf\xe9 " * 1000), 400)
    assert error["message"].startswith("FILE is not UTF-8 text: byte 3 is 0xe9")
    assert error["message"].endswith("iconv -f WINDOWS-1252 -t UTF-8 FILE > converted.txt")


def test_aliases_and_whole_models_are_deleted(service: Service) -> None:
    publish(service.storage, "vae", "vae")
    assert service("DELETE", "/v1/models/vae/aliases/production").status_code == 204
    assert refused(service("DELETE", "/v1/models/vae/aliases/production"), 404)["code"] == "model_not_found"
    for path in ("/v1/models/nope", "/v1/models/NOPE", "/v1/models/nope/aliases/production", "/v1/models/a%0Ab"):
        assert refused(service("DELETE", path), 404)["code"] == "model_not_found"
    contents = service("DELETE", "/v1/models/vae?dry_run=true").json()
    assert (contents["versions"], contents["aliases"]) == ([1], {})
    assert service("DELETE", "/v1/models/vae").json() == contents
    assert service("GET", "/v1/models").json()["data"] == []
    assert refused(service("DELETE", "/v1/models/vae"), 404)


def test_pictures_are_added_as_a_zip(service: Service) -> None:
    response = service("PUT", "/v1/datasets/noise?image_size=16&channels=1", content=pictures())
    assert response.status_code == 201
    info = response.json()["info"]
    assert (info["kind"], info["channels"], info["height"], info["num_classes"]) == ("image", 1, 16, 2)


@pytest.mark.parametrize(
    ("name", "query", "content", "status"),
    [
        ("lines", "", b"short", 400),
        ("lines", "", b"\xff\xfe" * 5000, 400),
        ("lines", "?image_size=16", TEXT, 400),
        ("lines", "?image_size=1", TEXT, 400),
        ("lines", "?channels=2", TEXT, 400),
        ("lines", "?size=16", TEXT, 400),
        ("digits", "", TEXT, 409),
        ("Lines", "", TEXT, 400),
        ("..", "", TEXT, 404),
        ("a%2fb", "", TEXT, 404),
        ("lines", "", b"PK\x03\x04 no zip", 400),
    ],
)
def test_data_that_does_not_fit_is_refused(
    service: Service, name: str, query: str, content: bytes, status: int
) -> None:
    error = refused(service("PUT", f"/v1/datasets/{name}{query}", content=content), status)
    assert "/tmp" not in error["message"]
    assert service.storage.list("") == []


def test_a_built_in_dataset_cannot_be_deleted(service: Service) -> None:
    for query in ("", "?dry_run=true"):
        error = refused(service("DELETE", f"/v1/datasets/digits{query}"), 409)
        assert error["message"] == "'digits' is a built-in dataset; only added datasets can be deleted"


def test_an_upload_has_a_limit_of_its_own(file_storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "UPLOADS", StreamedRoute("PUT", "/v1/datasets/", BodyLimit(20_000, 30.0)))
    service = Service(file_storage)
    assert service("PUT", "/v1/datasets/lines", content=TEXT).status_code == 201

    def parts() -> Any:
        yield from [b"x" * 1000] * 25

    with served(service.app) as url:
        response = httpx.put(f"{url}/v1/datasets/more", content=parts())
        assert response.status_code == 413
        assert httpx.put(f"{url}/v1/datasets/more", content=b"x" * 20_001).status_code == 413
    assert [key for key in file_storage.list("datasets/") if "more" in key] == []


def test_an_upload_that_breaks_off_is_nothing(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    with served(service.app) as url:
        address = httpx.URL(url)
        for _ in range(UPLOADS_AT_ONCE + 1):  # each upload must release its slot
            with socket.create_connection((address.host, address.port)) as client:
                head = "PUT /v1/datasets/lines HTTP/1.1\r\nhost: x\r\ncontent-length: 20000\r\n\r\n"
                client.sendall(head.encode() + TEXT[:5000])
        deadline = time.monotonic() + 20
        while httpx.put(f"{url}/v1/datasets/whole", content=TEXT).status_code == 429:
            assert time.monotonic() < deadline
    assert [key for key in service.storage.list("datasets/") if "lines" in key] == []
    assert "Traceback" not in caplog.text


def test_uploads_are_checked_one_at_a_time(file_storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, add = Keys(file_storage), uploads.add
    tokens = [keys.create(name, ("submit",))[1] for name in ("one", "two")]
    at_once = threading.Barrier(2)
    together: list[bool] = []

    def counted(*given: Any, **options: Any) -> Any:
        with contextlib.suppress(threading.BrokenBarrierError):
            at_once.wait(0.5)
        together.append(not at_once.broken)
        return add(*given, **options)

    monkeypatch.setattr(uploads, "add", counted)
    with served(Service(file_storage, keys).app) as url, ThreadPoolExecutor(2) as pool:

        def put(token: str) -> int:
            headers = {"authorization": f"Bearer {token}"}
            return httpx.put(f"{url}/v1/datasets/{token[3:11]}", content=TEXT, headers=headers).status_code

        assert list(pool.map(put, tokens)) == [201, 201]
    assert together == [False, False]


# Counts


def test_counts_for_prometheus(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = FailingStorage()
    service = Service(storage)
    job = service.submit("a", "b", "c")
    service.move(job, "a", "running", attempt=1)
    service.queue({"cpus": 1, "gpus": 0}, (job, "b", "no room"), (job, "c", "no room"))
    response = service("GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = set(response.text.splitlines())
    assert {
        'genmodels_open_runs{state="running"} 1.0',
        'genmodels_open_runs{state="queued"} 2.0',
        'genmodels_open_runs{state="failed"} 0.0',
        "genmodels_queue_length 2.0",
        "genmodels_storage_up 1.0",
    } <= lines
    assert job not in response.text
    (age,) = re.findall(r"^genmodels_queue_oldest_seconds (\S+)$", response.text, re.M)
    assert 0 <= float(age) < 3600
    ATTEMPTS.labels("stopped").inc()
    text = service("GET", "/metrics").text
    assert 'genmodels_attempts_ended_total{cause="stopped"}' in text, "what this process counts"
    monkeypatch.setenv(DIRECTORY, "read")
    with_exporter = JobMetrics(Views(storage)).text().decode()
    assert "genmodels_open_runs{" in with_exporter
    assert "genmodels_attempts_ended_total" not in with_exporter, "each counter is exported once"
    storage.away = True
    assert "genmodels_storage_up 1.0" in service("GET", "/metrics").text  # cached: scrapes cost nothing
    assert storage.refused == 0
    monkeypatch.setattr(metrics, "CACHE_TTL_SECONDS", 0.0)
    deadline = time.monotonic() + 30  # values of a slow read are cached longer
    while "genmodels_storage_up 0.0" not in (down := service("GET", "/metrics").text):
        assert time.monotonic() < deadline, down
    assert "genmodels_open_runs{" not in down


# The page for people


def test_the_page_names_every_route_and_fetches_nothing(service: Service) -> None:
    response = service("GET", "/docs")
    assert response.headers["content-security-policy"].startswith("default-src 'none'")
    document = service("GET", "/openapi.json").json()
    for path, methods in document["paths"].items():
        for method in methods:
            assert f"<b>{method.upper()}</b> {html.escape(path)}" in response.text
    assert re.findall(r"<(script|link|img|iframe|object)|src=|@import|url\(", response.text) == []
    assert set(re.findall(r'href="([^#"]+)', response.text)) == {"/openapi.json"}
    assert "Needs a key" not in response.text  # no key is required here
    assert service("GET", "/").headers["location"] == "/docs"


def test_the_page_escapes_everything() -> None:
    hostile = "<script>alert(1)</script>\"'&"
    operation = {
        "summary": hostile,
        "description": hostile,
        "security": [{"key": [hostile]}],
        "parameters": [{"name": hostile, "in": hostile, "description": hostile, "schema": {"default": hostile}}],
        "requestBody": {"content": {hostile: {"example": hostile, "schema": {"title": hostile}}}},
        "responses": {"200" + hostile: {"content": {"x": {"schema": {"title": hostile}}}}},
    }
    document = {"info": {"title": hostile, "description": hostile}, "paths": {"/" + hostile: {"get": operation}}}
    text = docs.page(document)
    assert "<script" not in text
    assert hostile not in text
    assert text.count("&lt;script&gt;") > 10


def test_the_document_is_whole(service: Service) -> None:
    document = service("GET", "/openapi.json").json()
    schemas = document["components"]["schemas"]
    named = set(re.findall(r'"#/components/schemas/([^"]+)"', str(document).replace("'", '"')))
    assert named <= set(schemas)
    assert "#/$defs/" not in str(document)
    assert {"JobSpec", "JobView", "RunView", "Error"} <= set(schemas)


# The process


def test_without_keys_it_is_for_this_machine_alone(file_storage: Storage) -> None:
    for host in ("0.0.0.0", "10.0.0.1", "::"):
        with pytest.raises(GenmodelsError, match=r"127\.0\.0\.1"):
            app.check_access(file_storage, host, no_auth=True)
    assert app.check_access(file_storage, "127.0.0.1", no_auth=True) is None
    with pytest.raises(GenmodelsError, match="keys create"):
        app.check_access(file_storage, "127.0.0.1", no_auth=False)


def test_a_caller_without_keys_may_do_all() -> None:
    caller = Caller()
    caller.require(["anything"])
    caller.require_all_models()
    assert (caller.id, caller.reason, caller.may_use(["anything"])) == ("", "by hand", True)


def test_the_process_starts_serves_and_ends_in_order(tmp_path: Path) -> None:
    """The cluster is not reachable: the service does not depend on it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    storage = open_storage((tmp_path / "store").as_uri())
    command = [sys.executable, "-m", "services.jobs", "--storage", storage.url, "--port", str(port)]
    refused_to = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (refused_to.returncode, refused_to.stderr.count("\n")) == (1, 1)
    assert refused_to.stderr.startswith("error: file:///")
    log = tmp_path / "log"
    environment = {**os.environ, "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}
    with log.open("wb") as output:
        process = subprocess.Popen([*command, "--no-auth"], stdout=output, stderr=output, env=environment)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while True:
            try:
                assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
                break
            except httpx.TransportError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
        job = httpx.post(f"{url}/v1/jobs", json=spec("life")).json()["job"]
        while not httpx.get(f"{url}/v1/jobs/{job}").json()["models"][0]["position"]:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        (run,) = httpx.get(f"{url}/v1/jobs/{job}").json()["models"]
        assert (run["state"], run["position"], "does not answer" in run["wait"]) == ("queued", 1, True)
        assert httpx.get(f"{url}/healthz", headers={"host": "evil.example"}).status_code == 403
        with httpx.stream("GET", f"{url}/v1/jobs/{job}/logs?follow=true", timeout=60) as stream:
            process.send_signal(signal.SIGTERM)
            assert list(stream.iter_lines()) == []  # a follower gets a regular end of the stream
        assert process.wait(30) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text()
    assert Lease(storage).try_acquire()  # at once: the process released the lease
    assert Jobs(storage).open() == [job]


def test_healthz_needs_no_store() -> None:
    storage = FailingStorage()
    storage.away = True
    assert ask(Service(storage).app, "GET", "/healthz").json() == {"status": "ok"}
