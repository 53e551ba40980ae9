"""The HTTP ingress for generation, in OpenAI's shapes, so that its clients work unchanged.

Without keys it is for this machine alone: bound to 127.0.0.1, answering to loopback names, deaf to an Authorization
header.
Bodies have to come as application/json: a page of another site then has to ask before it sends one, and we never agree.
"""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import AsyncIterator, Collection
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse
from pydantic import Field, field_validator

from genmodels.engine.images import (
    DecodeRequest,
    DenoiseRequest,
    EncodeRequest,
    GenerateRequest,
    ImageAnswer,
    ImageRequest,
    InterpolateRequest,
    ReconstructRequest,
)
from genmodels.engine.text import CompletionRequest, Piece
from genmodels.errors import RequestError
from genmodels.explain import wrong
from genmodels.family import Section
from genmodels.keys import Keys
from services.api import documented, new_app, read_body
from services.auth import Caller, Guard
from services.docs import HEADERS
from services.edge import LOOPBACK, REQUEST_ID, Json, envelope
from services.host import Entry, Opened, created
from services.page import page

VERSION = "x-genmodels-version"

T = TypeVar("T")


class Pool(Protocol):
    """Model hosts, near or far. What is wrong with a request comes back as a value."""

    async def models(self) -> list[Entry] | RequestError: ...
    async def model(self, name: str) -> Entry | RequestError: ...
    async def answer(self, name: str, request: ImageRequest) -> ImageAnswer | RequestError: ...
    def complete(self, name: str, request: CompletionRequest) -> AsyncIterator[Opened | Piece | RequestError]: ...


class StreamOptions(Section):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against eavesdroppers; there is none


class CompletionBody(CompletionRequest):
    """The body of `POST /v1/completions`."""

    neutral: ClassVar = {
        "best_of": (1,),
        "echo": (False,),
        "frequency_penalty": (0,),
        "logit_bias": ({},),
        "logprobs": (0,),
        "presence_penalty": (0,),
        "suffix": ("",),
        "user": (),
    }

    model: str = Field(max_length=256)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


class GenerationBody(GenerateRequest):
    """The body of `POST /v1/images/generations`. `prompt` has no effect: these models know no words."""

    neutral: ClassVar = {
        "background": ("auto", "opaque"),
        "moderation": (),
        "output_format": ("png",),
        "quality": ("auto", "standard"),
        "safety_identifier": (),
        "stream": (False,),
        "user": (),
    }

    model: str = Field(max_length=256)
    prompt: str = Field("", max_length=65_536)
    response_format: Literal["b64_json"] = "b64_json"

    @field_validator("response_format", mode="before")
    @classmethod
    def _no_url(cls, value: Any) -> Any:
        if value == "url":
            raise wrong(
                "got 'url', but images are not kept anywhere to be fetched from; send 'b64_json' or leave it out"
            )
        return value


_ABOUT = "Asks trained models for text and pictures, in the shapes of OpenAI's API: its clients work unchanged."

VERBS: tuple[type[ImageRequest], ...] = (
    EncodeRequest,
    DecodeRequest,
    ReconstructRequest,
    DenoiseRequest,
    InterpolateRequest,
)


def create_app(pool: Pool, *, hosts: Collection[str] | None = LOOPBACK, keys: Keys | None = None) -> FastAPI:
    """The HTTP application before a pool.

    Args:
        hosts: names that a Host header may have; None for any, where there are keys.
        keys: who may ask; None: anyone.
    """
    app = new_app("genmodels", _ABOUT, hosts=hosts)
    generate = Guard(keys)("generate")

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        url = str(request.base_url).rstrip("/")
        models = None if keys else [_model(entry) for entry in _checked(await pool.models())]
        return HTMLResponse(page(models, url), headers=HEADERS)

    @app.get("/v1/models", summary="The models")
    async def models(caller: Caller = generate) -> Response:
        entries = [entry for entry in _checked(await pool.models()) if caller.may_use([entry.version.model])]
        return Json({"object": "list", "data": [_model(entry) for entry in entries]})

    @app.get("/v1/models/{model}", summary="A model")
    async def model(model: str, caller: Caller = generate) -> Response:
        caller.need([model])
        entry = _checked(await pool.model(model))
        return Json(_model(entry), headers={VERSION: entry.version.name})

    @app.post("/v1/completions", summary="Text that goes on from a prompt", openapi_extra=documented(CompletionBody))
    async def completions(request: Request, caller: Caller = generate) -> Response:
        body = await read_body(CompletionBody, request)
        caller.need([body.model])
        items = pool.complete(body.model, body)
        opened = _checked(await anext(items))
        assert isinstance(opened, Opened)
        answer = {
            "id": f"cmpl-{request.headers[REQUEST_ID]}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": opened.model,
            "seed": opened.seed,
        }
        headers = {VERSION: opened.model}
        if body.stream:
            events = _events(answer, opened, items, body)
            return StreamingResponse(
                events, media_type="text/event-stream", headers={**headers, "cache-control": "no-cache"}
            )
        choices = [_choice(index, "") for index in range(body.n)]
        tokens = 0
        async for item in items:
            piece = _piece(item)
            choices[piece.index]["text"] += piece.text
            choices[piece.index]["finish_reason"] = piece.finish_reason
            tokens += piece.tokens
        if any(choice["finish_reason"] is None for choice in choices):
            raise RequestError(
                "the model host went away in the middle of the answer; try again", status=503, code="host_lost"
            )
        return Json({**answer, "choices": choices, "usage": _usage(opened, tokens)}, headers=headers)

    @app.post("/v1/images/generations", summary="New pictures", openapi_extra=documented(GenerationBody))
    async def generations(request: Request, caller: Caller = generate) -> Response:
        body = await read_body(GenerationBody, request)
        caller.need([body.model])
        return _images(_checked(await pool.answer(body.model, body)))

    for kind in VERBS:
        _add_verb(app, pool, kind, generate)
    return app


def _add_verb(app: FastAPI, pool: Pool, kind: type[ImageRequest], generate: Any) -> None:
    async def verb(model: str, request: Request, caller: Caller = generate) -> Response:
        caller.need([model])
        return _images(_checked(await pool.answer(model, await read_body(kind, request))))

    path, summary = f"/v1/models/{{model}}/{kind.verb}", kind.verb.capitalize()
    app.post(path, name=kind.verb, summary=summary, openapi_extra=documented(kind))(verb)


async def _events(
    answer: dict[str, Any], opened: Opened, items: AsyncIterator[Any], body: CompletionBody
) -> AsyncIterator[str]:
    """Server-sent events. The status has been sent, so that an error can only be an event; then nothing says [DONE]."""
    tokens, ended = 0, 0
    try:
        async for item in items:
            piece = _piece(item)
            tokens, ended = tokens + piece.tokens, ended + (piece.finish_reason is not None)
            yield _event({**answer, "choices": [_choice(piece.index, piece.text, piece.finish_reason)]})
        if ended < body.n:
            raise RequestError("the model host went away in the middle of the answer", status=503, code="host_lost")
    except RequestError as error:
        yield _event(envelope(error.status, error.message, param=error.param, code=error.code))
        return
    if body.stream_options.include_usage:
        yield _event({**answer, "choices": [], "usage": _usage(opened, tokens)})
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


def _piece(item: Any) -> Piece:
    piece = _checked(item)
    assert isinstance(piece, Piece)
    return piece


def _checked(value: T | RequestError) -> T:
    if isinstance(value, RequestError):
        raise value
    return value


def _choice(index: int, text: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}


def _usage(opened: Opened, tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": opened.prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": opened.prompt_tokens + tokens,
    }


def _images(answer: ImageAnswer) -> Response:
    content: dict[str, Any] = {"created": int(time.time()), "model": answer.model}
    if answer.seed is not None:
        content["seed"] = answer.seed
    if answer.latents:
        content["latents"] = answer.latents
    if answer.images:
        content["data"] = [{"b64_json": base64.b64encode(file).decode()} for file in answer.images]
    return Json(content, headers={VERSION: answer.model})


def _model(entry: Entry) -> dict[str, Any]:
    version = entry.version
    return {
        "id": entry.id,
        "object": "model",
        "created": created(version),
        "owned_by": "genmodels",
        "family": version.family,
        "kind": entry.kind,
        "verbs": entry.verbs,
        "version": version.version,
        "aliases": entry.aliases,
        "metrics": {name: value if math.isfinite(value) else None for name, value in version.metrics.items()},
        **(entry.shape or {}),
        **({"problem": entry.problem} if entry.problem else {}),
    }
