from __future__ import annotations

import base64
import io
import json
import textwrap
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from genmodels.engine.image.requests import VERB_REQUESTS
from genmodels.storage import Storage
from services.gateway.completions import CompletionBody, StreamOptions
from services.gateway.model_host import ModelHost
from services.gateway.routes import GenerationBody, create_app
from services.jobs.schemas import AliasBody, CancelBody, ResumeBody
from tests.support.asgi_client import PICTURE, ask, refused
from tests.support.published_models import VOCABULARY, publish_examples


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Return a registry with a text model, a VAE of two versions, and a model without the alias production."""
    return publish_examples(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def app(models: Storage) -> Any:
    return create_app(ModelHost(models.url))


def size_of(b64: str) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(b64))).size


# Models


def test_models_are_listed_as_openai_does_with_what_they_are(app: Any) -> None:
    listed = ask(app, "GET", "/v1/models").json()
    assert listed["object"] == "list"
    entries = {entry["id"]: entry for entry in listed["data"]}
    assert set(entries) == {"play", "shapes", "clean@1"}
    shapes = entries["shapes"]
    assert shapes["created"] > 1_700_000_000
    del shapes["created"]
    assert shapes == {
        "id": "shapes",
        "object": "model",
        "owned_by": "genmodels",
        "family": "vae",
        "kind": "image",
        "verbs": ["decode", "encode", "generate", "interpolate", "reconstruct"],
        "version": 1,
        "aliases": {"production": 1, "next": 2},
        "metrics": {"val_loss": 1.5, "odd": None},
        "size": "16x16",
        "channels": 1,
        "latent_dim": 4,
    }
    assert (entries["play"]["verbs"], entries["play"]["vocab_size"]) == (["complete"], len(VOCABULARY))


@pytest.mark.parametrize(
    ("name", "version"), [("shapes", 1), ("shapes@next", 2), ("shapes@latest", 2), ("shapes@2", 2), ("shapes%402", 2)]
)
def test_a_name_means_a_version(app: Any, name: str, version: int) -> None:
    response = ask(app, "GET", f"/v1/models/{name}")
    assert (response.json()["version"], response.headers["x-genmodels-version"]) == (version, f"shapes@{version}")
    answer = ask(app, "POST", f"/v1/models/{name}/decode", {"latents": [[0, 0, 0, 0]]})
    assert (answer.json()["model"], answer.headers["x-genmodels-version"]) == (f"shapes@{version}", f"shapes@{version}")


@pytest.mark.parametrize(
    "name",
    [
        "nothing",
        "shapes@9",
        "shapes@beta",
        "clean",
        "shapes@",
        "@1",
        "..",
        "%2e%2e",
        "Shapes",
        "s" * 300,
        "shapes%00",
        "\u00fc",
    ],
)
def test_a_name_that_means_nothing_is_404(app: Any, name: str) -> None:
    assert refused(ask(app, "GET", f"/v1/models/{name}"), 404)["type"] == "not_found_error"


def test_the_error_says_where_models_are_listed(app: Any) -> None:
    error = refused(ask(app, "POST", "/v1/completions", {"model": "plays", "prompt": "x"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "GET /v1/models lists" in error["message"]
    assert "shapes" not in error["message"]  # a key may be limited to other models


# Completions


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model": "play", "prompt": "\\ud800"}',
        b'{"a": ' * 5000,
        b"1" * 5000,
    ],
)
def test_what_is_no_json_object_is_400(app: Any, body: bytes) -> None:
    assert refused(ask(app, "POST", "/v1/completions", body), 400)["code"] == "invalid_json"


BODIES = [CompletionBody, GenerationBody, StreamOptions, *VERB_REQUESTS, AliasBody, CancelBody, ResumeBody]


@pytest.mark.parametrize("kind", BODIES, ids=lambda kind: kind.__name__)
def test_null_stands_for_the_default_in_every_body(kind: Any) -> None:
    needed = {name: "x" for name in ("model", "prompt", "start", "end") if name in kind.model_fields}
    needed |= {"images": [PICTURE], "latents": [[0.5]], "version": 1}
    needed = {name: value for name, value in needed.items() if name in kind.model_fields}
    nulls = dict.fromkeys(kind.model_fields, None)
    assert kind.model_validate({**nulls, **needed}) == kind.model_validate(needed)
    assert kind.model_validate_json(json.dumps({**nulls, **needed})) == kind.model_validate(needed)


def test_a_byte_order_mark_before_json_is_passed_over(app: Any) -> None:
    body = json.dumps({"model": "play", "prompt": "x", "max_tokens": 1}).encode("utf-8-sig")
    assert ask(app, "POST", "/v1/completions", body).status_code == 200


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_are_finite(app: Any, number: str) -> None:
    body = f'{{"model": "play", "prompt": "x", "temperature": {number}}}'.encode()
    assert refused(ask(app, "POST", "/v1/completions", body), 400)["param"] == "temperature"
    body = f'{{"latents": [[0, 0, 0, {number}]]}}'.encode()
    assert refused(ask(app, "POST", "/v1/models/shapes/decode", body), 400)["param"] == "latents[0][3]"


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_body_a_foreign_page_could_send_unasked_is_refused(app: Any, content_type: str) -> None:
    body = json.dumps({"model": "play", "prompt": "x"}).encode()
    error = refused(ask(app, "POST", "/v1/completions", body, headers={"content-type": content_type}), 415)
    assert "application/json" in error["message"]


def test_a_text_model_makes_no_images(app: Any) -> None:
    error = refused(ask(app, "POST", "/v1/images/generations", {"model": "play", "prompt": ""}), 404)
    assert "it answers: complete" in error["message"]
    error = refused(ask(app, "POST", "/v1/completions", {"model": "shapes", "prompt": "x"}), 404)
    assert "interpolate" in error["message"]


# Images


def test_images_are_generated(app: Any) -> None:
    body = {
        "model": "shapes",
        "prompt": "a cat",
        "n": 3,
        "seed": 1,
        "temperature": 0.5,
        "response_format": "b64_json",
        "quality": "standard",
    }
    response = ask(app, "POST", "/v1/images/generations", body)
    answer = response.json()
    assert (answer["seed"], answer["model"], response.headers["x-genmodels-version"]) == (1, "shapes@1", "shapes@1")
    assert [size_of(item["b64_json"]) for item in answer["data"]] == [(16, 16)] * 3
    assert ask(app, "POST", "/v1/images/generations", {**body, "prompt": "a dog"}).json()["data"] == answer["data"]
    assert ask(app, "POST", "/v1/images/generations", {**body, "temperature": 1.0}).json()["data"] != answer["data"]
    assert len(ask(app, "POST", "/v1/images/generations", {**body, "grid": True}).json()["data"]) == 1


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"size": "1024x1024"}, "size", "'16x16'"),
        ({"size": 16}, "size", "expected text"),
        ({"response_format": "url"}, "response_format", "b64_json"),
        ({"response_format": "png"}, "response_format", "b64_json"),
        ({"n": 0}, "n", "at least 1"),
        ({"n": 10**30}, "n", "at most 64"),
        ({"quality": "hd"}, "quality", "not supported"),
        ({"stream": True}, "stream", "not supported"),
        ({"background": "transparent"}, "background", "not supported"),
        ({"grid": 1}, "grid", "true or false"),
        ({"top_k": 1}, "top_k", "unknown key"),
    ],
)
def test_a_wrong_generation_is_400_and_names_the_field(app: Any, fields: dict[str, Any], param: str, says: str) -> None:
    error = refused(ask(app, "POST", "/v1/images/generations", {"model": "shapes", "prompt": "", **fields}), 400)
    assert error["param"] == param
    assert says in error["message"]


def test_the_verbs_of_an_image_model(app: Any) -> None:
    encoded = ask(app, "POST", "/v1/models/shapes/encode", {"images": [PICTURE, PICTURE]}).json()
    assert np.shape(encoded["latents"]) == (2, 4)
    decoded = ask(app, "POST", "/v1/models/shapes/decode", {"latents": encoded["latents"]}).json()
    assert (
        decoded["data"]
        == ask(app, "POST", "/v1/models/shapes/reconstruct", {"images": [PICTURE, PICTURE]}).json()["data"]
    )
    way = ask(app, "POST", "/v1/models/shapes/interpolate", {"start": 1, "end": PICTURE, "steps": 4}).json()
    assert (len(way["data"]), way["data"][-1]) == (4, decoded["data"][0])
    assert len(ask(app, "POST", "/v1/models/clean@1/denoise", {"images": [PICTURE]}).json()["data"]) == 1
    error = refused(ask(app, "POST", "/v1/models/shapes/denoise", {"images": [PICTURE]}), 404)
    assert (error["code"], "decode, encode" in error["message"]) == ("verb_not_supported", True)


@pytest.mark.parametrize("end", ["\n", "\r\n", " ", "\t\n"])
def test_base64_may_have_line_breaks(app: Any, end: str) -> None:
    wrapped = end.join(textwrap.wrap(PICTURE, 19)) + end
    bodies = [{"images": [picture]} for picture in (PICTURE, wrapped, f"data:image/png;base64,{end}{wrapped}")]
    expected, *others = (ask(app, "POST", "/v1/models/shapes/encode", body) for body in bodies)
    assert expected.status_code == 200
    assert [other.json()["latents"] for other in others] == [expected.json()["latents"]] * 2
    for spoilt in (PICTURE[:20] + "!" + PICTURE[20:], PICTURE[:30] + "\0" + PICTURE[30:]):
        assert refused(ask(app, "POST", "/v1/models/shapes/encode", {"images": [spoilt]}), 400)["param"] == "images[0]"


def test_a_wrong_field_of_a_verb_is_named(app: Any) -> None:
    assert (
        refused(ask(app, "POST", "/v1/models/shapes/encode", {"images": [PICTURE, "x"]}), 400)["param"] == "images[1]"
    )
    assert refused(ask(app, "POST", "/v1/models/shapes/encode", {"images": PICTURE}), 400)["param"] == "images"
    assert refused(ask(app, "POST", "/v1/models/shapes/interpolate", {"start": 1}), 400)["param"] == "end"
    assert (
        refused(ask(app, "POST", "/v1/models/shapes/interpolate", {"start": 1, "end": 2, "steps": 1000}), 400)["param"]
        == "steps"
    )


def test_the_openapi_document_describes_bodies(app: Any) -> None:
    paths = ask(app, "GET", "/openapi.json").json()["paths"]
    assert set(paths) == {
        "/healthz",
        "/v1/models",
        "/v1/models/{model}",
        "/v1/completions",
        "/v1/images/generations",
        "/v1/models/{model}/history",
        "/v1/models/{model}/samples/{step}/{name}",
        "/v1/models/{model}/vocabulary",
        *(f"/v1/models/{{model}}/{verb}" for verb in ("encode", "decode", "reconstruct", "denoise", "interpolate")),
    }
    schema = paths["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["required"]) == {"model", "prompt"}
    assert "include_usage" in schema["properties"]["stream_options"]["properties"]
    assert {"application/json", "text/event-stream"} <= set(
        paths["/v1/completions"]["post"]["responses"]["200"]["content"]
    )
    assert "$ref" not in json.dumps([paths[path]["post"]["requestBody"] for path in paths if "post" in paths[path]])


NAMES = [
    "model",
    "prompt",
    "n",
    "seed",
    "stop",
    "stream",
    "max_tokens",
    "temperature",
    "images",
    "latents",
    "start",
    "end",
]
NAMES += [
    "steps",
    "grid",
    "size",
    "response_format",
    "stream_options",
    "top_k",
    "user",
    "model_dump",
    "__class__",
    "\x00",
]
NUMBERS = st.one_of(st.integers(-3, 70), st.integers(), st.floats(), st.sampled_from([2**63, -(2**70), 10**400]))
LEAVES = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.text(max_size=5), st.sampled_from(["play", "shapes", PICTURE, "16x16"])
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3)
)
BODIES = st.one_of(VALUES, st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=8))


@pytest.mark.parametrize(
    "path", ["completions", "images/generations", *(f"models/shapes/{kind.verb}" for kind in VERB_REQUESTS)]
)
@settings(max_examples=60, deadline=None)
@given(body=BODIES, whole=st.booleans())
def test_no_body_breaks_the_server(app: Any, path: str, body: Any, whole: bool) -> None:
    if isinstance(body, dict):
        if whole:  # with the required fields, so that more requests pass the first check
            required = {"model": "play" if path == "completions" else "shapes", "prompt": "x", "images": [PICTURE]}
            required |= {"latents": [[0.0] * 4], "start": 1, "end": 2}
            known = ask(app, "GET", "/openapi.json").json()["paths"]
            schema = known["/v1/" + path.replace("shapes", "{model}")]["post"]["requestBody"]["content"][
                "application/json"
            ]["schema"]
            body = {name: required[name] for name in schema.get("required", [])} | body
        body.pop("max_tokens", None) if path == "completions" else None
    response = ask(app, "POST", f"/v1/{path}", json.dumps(body).encode())
    assert response.status_code in (200, 400, 404)
    if response.status_code != 200:
        refused(response, response.status_code)


# Bodies with millions of parts


@pytest.mark.parametrize("part", ["[]", "{}", '{"a":1}', "[[1],[1]]"])
@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/completions", "stop"),
        ("/v1/images/generations", "anything"),
        ("/v1/models/shapes/encode", "images"),
        ("/v1/models/shapes/interpolate", "start"),
    ],
)
def test_a_body_of_too_many_lists_or_objects_is_refused_unparsed(app: Any, path: str, field: str, part: str) -> None:
    error = refused(ask(app, "POST", path, f'{{"{field}":[[{",".join([part] * 300_000)}]]}}'.encode()), 400)
    assert "lists, objects and keys, expected at most 262,144" in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("encode", {"images": [[[0] * 16] * 15 + [[0] * 1_000_000]]}, "images[0]"),
        ("encode", {"images": [[0] * 1_000_000]}, "images[0]"),
        ("interpolate", {"start": [0] * 1_000_000, "end": 1}, "start"),
        ("interpolate", {"start": 1, "end": [[0] * 1_000_000]}, "end"),
        ("decode", {"latents": [[0] * 1_000_000]}, "latents[0]"),
    ],
)
def test_lists_of_another_shape_are_refused_without_converting_them(
    app: Any, path: str, body: dict[str, Any], param: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted: list[int] = []
    convert = np.asarray

    def watch(value: Any, *arguments: Any, **options: Any) -> Any:
        result = convert(value, *arguments, **options)
        converted.append(result.size)
        return result

    monkeypatch.setattr(np, "asarray", watch)
    assert refused(ask(app, "POST", f"/v1/models/shapes/{path}", body), 400)["param"] == param
    assert max(converted, default=0) < 1_000
