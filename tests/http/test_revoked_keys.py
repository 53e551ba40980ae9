"""Test keys that are revoked during a response: long responses end soon and do not look complete."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import httpx
import pytest

from genmodels import keys as keys_module
from genmodels.errors import RequestError, StorageUnavailable
from genmodels.keys import Key, Keys
from genmodels.runs.store import Run
from genmodels.storage import Storage
from services.gateway.model_host import ModelHost
from services.gateway.routes import create_app
from services.http import auth
from services.http.connections import Connection
from services.jobs import lines, routes
from services.jobs.app import create_app as create_job_app
from tests.support.asgi_server import served
from tests.support.job_service import Service
from tests.support.published_models import publish
from tests.support.run_parts import write_metrics


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make cached keys expire quickly."""
    monkeypatch.setattr(keys_module, "FRESH_SECONDS", 0.0)
    monkeypatch.setattr(auth, "RECHECK_SECONDS", 0.0)
    monkeypatch.setattr(routes, "FOLLOW_SECONDS", 0.02)


@pytest.fixture
def key(file_storage: Storage) -> tuple[Key, dict[str, str]]:
    made, token = Keys(file_storage).create("a", ("submit", "generate"))
    return made, {"authorization": f"Bearer {token}"}


def test_logs_are_followed_no_further(
    file_storage: Storage, key: tuple[Key, dict[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    """The stream is cut off, and the log has one line about it."""
    service = Service(file_storage)
    job = service.submit("a")
    service.log(job, "a", 1, "0", 1, ("1", "one"))
    app = create_job_app(file_storage, keys=Keys(file_storage), hosts=None)
    path = f"/v1/jobs/{job}/logs?follow=true"
    with (
        served(app, http=Connection, log_level="info") as url,
        httpx.stream("GET", f"{url}{path}", headers=key[1], timeout=20) as stream,
    ):
        lines = stream.iter_lines()
        assert next(lines) == "1 a/0 one"
        caplog.clear()
        Keys(file_storage).revoke(key[0].id)
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
    (line,) = (record for record in caplog.records if record.levelno > logging.INFO)
    assert line.getMessage().endswith("ends: this key was revoked during the answer")
    assert line.exc_info is None


def test_metrics_are_sent_no_further(
    file_storage: Storage, key: tuple[Key, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "LINES_AT_ONCE", 1)
    service = Service(file_storage)
    job = service.submit("a")
    run = Run(file_storage, job, "a")
    run.start_attempt(1, None, 1)
    write_metrics(run, 1, [{"step": step, "loss": 1.0} for step in range(1, 5000)])
    app = create_job_app(file_storage, keys=Keys(file_storage), hosts=None)
    with served(app) as url, httpx.stream("GET", f"{url}/v1/jobs/{job}/metrics", headers=key[1], timeout=20) as stream:
        parts = stream.iter_raw()
        next(parts)
        Keys(file_storage).revoke(key[0].id)
        with pytest.raises(httpx.RemoteProtocolError):
            list(parts)


def test_a_stream_of_text_ends_in_an_error(file_storage: Storage, key: tuple[Key, dict[str, str]]) -> None:
    publish(file_storage, "play", "minigpt")
    app = create_app(ModelHost(file_storage.url), hosts=None, keys=Keys(file_storage))
    body = {"model": "play", "prompt": "a", "max_tokens": 4000, "stream": True}
    with (
        served(app) as url,
        httpx.stream("POST", f"{url}/v1/completions", json=body, headers=key[1], timeout=60) as stream,
    ):
        lines = (line.removeprefix("data: ") for line in stream.iter_lines() if line)
        assert "choices" in json.loads(next(lines))
        Keys(file_storage).revoke(key[0].id)
        *_, last = lines
    assert json.loads(last)["error"]["code"] == "wrong_key"


def test_a_store_that_is_away_ends_nothing(key: tuple[Key, dict[str, str]]) -> None:
    async def away() -> Any:
        raise StorageUnavailable("away")

    async def revoked() -> Any:
        return None

    asyncio.run(auth.Caller(key[0], away).recheck())
    with pytest.raises(RequestError, match="revoked"):
        asyncio.run(auth.Caller(key[0], revoked).recheck())
