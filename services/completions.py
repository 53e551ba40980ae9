"""`POST /v1/completions`, in OpenAI's shapes: whole answers, and streams of server-sent events."""

from __future__ import annotations

import json
import math
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import Field

from genmodels.engine.text import CompletionRequest, Piece, TokenLogprob
from genmodels.errors import RequestError
from genmodels.family import Section
from services.api import documented, read_body
from services.auth import Caller
from services.edge import REQUEST_ID, Json, envelope
from services.host import Opened
from services.pool import VERSION, Pool, checked


class StreamOptions(Section):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against eavesdroppers; there is none


class CompletionBody(CompletionRequest):
    """The body of `POST /v1/completions`."""

    neutral: ClassVar = {"suffix": ("",), "user": ()}

    model: str = Field(max_length=256)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


def add_completions(app: FastAPI, pool: Pool, generate: Any) -> None:
    """The route, asking `pool`; `generate` is the dependency that admits a caller."""

    @app.post("/v1/completions", summary="Text that goes on from a prompt", openapi_extra=documented(CompletionBody))
    async def completions(request: Request, caller: Caller = generate) -> Response:
        body = await read_body(CompletionBody, request)
        caller.need([body.model])
        if body.stream and body.written > body.n:
            message = "best_of: the best are known when all are written; leave out stream, or best_of"
            raise RequestError(message, param="best_of", code="invalid_value")
        items = pool.complete(body.model, body)
        opened = checked(await anext(items))
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
        written = [Piece(index, "", 0) for index in range(body.written)]
        async for item in items:
            piece = _piece(item)
            written[piece.index] += piece
        if any(choice.finish_reason is None for choice in written):
            raise _lost()
        choices = [_choice(piece, body, index) for index, piece in enumerate(_best(written, body.n))]
        usage = _usage(opened, sum(choice.tokens for choice in written))
        return Json({**answer, "choices": choices, "usage": usage}, headers=headers)


async def _events(
    answer: dict[str, Any], opened: Opened, items: AsyncIterator[Any], body: CompletionBody
) -> AsyncIterator[str]:
    """Server-sent events. The status has been sent, so that an error can only be an event; then nothing says [DONE]."""
    tokens, ended = 0, 0
    try:
        async for item in items:
            piece = _piece(item)
            tokens, ended = tokens + piece.tokens, ended + (piece.finish_reason is not None)
            yield _event({**answer, "choices": [_choice(piece, body, piece.index)]})
        if ended < body.n:
            raise _lost()
    except RequestError as error:
        yield _event(envelope(error.status, error.message, param=error.param, code=error.code))
        return
    if body.stream_options.include_usage:
        yield _event({**answer, "choices": [], "usage": _usage(opened, tokens)})
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


def _piece(item: Any) -> Piece:
    piece = checked(item)
    assert isinstance(piece, Piece)
    return piece


def _lost() -> RequestError:
    return RequestError("the model host went away in the middle of the answer; try again", status=503, code="host_lost")


def _best(written: Sequence[Piece], n: int) -> list[Piece]:
    """The n that the model thinks most probable, per token, the best first; all in order where all are asked for."""
    if len(written) == n:
        return list(written)
    return sorted(written, key=_mean_logprob, reverse=True)[:n]


def _mean_logprob(choice: Piece) -> float:
    logprobs = [token.logprob for token in choice.logprobs if token.logprob is not None]
    return math.fsum(logprobs) / len(logprobs) if logprobs else -math.inf


def _choice(piece: Piece, body: CompletionBody, index: int) -> dict[str, Any]:
    logprobs = None if body.logprobs is None else _logprobs(piece.logprobs, body.logprobs)
    return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}


def _logprobs(tokens: Sequence[TokenLogprob], top: int) -> dict[str, Any]:
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [token.top for token in tokens] if top else None,
        "text_offset": [token.offset for token in tokens],
    }


def _usage(opened: Opened, tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": opened.prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": opened.prompt_tokens + tokens,
    }
