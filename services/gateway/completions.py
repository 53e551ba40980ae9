"""`POST /v1/completions`: text from a model, as one answer or as server-sent events, in the format of OpenAI's API."""

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
from services.http.app import cancel_on_disconnect, documented, read_body
from services.http.auth import Caller
from services.http.middleware import REQUEST_ID
from services.http.request_metrics import Count, count_of, tag_version
from services.http.responses import Json, envelope

EVENT_STREAM = "text/event-stream"

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
    stream: bool = Field(False, description="send the text in server-sent events while it is generated")
    stream_options: StreamOptions = Field(StreamOptions(), description="options of a stream")

    @field_validator("stream")
    @classmethod
    def _check_best_of_is_not_streamed(cls, stream: bool, info: ValidationInfo) -> bool:
        best_of, n = info.data.get("best_of"), info.data.get("n", 1)
        if stream and best_of and best_of > n:
            raise field_error(
                f"best_of = {best_of} needs all texts for its ranking, so it cannot be streamed; leave out one"
            )
        return stream


def add_completions(app: FastAPI, pool: Pool, contracts: Contracts, generate: Any) -> None:
    """Add the routes of text models.

    Args:
        generate: the dependency that returns a Caller.
    """

    @app.get("/v1/models/{model}/vocabulary", summary="List tokens")
    async def read_vocabulary(model: str, request: Request, caller: Caller = generate) -> Response:
        """List the tokens of a text model: `text` is the text of the token `id` in prompts and answers."""
        caller.require([model])
        vocabulary = unwrap(await pool.vocabulary(model))
        tag_version(request, vocabulary.model, vocabulary.family)
        tokens = [{"id": token, "text": text} for token, text in enumerate(vocabulary.tokens)]
        return Json(
            {"object": "vocabulary", "model": vocabulary.model, "data": tokens}, headers={VERSION: vocabulary.model}
        )

    @app.post(
        "/v1/completions",
        summary="Continue a text",
        openapi_extra=documented(CompletionBody),
        responses={200: {"content": {EVENT_STREAM: {}}}},
    )
    async def create_completion(request: Request, caller: Caller = generate) -> Response:
        """Continue a prompt; return the text in one answer or in a stream of events."""
        body = await read_body(CompletionBody, request)
        caller.require([body.model])
        await contracts.check(body.model, body)
        items = pool.complete(body.model, body)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(aclosing(items))
            started = unwrap(await anext(items))
            assert isinstance(started, CompletionStarted)
            tag_version(request, started.model, started.family)
            answer = {
                "id": f"cmpl-{request.headers[REQUEST_ID]}",
                "object": "text_completion",
                "created": int(time.time()),
                "model": started.model,
                "seed": started.seed,
            }
            if body.stream:
                stack.pop_all()  # the stream closes the items
                events = _events(answer, started, items, body, count_of(request), caller)
                return _EventStream(events, items, started.model)
            content = await cancel_on_disconnect(request, _collect(started, items, body))
            return Json({**answer, **content}, headers={VERSION: started.model})


async def _collect(started: CompletionStarted, items: Items, body: CompletionBody) -> dict[str, Any]:
    deltas: list[list[TextDelta]] = [[] for _ in range(body.choices)]
    async for item in items:
        delta = _delta(item)
        deltas[delta.index].append(delta)
    if not all(own and own[-1].finish_reason for own in deltas):
        raise _host_lost()
    choices = [_choice(index, own, body) for index, own in enumerate(deltas)]
    return {"choices": choices, "usage": _usage(started, sum(delta.tokens for own in deltas for delta in own))}


async def _events(
    answer: dict[str, Any], started: CompletionStarted, items: Items, body: CompletionBody, count: Count, caller: Caller
) -> AsyncIterator[str]:
    """Yield server-sent events. The status is sent already, so an error is an event, without [DONE] after it."""
    tokens, ended = 0, 0
    if usage := body.stream_options.include_usage:
        answer = {**answer, "usage": None}
    try:
        async for item in items:
            delta = _delta(item)
            tokens, ended = tokens + delta.tokens, ended + (delta.finish_reason is not None)
            yield _event({**answer, "choices": [_choice(delta.index, [delta], body)]})
            await caller.recheck()
        if ended < body.choices:
            raise _host_lost()
    except RequestError as error:
        count.error = error.status
        yield _event(envelope(error.status, error.message, param=error.param, code=error.code))
        return
    if usage:
        yield _event({**answer, "choices": [], "usage": _usage(started, tokens)})
    yield "data: [DONE]\n\n"


class _EventStream(StreamingResponse):
    """Close the items at the end in every case: a client may disconnect before the first item is read."""

    def __init__(self, events: AsyncIterator[str], items: Items, version: str) -> None:
        headers = {VERSION: version, "cache-control": "no-cache"}
        super().__init__(events, media_type=EVENT_STREAM, headers=headers)
        self._items = items

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._items.aclose()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


def _delta(item: Any) -> TextDelta:
    delta = unwrap(item)
    assert isinstance(delta, TextDelta)
    return delta


def _host_lost() -> RequestError:
    message = "the model host stopped in the middle of the answer; try again"
    return RequestError(message, status=503, code="host_lost")


def _choice(index: int, deltas: Sequence[TextDelta], body: CompletionBody) -> dict[str, Any]:
    tokens = [token for delta in deltas for token in delta.logprobs]
    return {
        "index": index,
        "text": "".join(delta.text for delta in deltas),
        "logprobs": None if body.logprobs is None else _logprobs(tokens),
        "finish_reason": deltas[-1].finish_reason,
    }


def _logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Return the log-probabilities; `text_offset` counts from the start of the choice's text, also in a stream."""
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [token.top for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _usage(started: CompletionStarted, tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": started.prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": started.prompt_tokens + tokens,
    }
