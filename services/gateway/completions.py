"""`POST /v1/completions`: text from a model, whole or as a stream of server-sent events, in OpenAI's shapes."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any, ClassVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import Field, ValidationInfo, field_validator
from starlette.types import Receive, Scope, Send

from genmodels.engine.requests import Body
from genmodels.engine.text.choices import TextDelta
from genmodels.engine.text.logprobs import TokenLogprob
from genmodels.engine.text.request import CompletionRequest
from genmodels.errors import RequestError
from genmodels.schema.field_errors import field_error
from services.gateway.contracts import Contracts
from services.gateway.model_host import CompletionStarted
from services.gateway.pool import VERSION, Pool, unwrap
from services.http.app import documented, read_body, unless_gone
from services.http.auth import Caller
from services.http.middleware import REQUEST_ID
from services.http.request_metrics import Count, count_of, tag_version
from services.http.responses import Json, envelope

Items = AsyncGenerator[CompletionStarted | TextDelta | RequestError, None]


class StreamOptions(Body):
    include_usage: bool = Field(False, description="send the token counts in a last event")
    include_obfuscation: bool = Field(False, description="accepted; no padding is sent")


class CompletionBody(CompletionRequest):
    """The body of `POST /v1/completions`."""

    neutral: ClassVar = {"suffix": ("",), "user": ()}

    model: str = Field(
        max_length=256, description="name of the model, e.g. minigpt-shakespeare or minigpt-shakespeare@3"
    )
    stream: bool = Field(False, description="send the text in server-sent events while it is written")
    stream_options: StreamOptions = Field(StreamOptions(), description="options of a stream")

    @field_validator("stream")
    @classmethod
    def _the_best_is_known_at_the_end(cls, stream: bool, info: ValidationInfo) -> bool:
        best_of, n = info.data.get("best_of"), info.data.get("n", 1)
        if stream and best_of and best_of > n:
            raise field_error(
                f"best_of = {best_of} is ranked when all is written, so it cannot be streamed; leave one out"
            )
        return stream


def add_completions(app: FastAPI, pool: Pool, contracts: Contracts, generate: Any) -> None:
    """Add the route.

    Args:
        generate: the dependency that gives a Caller.
    """

    @app.get("/v1/models/{model}/vocabulary", summary="List tokens")
    async def vocabulary(model: str, request: Request, caller: Caller = generate) -> Response:
        """List the tokens of a text model: `text` is the text of the token `id` in prompts and answers."""
        caller.require([model])
        found = unwrap(await pool.vocabulary(model))
        tag_version(request, found.model, found.family)
        tokens = [{"id": token, "text": text} for token, text in enumerate(found.tokens)]
        return Json({"object": "vocabulary", "model": found.model, "data": tokens}, headers={VERSION: found.model})

    @app.post("/v1/completions", summary="Continue a text", openapi_extra=documented(CompletionBody))
    async def completions(request: Request, caller: Caller = generate) -> Response:
        """Continue a prompt, whole or as a stream of events."""
        body = await read_body(CompletionBody, request)
        caller.require([body.model])
        await contracts.check(body.model, body)
        items = pool.complete(body.model, body)
        async with AsyncExitStack() as leaving:
            await leaving.enter_async_context(aclosing(items))
            opened = unwrap(await anext(items))
            assert isinstance(opened, CompletionStarted)
            tag_version(request, opened.model, opened.family)
            answer = {
                "id": f"cmpl-{request.headers[REQUEST_ID]}",
                "object": "text_completion",
                "created": int(time.time()),
                "model": opened.model,
                "seed": opened.seed,
            }
            if body.stream:
                leaving.pop_all()  # from here on the stream's
                events = _events(answer, opened, items, body, count_of(request), caller)
                return _EventStream(events, items, opened.model)
            content = await unless_gone(request, _whole(opened, items, body))
            return Json({**answer, **content}, headers={VERSION: opened.model})


async def _whole(opened: CompletionStarted, items: Items, body: CompletionBody) -> dict[str, Any]:
    pieces: list[list[TextDelta]] = [[] for _ in range(body.choices)]
    async for item in items:
        piece = _piece(item)
        pieces[piece.index].append(piece)
    if not all(own and own[-1].finish_reason for own in pieces):
        raise _host_lost()
    choices = [_choice(index, own, body) for index, own in enumerate(pieces)]
    return {"choices": choices, "usage": _usage(opened, sum(piece.tokens for own in pieces for piece in own))}


async def _events(
    answer: dict[str, Any], opened: CompletionStarted, items: Items, body: CompletionBody, count: Count, caller: Caller
) -> AsyncIterator[str]:
    """Server-sent events. The status has been sent, so that an error can only be an event; then nothing says [DONE]."""
    tokens, ended = 0, 0
    if usage := body.stream_options.include_usage:
        answer = {**answer, "usage": None}
    try:
        async for item in items:
            piece = _piece(item)
            tokens, ended = tokens + piece.tokens, ended + (piece.finish_reason is not None)
            yield _event({**answer, "choices": [_choice(piece.index, [piece], body)]})
            await caller.recheck()
        if ended < body.choices:
            raise _host_lost()
    except RequestError as error:
        count.error = error.status
        yield _event(envelope(error.status, error.message, param=error.param, code=error.code))
        return
    if usage:
        yield _event({**answer, "choices": [], "usage": _usage(opened, tokens)})
    yield "data: [DONE]\n\n"


class _EventStream(StreamingResponse):
    """Its items are closed at the end, whatever that is: a client may leave before the first has been asked for."""

    def __init__(self, events: AsyncIterator[str], items: Items, version: str) -> None:
        headers = {VERSION: version, "cache-control": "no-cache"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._items = items

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._items.aclose()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


def _piece(item: Any) -> TextDelta:
    piece = unwrap(item)
    assert isinstance(piece, TextDelta)
    return piece


def _host_lost() -> RequestError:
    message = "the model host went away in the middle of the answer; try again"
    return RequestError(message, status=503, code="host_lost")


def _choice(index: int, pieces: Sequence[TextDelta], body: CompletionBody) -> dict[str, Any]:
    tokens = [token for piece in pieces for token in piece.logprobs]
    return {
        "index": index,
        "text": "".join(piece.text for piece in pieces),
        "logprobs": None if body.logprobs is None else _logprobs(tokens),
        "finish_reason": pieces[-1].finish_reason,
    }


def _logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """`text_offset` counts characters from the beginning of the choice's text, also in a stream."""
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [token.top for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _usage(opened: CompletionStarted, tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": opened.prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": opened.prompt_tokens + tokens,
    }
