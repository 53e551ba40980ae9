from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest
from asking import PICTURE, ask, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from published import VOCABULARY, publish

from genmodels.engine.loaded import TextModel
from genmodels.engine.text import CompletionRequest, Piece
from genmodels.errors import RequestError
from genmodels.storage import Storage, open_storage
from services.host import ModelHost, Opened
from services.routes import VERBS, create_app


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


def size_of(b64: str) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(b64))).size


def events(response: httpx.Response) -> list[Any]:
    """The data of server-sent events, but for [DONE], which comes last if at all."""
    parts = response.text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") for part in parts)
    assert "data: [DONE]" not in parts[:-1]
    return [part if part == "data: [DONE]" else json.loads(part.removeprefix("data: ")) for part in parts]


# Models


def test_models_are_listed_as_openai_does_with_what_they_are(app: Any) -> None:
    listed = ask(app, "GET", "/v1/models").json()
    assert listed["object"] == "list"
    found = {entry["id"]: entry for entry in listed["data"]}
    assert set(found) == {"play", "shapes", "clean@1"}
    shapes = found["shapes"]
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
    assert (found["play"]["verbs"], found["play"]["vocab_size"]) == (["complete"], len(VOCABULARY))


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


def test_what_there_is_stands_in_the_error(app: Any) -> None:
    error = refused(ask(app, "POST", "/v1/completions", {"model": "plays", "prompt": "x"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "clean, play, shapes" in error["message"]


# Completions


def test_a_completion(app: Any) -> None:
    body = {
        "model": "play",
        "prompt": "To be",
        "max_tokens": 12,
        "seed": 3,
        "n": 2,
        "user": "me",
        "echo": False,
        "logprobs": None,
    }
    response = ask(app, "POST", "/v1/completions", body)
    answer = response.json()
    assert response.headers["x-genmodels-version"] == "play@1"
    assert answer["id"] == f"cmpl-{response.headers['x-request-id']}"
    assert (answer["object"], answer["model"], answer["seed"]) == ("text_completion", "play@1", 3)
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 24, "total_tokens": 29}
    assert [(choice["index"], len(choice["text"]), choice["finish_reason"]) for choice in answer["choices"]] == [
        (0, 12, "length"),
        (1, 12, "length"),
    ]
    assert ask(app, "POST", "/v1/completions", body).json()["choices"] == answer["choices"]


def test_a_stream_is_the_same_text_in_parts(app: Any) -> None:
    body = {"model": "play", "prompt": "To be", "max_tokens": 40, "seed": 3, "n": 2}
    whole = ask(app, "POST", "/v1/completions", body).json()
    response = ask(app, "POST", "/v1/completions", {**body, "stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-genmodels-version"] == "play@1"
    *chunks, usage, done = events(response)
    assert done == "data: [DONE]"
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    for choice in whole["choices"]:
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == ["length"]
    assert {chunk["id"] for chunk in chunks} == {f"cmpl-{response.headers['x-request-id']}"}


def test_a_stop_string_is_cut_off(app: Any) -> None:
    body = {"model": "play", "prompt": "To be", "max_tokens": 100, "seed": 3}
    text = ask(app, "POST", "/v1/completions", body).json()["choices"][0]["text"]
    choice = ask(app, "POST", "/v1/completions", {**body, "stop": text[5:8]}).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text[: text.index(text[5:8])], "stop")


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"prompt": "caf\u00e9"}, "prompt", "\u00e9"),
        ({"prompt": ["To be"]}, "prompt", "expected text"),
        ({"prompt": None}, "prompt", "missing"),
        ({"model": 3}, "model", "expected text"),
        ({"model": None}, "model", "missing"),
        ({"temperature": "hot"}, "temperature", "a number"),
        ({"temperature": -1}, "temperature", "at least 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 65}, "n", "at most 64"),
        ({"n": 1.5}, "n", "a whole number"),
        ({"seed": "1"}, "seed", "a whole number"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"max_tokens": 10**9}, "max_tokens", "at most"),
        ({"max_tokens": 4096, "n": 64}, "max_tokens", "n = 64"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"echo": "yes"}, "echo", "true or false"),
        ({"n": 3, "best_of": 2}, "best_of", "at least n = 3"),
        ({"best_of": 2, "stream": True}, "best_of", "leave out stream"),
        ({"logprobs": 6}, "logprobs", "5"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"presence_penalty": 2.5}, "presence_penalty", "at most 2"),
        ({"logit_bias": {"1000": 1}}, "logit_bias", "token 1000"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "whole number"),
        ({"messages": []}, "messages", "unknown key"),
        ({"options": {}}, "options", "unknown key"),
        ({"stream_options": {"usage": True}}, "stream_options.usage", "unknown key"),
        ({"prompt": "x" * 65_537}, "prompt", "at most 65536"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_completion_is_400_and_names_the_field(
    app: Any, fields: dict[str, Any], param: str, says: str, stream: bool
) -> None:
    body = {"model": "play", "prompt": "To be", "max_tokens": 2, "stream": stream, **fields}
    error = refused(ask(app, "POST", "/v1/completions", body), 400)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert says in error["message"]


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
        *(f"/v1/models/{{model}}/{verb}" for verb in ("encode", "decode", "reconstruct", "denoise", "interpolate")),
    }
    schema = paths["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["required"]) == {"model", "prompt"}
    assert "include_usage" in schema["properties"]["stream_options"]["properties"]
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
    "path", ["completions", "images/generations", *(f"models/shapes/{kind.verb}" for kind in VERBS)]
)
@settings(max_examples=60, deadline=None)
@given(body=BODIES, whole=st.booleans())
def test_no_body_breaks_the_server(app: Any, path: str, body: Any, whole: bool) -> None:
    if isinstance(body, dict):
        if whole:  # with what is required, so that more gets past the first check
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


# What a pool may do to the gateway


class Pool:
    """A pool that sends what it is told to."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    async def complete(self, name: str, request: CompletionRequest) -> AsyncIterator[Any]:
        for item in self.items:
            if isinstance(item, Exception) and not isinstance(item, RequestError):
                raise item
            yield item


OPENED, PIECE = Opened("m@1", 1, 1), Piece(0, "abc", 3)
BODY = {"model": "m", "prompt": "x"}


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ([RequestError("host lost", status=503, code="host_lost")], "host_lost"),
        ([], "host_lost"),
        ([ValueError("internal detail")], None),
    ],
)
def test_an_answer_cut_off_never_looks_whole(ending: list[Any], code: str | None) -> None:
    app = create_app(Pool(OPENED, PIECE, *ending))  # type: ignore[arg-type]
    first, last = events(ask(app, "POST", "/v1/completions", {**BODY, "stream": True}))
    assert first["choices"] == [{"index": 0, "text": "abc", "logprobs": None, "finish_reason": None}]
    assert (last["error"]["type"], last["error"]["code"]) == ("server_error", code)
    error = refused(ask(app, "POST", "/v1/completions", BODY), 503 if code else 500)
    assert "internal detail" not in error["message"]


def test_a_second_choice_that_never_comes_is_missed() -> None:
    app = create_app(Pool(OPENED, Piece(0, "abc", 3, "length")))  # type: ignore[arg-type]
    assert refused(ask(app, "POST", "/v1/completions", {**BODY, "n": 2}), 503)
    assert "error" in events(ask(app, "POST", "/v1/completions", {**BODY, "n": 2, "stream": True}))[-1]


def test_a_full_pool_is_429_with_retry_after() -> None:
    app = create_app(Pool(RequestError("full", status=429, code="too_many_requests")))  # type: ignore[arg-type]
    for stream in (False, True):
        response = ask(app, "POST", "/v1/completions", {**BODY, "stream": stream})
        assert (refused(response, 429)["type"], response.headers["retry-after"]) == ("rate_limit_error", "1")


def test_a_client_that_leaves_frees_its_slot(models: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    host = ModelHost(models.url, workers=1)
    play = host._shelf._held["play@1"].loaded
    assert isinstance(play, TextModel)
    step = play.batcher.step

    def watched() -> bool:
        time.sleep(0.005)  # so that the answer is never over before the client leaves
        return step()

    monkeypatch.setattr(play.batcher, "step", watched)

    async def leave() -> None:
        items = host.complete("play", CompletionRequest.model_validate({"prompt": "x", "max_tokens": 4096}))
        assert isinstance(await anext(items), Opened)
        assert isinstance(await anext(items), Piece)
        waiting = asyncio.ensure_future(anext(items))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await items.aclose()  # type: ignore[attr-defined]
        while play.batcher.busy:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(leave(), 10))  # all of its tokens would take twice as long
