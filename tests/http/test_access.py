"""Test every route in the OpenAPI documents of both APIs with every kind of caller: permissions and HTTP rules."""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from genmodels import keys as keys_module
from genmodels.errors import GenmodelsError, RequestError
from genmodels.keys import Keys
from genmodels.runs.jobs import Jobs
from genmodels.spec.parse import parse_spec
from genmodels.storage import Storage, open_storage
from services.gateway.model_host import ModelHost
from services.gateway.routes import create_app as create_gateway
from services.http import auth
from services.http.auth import KeyAuth, require_keys
from services.jobs.app import create_app as create_job_app
from services.jobs.routes import FOLLOWERS
from tests.support.asgi_client import PICTURE, ask, refused
from tests.support.published_models import publish
from tests.support.storages import FailingStorage

SPEC = b"""
name: mine
models:
  - {name: clothing, model: {family: vae}, data: {dataset: digits}}
"""
YAML = {"content-type": "application/yaml"}
UNKNOWN = "gm_00000000_" + "x" * 43
CALLERS = ("no key", "unknown", "garbage", "revoked", "generate", "submit", "admin", "limited", "limited-admin")
KEYLESS = ("no key", "unknown", "garbage", "revoked")


@dataclass(frozen=True)
class Rule:
    """Describe what a route needs, and a valid request to it."""

    scopes: tuple[str, ...]  # any of these scopes; empty: open to all
    body: Any = None
    limited: str = "refused"  # what a key that is limited to other models gets: "refused", "nothing" or "built-in"
    options: dict[str, Any] | None = None


IMAGE = {"images": [PICTURE]}
LATENT = {"latents": [[0.0] * 4]}
RULES: dict[str, dict[str, Rule]] = {
    "gateway": {
        "GET /healthz": Rule(()),
        "GET /v1/models": Rule(("generate",), limited="nothing"),
        "GET /v1/models/{model}": Rule(("generate",)),
        "GET /v1/models/{model}/history": Rule(("generate",)),
        "GET /v1/models/{model}/samples/{step}/{name}": Rule(("generate",)),
        "GET /v1/models/{model}/vocabulary": Rule(("generate",)),
        "POST /v1/completions": Rule(("generate",), {"model": "clothing", "prompt": "a"}),
        "POST /v1/images/generations": Rule(("generate",), {"model": "clothing", "prompt": ""}),
        "POST /v1/models/{model}/encode": Rule(("generate",), IMAGE),
        "POST /v1/models/{model}/decode": Rule(("generate",), LATENT),
        "POST /v1/models/{model}/reconstruct": Rule(("generate",), IMAGE),
        "POST /v1/models/{model}/denoise": Rule(("generate",), IMAGE),
        "POST /v1/models/{model}/interpolate": Rule(("generate",), {"start": 1, "end": 2}),
    },
    "jobs": {
        "GET /healthz": Rule(()),
        "GET /metrics": Rule(()),
        "POST /v1/jobs": Rule(("submit",), options={"content": SPEC, "headers": YAML}),
        "GET /v1/jobs": Rule(("submit",), limited="nothing"),
        "GET /v1/jobs/{job}": Rule(("submit",)),
        "GET /v1/jobs/{job}/logs": Rule(("submit",)),
        "GET /v1/jobs/{job}/metrics": Rule(("submit",)),
        "POST /v1/jobs/{job}/cancel": Rule(("submit",)),
        "POST /v1/jobs/{job}/resume": Rule(("submit",)),
        "DELETE /v1/jobs/{job}": Rule(("admin",)),
        "GET /v1/models": Rule(("submit", "generate"), limited="nothing"),
        "GET /v1/models/{model}": Rule(("submit", "generate")),
        "GET /v1/models/{model}/versions/{number}": Rule(("submit",)),
        "GET /v1/models/{model}/versions/{number}/files/{name}": Rule(("submit",)),
        "DELETE /v1/models/{model}/versions/{number}": Rule(("admin",)),
        "DELETE /v1/models/{model}": Rule(("admin",), options={"params": {"dry_run": "true"}}),
        "PUT /v1/models/{model}/aliases/{alias}": Rule(("submit",), {"version": 1}),
        "DELETE /v1/models/{model}/aliases/{alias}": Rule(("admin",)),
        "POST /v1/gc": Rule(("admin",)),
        "GET /v1/datasets": Rule(("submit",), limited="built-in"),
        "PUT /v1/datasets/{name}": Rule(("submit",), options={"content": b"too little"}),
        "DELETE /v1/datasets/{name}": Rule(("admin",)),
    },
}


@dataclass(frozen=True)
class Place:
    apps: dict[str, Any]
    tokens: dict[str, str | None]
    names: dict[str, str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Return both applications over a store with a job, a model and all kinds of keys."""
    storage = open_storage(tmp_path_factory.mktemp("auth").as_uri())
    publish(storage, "clothing", "vae")
    job, _ = Jobs(storage).submit(parse_spec(SPEC, "spec"))
    keys = Keys(storage)
    tokens: dict[str, str | None] = {"no key": None, "unknown": UNKNOWN, "garbage": "'; drop"}
    for scope in ("generate", "submit", "admin"):
        tokens[scope] = keys.create(scope, (scope,))[1]
    tokens["limited"] = keys.create("limited", ("generate", "submit"), ("other-", "mine-"))[1]
    tokens["limited-admin"] = keys.create("limited-admin", ("admin",), ("other-",))[1]
    revoked, tokens["revoked"] = keys.create("revoked", ("admin",))
    keys.revoke(revoked.id)
    apps = {
        "gateway": create_gateway(ModelHost(storage.url), hosts=None, keys=Keys(storage)),
        "jobs": create_job_app(storage, keys=Keys(storage), hosts=None),
    }
    names = {"job": job, "model": "clothing", "number": "1", "name": "config.json", "alias": "production", "step": "1"}
    return Place(apps, tokens, names)


def routes(app: Any) -> list[str]:
    return [f"{method.upper()} {path}" for path, methods in app.openapi()["paths"].items() for method in methods]


def send(place: Place, app: str, route: str, caller: str, as_method: str = "", **headers: str) -> Any:
    rule, (method, path) = RULES[app][route], route.split()
    names = dict(place.names)
    if "datasets" in path or "samples" in path:
        names["name"] = "texts" if "datasets" in path else "samples.png"
    token, options = place.tokens[caller], dict(rule.options or {})
    options["headers"] = {**options.get("headers", {}), **headers}
    if token:
        options["headers"]["authorization"] = f"Bearer {token}"
    return ask(place.apps[app], as_method or method, path.format(**names), rule.body, **options)


@pytest.mark.parametrize("app", RULES)
def test_there_is_a_rule_for_every_route(place: Place, app: str) -> None:
    assert set(routes(place.apps[app])) == set(RULES[app])


@pytest.mark.parametrize("app", RULES)
def test_every_route_for_every_caller(place: Place, app: str) -> None:
    mismatches = []
    for route, rule in RULES[app].items():
        for caller in CALLERS:
            response = send(place, app, route, caller)
            code = response.json()["error"]["code"] if response.status_code in (401, 403) else None
            outcome = (response.status_code, code) if code else "in"
            expected = expectation(route, rule, caller)
            if outcome != expected or response.status_code >= 500:
                mismatches.append((route, caller, response.status_code, outcome, expected))
    assert mismatches == []


def expectation(route: str, rule: Rule, caller: str) -> Any:
    if not rule.scopes:
        return "in"
    if caller in KEYLESS:
        return (401, "no_key" if caller == "no key" else "wrong_key")
    scopes = {"limited": ("generate", "submit"), "limited-admin": ("admin",)}.get(caller, (caller,))
    if "admin" not in scopes and not set(scopes) & set(rule.scopes):
        return (403, "scope")
    if caller.startswith("limited") and rule.limited == "refused":
        return (403, "limited" if route == "POST /v1/gc" else "not_this_keys_model")
    return "in"


@pytest.mark.parametrize("app", RULES)
def test_openapi_says_which_scopes_a_route_needs(place: Place, app: str) -> None:
    document = place.apps[app].openapi()
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for route, rule in RULES[app].items():
        method, path = route.split()
        security = document["paths"][path][method.lower()].get("security", [])
        assert {scope for need in security for scope in need["key"]} == set(rule.scopes), route


@pytest.mark.parametrize("app", RULES)
def test_a_limited_key_is_shown_nothing_of_others(place: Place, app: str) -> None:
    for route, rule in RULES[app].items():
        if rule.limited == "nothing":
            assert send(place, app, route, "limited").json()["data"] == []
            assert send(place, app, route, "admin").json()["data"] != []


@pytest.mark.parametrize("app", RULES)
def test_head_is_answered_as_get_is_without_the_body(place: Place, app: str) -> None:
    for route in filter(lambda route: route.startswith("GET"), RULES[app]):
        for caller in ("admin", "no key", "limited"):
            head, get = (send(place, app, route, caller, method) for method in ("HEAD", "GET"))
            assert (head.status_code, head.content) == (get.status_code, b""), (route, caller)
            differing = {
                name for name in {*head.headers, *get.headers} if head.headers.get(name) != get.headers.get(name)
            }
            assert differing <= {"x-request-id", "content-length"}, (
                route,
                caller,
            )  # except the length: /metrics counts itself
    for path in ("/docs", "/openapi.json", "/none"):
        head, get = (ask(place.apps[app], method, path) for method in ("HEAD", "GET"))
        assert (head.status_code, head.content) == (get.status_code, b"")
        assert head.headers["content-length"] == get.headers["content-length"] != "0"


def test_head_gives_back_at_once_what_it_takes(place: Place) -> None:
    """HEAD releases a log without an end, and a file; only a limited number of files is read at the same time."""
    headers = {"authorization": f"Bearer {place.tokens['submit']}"}
    for path in (f"/v1/jobs/{place.names['job']}/logs?follow=true", "/v1/models/clothing/versions/1/files/config.json"):
        for _ in range(FOLLOWERS[1] + 10):
            response = ask(place.apps["jobs"], "HEAD", path, headers=headers)
            assert (response.status_code, response.content) == (200, b"")


def test_head_is_405_where_get_is_and_the_allow_header_tells_it(place: Place) -> None:
    assert ask(place.apps["gateway"], "HEAD", "/v1/completions").status_code == 405
    for app in place.apps.values():
        assert ask(app, "PUT", "/healthz").headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "x-gzip", "deflate", "br", "zstd", "gzip, identity", "none"])
@pytest.mark.parametrize("app", RULES)
def test_an_encoded_body_is_415_and_names_the_encoding(place: Place, app: str, coding: str) -> None:
    for route in RULES[app]:
        response = send(place, app, route, "admin", **{"content-encoding": coding})
        if route.startswith("GET"):
            assert response.status_code != 415
            continue
        error = refused(response, 415)
        assert (error["param"], response.headers["accept-encoding"]) == ("content-encoding", "identity")
        assert repr(coding.lower()) in error["message"]
        assert send(place, app, route, "no key", **{"content-encoding": "identity"}).status_code != 415


def test_no_key_is_401_and_says_how_to_have_one(place: Place) -> None:
    response = ask(place.apps["jobs"], "GET", "/v1/jobs")
    assert response.headers["www-authenticate"] == "Bearer"
    error = refused(response, 401)
    assert error["type"] == "authentication_error"
    assert "genmodels keys create" in error["message"]
    for header in ("Basic abc", "Bearer", "bearer  ", "gm_00000000"):
        assert refused(ask(place.apps["jobs"], "GET", "/v1/jobs", headers={"authorization": header}), 401)


def test_a_limited_key_submits_only_what_is_its_own(place: Place) -> None:
    app, token = place.apps["jobs"], place.tokens["limited"]
    headers = {**YAML, "authorization": f"Bearer {token}"}
    own = SPEC.replace(b"name: clothing", b"name: mine-a")
    job = ask(app, "POST", "/v1/jobs", content=own, headers=headers)
    assert job.status_code == 201
    assert [entry["job"] for entry in ask(app, "GET", "/v1/jobs", headers=headers).json()["data"]] == [
        job.json()["job"]
    ]
    borrowed = own.replace(b"digits}", b"digits}, train: {init_from: clothing@1}")
    error = refused(ask(app, "POST", "/v1/jobs", content=borrowed, headers=headers), 403)
    assert "'clothing@1'" in error["message"]
    assert "mine-..." in error["message"]


def test_pages_for_browsers_are_open_and_tell_nothing(place: Place) -> None:
    page = ask(place.apps["gateway"], "GET", "/")
    assert page.status_code == 200
    assert "clothing" not in page.text
    for app in place.apps.values():
        for path in ("/docs", "/openapi.json"):
            response = ask(app, "GET", path)
            assert response.status_code == 200
            assert place.names["job"] not in response.text


def test_a_revoked_key_works_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "FRESH_SECONDS", 0.0)
    storage = open_storage(tmp_path.as_uri())
    key, token = Keys(storage).create("me", ("submit",))
    app = create_job_app(storage, keys=Keys(storage), hosts=None)
    headers = {"authorization": f"Bearer {token}"}
    assert ask(app, "GET", "/v1/jobs", headers=headers).status_code == 200
    Keys(storage).revoke(key.id)
    assert refused(ask(app, "GET", "/v1/jobs", headers=headers), 401)["code"] == "wrong_key"


def test_tokens_reach_no_log_and_no_answer(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "genmodels")
    for caller in ("unknown", "garbage", "submit", "revoked"):
        token = place.tokens[caller]
        assert token
        for route in ("GET /v1/jobs", "POST /v1/jobs/{job}/cancel"):
            assert token not in send(place, "jobs", route, caller).text
        assert token not in caplog.text


class Away(FailingStorage):
    """Count the keys that are looked up."""

    looked: int = 0

    def before(self, verb: str, key: str) -> None:
        if key.startswith("keys/"):
            self.looked += 1
        super().before(verb, key)


def test_invented_keys_cost_the_store_little() -> None:
    storage = Away()
    app = create_job_app(storage, keys=Keys(storage), hosts=None)
    for token in ("x", "gm_zz", UNKNOWN + "y", "gm_00000000_" + "x" * 42, "\u00fc"):
        refused(ask(app, "GET", "/v1/jobs", headers={"authorization": f"Bearer {token}".encode()}), 401)
    assert storage.looked == 0
    for _ in range(20):
        refused(ask(app, "GET", "/v1/jobs", headers={"authorization": f"Bearer {UNKNOWN}"}), 401)
    assert storage.looked == 1


def test_in_an_outage_known_keys_work_and_unknown_keys_get_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "FRESH_SECONDS", 0.0)
    storage = FailingStorage(only="keys/")
    _, token = Keys(storage).create("me", ("submit",))
    app = create_job_app(storage, keys=Keys(storage), hosts=None)
    headers = {"authorization": f"Bearer {token}"}
    assert ask(app, "GET", "/v1/jobs", headers=headers).status_code == 200
    storage.away = True
    assert ask(app, "GET", "/v1/jobs", headers=headers).status_code == 200
    response = ask(app, "GET", "/v1/jobs", headers={"authorization": f"Bearer {UNKNOWN}"})
    assert (refused(response, 503)["code"], response.headers["retry-after"]) == ("storage_away", "1")


class Slow:
    """Make lookups of keys wait; one token is valid."""

    def __init__(self) -> None:
        self.go, self.slow = threading.Event(), False

    def check(self, token: str) -> Any:
        if token != "right":
            self.go.wait(30)
            return None
        return object()


def test_guessed_keys_do_not_delay_known_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "MAX_WAITING", 6)
    keys = Slow()
    auth_dependency = KeyAuth(keys)

    async def flood() -> None:
        assert await auth_dependency._lookup(keys, "right")
        guesses = [asyncio.ensure_future(auth_dependency._lookup(keys, f"guess {i}")) for i in range(10)]
        await asyncio.sleep(0)
        assert await auth_dependency._lookup(keys, "right")
        keys.go.set()
        results = await asyncio.gather(*guesses, return_exceptions=True)
        assert results[:6] == [None] * 6
        assert [error.status for error in results[6:] if isinstance(error, RequestError)] == [429] * 4

    asyncio.run(flood())


def test_without_a_key_in_the_store_a_service_does_not_start(file_storage: Storage) -> None:
    with pytest.raises(GenmodelsError, match=r"genmodels keys create NAME --storage file://.* --no-auth"):
        require_keys(file_storage)
    key, _ = Keys(file_storage).create("me", ("submit",))
    assert require_keys(file_storage)
    Keys(file_storage).revoke(key.id)
    with pytest.raises(GenmodelsError):
        require_keys(file_storage)
