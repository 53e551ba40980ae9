"""Fuzz the job API: every request soon gets a 2xx, or a 4xx in the format of the API's errors; never a 5xx."""

from __future__ import annotations

import copy
import json
import time
import uuid
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from tests.support.asgi_client import ask
from tests.support.job_service import YAML, Service, spec
from tests.support.published_models import publish
from tests.support.storages import MemoryStorage

SECONDS = 1.0  # CPU time of this process; other processes of the machine do not count
ROUNDS = [40, pytest.param(1000, marks=pytest.mark.long)]
OPERATIONS = 22


@pytest.fixture(scope="module")
def service() -> Service:
    """Return a service with an open job, an ended job and a model; the fuzzer knows their names."""
    service = Service(MemoryStorage(), closing=lambda: True)
    service.app.openapi()  # as the process does when it starts: imports the families
    publish(service.storage, "clothes", "vae")
    publish(service.storage, "words", "minigpt")
    service.submit("a", "b", name="open")
    ended = service.submit("a", name="ended")
    service.log(ended, "a", 1, "driver", 1, ("1", "line"))
    service.move(ended, "a", "failed")
    return service


def check(response: httpx.Response, began: float) -> None:
    assert response.status_code < 500, response.text
    assert uuid.UUID(response.headers["x-request-id"])
    if response.status_code >= 400:
        assert time.process_time() - began < SECONDS
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert 0 < len(error["message"]) < 20_000
        assert "Traceback" not in error["message"]


def fuzz(n: int, strategy: st.SearchStrategy[Any], send: Callable[[Any], httpx.Response]) -> None:
    @settings(max_examples=n, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(value: Any) -> None:
        began = time.process_time()
        check(send(value), began)

    run()


# Every route in the OpenAPI document


@pytest.mark.parametrize("n", ROUNDS)
@pytest.mark.parametrize("number", range(OPERATIONS))
def test_every_route(service: Service, number: int, n: int) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", service.app)
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert len(operations) == OPERATIONS
    operation = operations[number]
    jobs = [*service.jobs.open(), *(entry.job for _, entry in service.jobs.ended())]
    known = {
        "job": jobs,
        "model": ["clothes"],
        "number": [1],
        "name": ["config.json", "texts"],
        "alias": ["production"],
    }

    @settings(max_examples=n, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy() | operation.as_strategy(GenerationMode.NEGATIVE), st.data())
    def run(case: Any, data: st.DataObject) -> None:
        for name, values in known.items():
            if name in (case.path_parameters or {}) and values and data.draw(st.booleans()):
                case.path_parameters[name] = data.draw(st.sampled_from(values))
        began = time.process_time()
        response = case.call()
        assert response.status_code < 400 or time.process_time() - began < SECONDS
        case.validate_response(
            response, checks=(not_a_server_error, content_type_conformance, response_schema_conformance)
        )
        assert response.status_code < 400 or set(response.json()) == {"error"}

    run()


# Specs


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=30),
    st.sampled_from(["../..", "a/b", "\0", "nan", "1e999", "no", "digits", "a" * 100, "@", "a@1", "__class__"]),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=8), st.integers(), max_size=3),
)
DOCUMENT = spec("fuzz", "a", "b", priority=1)
DOCUMENT["models"][0] |= {
    "train": {"max_steps": 10, "batch_size": 8, "learning_rate": 1e-3, "betas": [0.9, 0.99]},
    "scaling": {"num_workers": {"min": 1, "max": 4}, "use_gpu": False},
    "checkpoints": {"num_to_keep": 3},
    "serve": {"alias": "production", "gate": {"metric": "val_loss", "max": 1.0}, "pool": "default"},
}
DOCUMENT["models"][1] |= {
    "model": {"family": "minigpt", "n_embd": 16, "n_layer": 1, "n_head": 2, "block_size": 16},
    "data": {"dataset": "shakespeare"},
    "train": {"init_from": "words@1"},
}


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(below for key, part in inner for below in paths(part, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """Return a valid spec after one to four changes: a value replaced, removed, added or moved."""
    document: Any = copy.deepcopy(DOCUMENT)
    for _ in range(draw(st.integers(1, 4))):
        *way, last = draw(st.sampled_from(paths(document)[1:]))
        place = document
        for key in way:
            place = place[key]
        match draw(st.sampled_from(["change", "remove", "add", "move"])):
            case "change":
                place[last] = draw(ODD)
            case "remove":
                del place[last]
            case "add" if isinstance(place, dict):
                place[draw(st.text(max_size=8) | st.sampled_from(["path", "sha256", "family", "extra"]))] = draw(ODD)
            case "move":
                place[last] = copy.deepcopy(document)
        if not (isinstance(document, dict) and len(paths(document)) > 1):
            break
    return document


@pytest.mark.parametrize("n", ROUNDS)
@pytest.mark.parametrize("form", ["json", "yaml"])
def test_specs_that_are_nearly_right(service: Service, form: str, n: int) -> None:
    def send(document: Any) -> httpx.Response:
        if form == "json":
            body, headers = json.dumps(document).encode(), {"content-type": "application/json"}
        else:
            body, headers = yaml.safe_dump(document, allow_unicode=True).encode(errors="surrogatepass"), YAML
        query = "?dry_run=true" if len(body) % 2 else ""
        return ask(service.app, "POST", f"/v1/jobs{query}", content=body, headers=headers)

    fuzz(n, mutated(), send)


FRAGMENTS = (
    *("name: a", "models:", "- ", "  ", "\n", "&a", "*a", "!!python/object:os.system", "{", "}", "[", "]", ": ", "? "),
    *("|", ">", "'", '"', "#", "%YAML 1.1", "---", "...", "\t", "\u2028", "<<: *a", "0x1p3", "1_000", "2001-01-01"),
    *("!!binary", "~", "null"),
)
YAMLISH = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=60).map(
    lambda parts: "".join(parts).encode(errors="surrogatepass")
)


@pytest.mark.parametrize("n", ROUNDS)
@pytest.mark.parametrize("kind", ["bytes", "yaml"])
def test_bodies_that_are_no_specs(service: Service, kind: str, n: int) -> None:
    strategy = st.binary(max_size=400) if kind == "bytes" else YAMLISH
    fuzz(n, strategy, lambda body: service.post(body))


@pytest.mark.parametrize(
    "body",
    [
        b"a: &a [x,x,x]\n" + b"".join(b"%c: &%c [*%c,*%c]\n" % (c + 1, c + 1, c, c) for c in range(97, 117)),
        b"[" * 65_536,
        b"{a: " * 16_000,
        b"? " * 30_000,
        b"a: [" + b"[]," * 21_000 + b"]",
        b"{" + b"a:," * 20_000 + b"}",
        b"- " * 32_000,
        b"x: " + b"9" * 65_000,
        b"x: !!python/object/apply:os.system ['true']",
        b"!" * 65_536,
        b"name: a\nmodels: [" + b"{}," * 20_000 + b"]",
        b"name: a\nmodels: [" + b"{name: a, model: {family: vae}, data: {dataset: digits}}," * 1_100 + b"]",
        b"name: a\nmodels:\n" + b"- {name: a, model: {family: gan}, data: {path: /dev/zero}}\n" * 1_000,
        b'{"name": "a", "models": [' + b'{"name": "\\ud800"},' * 2_000 + b"{}]}",
        b"#" * 65_536,
        b"\xef\xbb\xbf" * 20_000,
    ],
)
def test_the_worst_that_fits_is_refused_soon(service: Service, body: bytes) -> None:
    before = len(service.jobs.open())
    assert len(body) <= 65_536
    began = time.process_time()
    response = service.post(body)
    check(response, began)
    assert response.status_code == 400
    assert len(service.jobs.open()) == before


# Other bodies, headers and names


@pytest.mark.parametrize("n", ROUNDS)
@pytest.mark.parametrize("action", ["cancel", "resume"])
def test_commands(service: Service, action: str, n: int) -> None:
    job = service.jobs.open()[0]
    fields = st.dictionaries(st.sampled_from(["now", "models", "x"]), ODD | st.just(["a"]), max_size=3)
    bodies = fields.map(json.dumps).map(str.encode) | st.binary(max_size=50)
    fuzz(n, bodies, lambda body: service("POST", f"/v1/jobs/{job}/{action}", body))


@pytest.mark.parametrize("n", ROUNDS)
def test_names_cannot_leave_their_prefix(service: Service, n: int) -> None:
    before = set(service.storage.list(""))
    pieces = st.sampled_from(
        ["..", ".", "/", "%2e", "%2f", "%00", "a", "A", "-", "jobs", "keys", "\u00e9", "%", "\\", ";"]
    )
    names = st.lists(pieces, min_size=1, max_size=6).map("".join)
    forms = st.sampled_from(
        [
            ("GET", "/v1/jobs/{}"),
            ("GET", "/v1/jobs/{}/logs?source={}"),
            ("POST", "/v1/jobs/{}/cancel"),
            ("DELETE", "/v1/jobs/{}"),
            ("GET", "/v1/models/{}/versions/1"),
            ("GET", "/v1/models/clothes/versions/1/files/{}"),
            ("DELETE", "/v1/models/{}/versions/1"),
            ("GET", "/v1/jobs?after={}"),
        ]
    )

    def send(drawn: tuple[tuple[str, str], str]) -> httpx.Response:
        (method, form), name = drawn
        return service(method, form.format(name, name))

    fuzz(n, st.tuples(forms, names), send)
    assert set(service.storage.list("")) == before
