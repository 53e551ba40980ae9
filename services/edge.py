"""What stands before every route: limits on bodies, headers that are not a client's to send, ids, one form of errors.

`Edge` is an ASGI middleware around both applications. Before the gateway's it runs once more, in Serve's HTTP proxy
(SERVE_ENVIRONMENT), where it stops a large body before it is buffered, takes away headers by which a client could
switch off Serve's timeout or its watch for a lost connection, and puts Serve's own errors into our form.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import traceback
import uuid
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.counting import COUNT, LEFT, Count, Counted

# To be in the environment before Ray starts, wherever a part of Serve may run. Over gRPC, and without a second thread
# in each process, 16 streams get 2.6 times the tokens (`make bench-serving` on 2 cores).
SERVE_ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "services.edge.proxy_middlewares",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}

LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
MAX_BODY = 8 * 2**20  # bytes
BODY_SECONDS = 30.0  # for the whole body to arrive
REQUEST_ID = "x-request-id"
ANSWER_HEADERS = "genmodels.answer_headers"  # in the ASGI scope: what an answer, also an error, is to carry
STEERING = frozenset(  # how Serve's own parts talk to its proxy; each with - and _ alike
    {
        "x-request-timeout-seconds",
        "x-request-disconnect-disabled",
        "serve-multiplexed-model-id",
        "x-session-id",
        REQUEST_ID,
    }
)

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})

logger = logging.getLogger("genmodels.edge")


def proxy_middlewares() -> list[Middleware]:
    """Called by Serve's HTTP proxy when it starts; the last is the outermost."""
    return [Middleware(Edge), Middleware(Counted, own=True)]


class Json(JSONResponse):
    """JSON in ASCII, so that no lone surrogate breaks it, and without NaN, which is not JSON."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def envelope(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refuse(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Json:
    return Json(envelope(status, message, param=param, code=code), status, headers)


@dataclass(frozen=True)
class Streamed:
    """A route that reads its body as it comes, up to a limit of its own."""

    method: str
    prefix: str  # of the path
    max_body: int  # bytes

    def matches(self, scope: Scope) -> bool:
        return scope["method"] == self.method and scope["path"].startswith(self.prefix)


class Edge:
    """ASGI middleware.

    Args:
        hosts: the names in a Host header that are answered; None for any. Without keys, a page of any web site could
            otherwise have its own name resolve to 127.0.0.1 and use a visitor's browser to ask us (DNS rebinding),
            or send a form there from under its own name.
        max_body: bytes; a body is read whole before the application sees the request.
        body_seconds: for a whole body to arrive, or for the next part of a streamed one.
        streamed: where that is otherwise.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Collection[str] | None = None,
        max_body: int = MAX_BODY,
        body_seconds: float = BODY_SECONDS,
        streamed: Streamed | None = None,
    ) -> None:
        self._app, self._hosts, self._max_body, self._body_seconds = app, hosts, max_body, body_seconds
        self._streamed = streamed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers.get(REQUEST_ID))
        answer_headers: dict[str, str] = {}
        count = scope.get(COUNT) or Count()
        answer = _Answer(send, request_id, answer_headers, count)
        kept = [(name, value) for name, value in scope["headers"] if not _steers(name)]
        own = (REQUEST_ID.encode(), request_id.encode())
        inner = {**scope, "headers": [*kept, own], ANSWER_HEADERS: answer_headers}
        try:
            streamed = self._streamed if self._streamed and self._streamed.matches(scope) else None
            limit = streamed.max_body if streamed else self._max_body
            self._check(scope["method"], headers, limit)
            bounded = self._bounded(receive, limit) if streamed else _replay(await self._read(receive), receive)
            await self._app(inner, bounded, answer.send)
        except _Refused as refused:
            if not answer.started:
                await refused.response(scope, receive, answer.send)
                count.own = True
        except _Gone:
            count.own = True
            return
        except ClientDisconnect:
            return
        except Exception as error:
            logger.error("request %s failed: %s", request_id, _where(error))
            count.error = 500
        await answer.finish()

    def _check(self, method: str, headers: Headers, limit: int) -> None:
        name = re.sub(r":\d*$", "", headers.get("host", "")).lower()
        if self._hosts is not None and name not in self._hosts:
            message = (
                f"Host header {name[:100]!r} is not answered: this server runs without keys, so it only answers to "
                f"{', '.join(sorted(self._hosts))}, lest a web page reaches it under a name of its own (DNS rebinding)"
            )
            raise _Refused(refuse(403, message, code="host_not_allowed"))
        origin = headers.get("origin")
        if self._hosts is not None and method not in _SAFE and origin and not _is_own(origin, headers["host"]):
            message = (
                f"Origin {origin[:100]!r} is another site: without keys, what changes something is only taken from "
                "programs and from this server's own pages"
            )
            raise _Refused(refuse(403, message, code="origin_not_allowed"))
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            raise _Refused(refuse(400, "the Content-Length header is not a number"))
        if int(length[:20]) > limit:
            raise _too_large(limit)

    async def _read(self, receive: Receive) -> bytes:
        parts, more = [], True
        bounded = self._bounded(receive, self._max_body)
        async with self._in_time():
            while more:
                message = await bounded()
                if message["type"] == "http.disconnect":
                    raise _Gone
                parts.append(message.get("body", b""))
                more = message.get("more_body", False)
        return b"".join(parts)

    def _bounded(self, receive: Receive, limit: int) -> Receive:
        size, more = 0, True

        async def bounded() -> Message:
            nonlocal size, more
            if not more:  # all of the body has come; what comes after it, the client's leaving, may take its time
                return await receive()
            async with self._in_time():
                message = await receive()
            size += len(message.get("body", b""))
            if size > limit:
                raise _too_large(limit)
            more = message.get("more_body", False)
            return message

        return bounded

    @contextlib.asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._body_seconds):
                yield
        except TimeoutError:
            late = f"the request's body did not arrive within {self._body_seconds:g} s"
            raise _Refused(refuse(408, late)) from None


class _Refused(Exception):
    def __init__(self, response: Json) -> None:
        super().__init__()
        self.response = response


class _Gone(Exception):
    """The client has left."""


def _too_large(limit: int) -> _Refused:
    message = f"the request's body is larger than {limit:,} bytes, the most that is read"
    return _Refused(refuse(413, message, code="body_too_large"))


class _Answer:
    """Passes an answer on with its id; puts plain errors of Serve's into our form, and ends broken streams as such."""

    def __init__(self, send: Send, request_id: str, headers: Mapping[str, str], count: Count) -> None:
        self._send, self._request_id, self._headers, self._count = send, request_id, headers, count
        self.started = self._finished = self._replaced = False
        self._is_event_stream = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            headers = MutableHeaders(scope=message)
            content_type = headers.get("content-type", "")
            self._is_event_stream = content_type.startswith("text/event-stream")
            if message["status"] >= 400 and content_type.startswith("text/plain"):
                self._replaced = True
                # What Serve ends as too slow has reached the application, which sees its client leave.
                self._count.own = message["status"] != 408
                await self._refuse(message["status"], headers.get("retry-after"))
                return
            headers[REQUEST_ID] = self._request_id
            headers.update(self._headers)
        elif message["type"] == "http.response.body":
            self._finished = not message.get("more_body", False)
        if not self._replaced:
            await self._send(message)

    async def finish(self) -> None:
        """Called when the application has returned, perhaps because it broke."""
        if not self.started:
            await self._refuse(500, None)
        elif self._is_event_stream and not self._finished:
            self._count.error = self._count.error or LEFT  # unless it broke
            event = f"data: {json.dumps(envelope(500, self._message(500)))}\n\n"
            await self._send({"type": "http.response.body", "body": event.encode(), "more_body": False})

    async def _refuse(self, status: int, retry_after: str | None) -> None:
        response = refuse(status, self._message(status), headers={"retry-after": retry_after} if retry_after else None)
        response.headers[REQUEST_ID] = self._request_id
        await response({"type": "http"}, _never, self._send)

    def _message(self, status: int) -> str:
        messages = {
            404: "there is nothing here; GET / lists what there is",
            408: "the request took longer than is allowed and was ended",
            429: "too many requests are waiting; try again in a moment",
            503: "not ready or too busy; try again in a moment",
        }
        return messages.get(status, f"internal error; the log has it under request id {self._request_id}")


def _is_own(origin: str, host: str) -> bool:
    return origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}")


def _where(error: BaseException) -> str:
    """Kind and place of an error: its message might quote a request, which is no business of a log's."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return " < ".join([type(error).__name__, *(f"{frame.filename}:{frame.lineno}" for frame in reversed(frames))])


def _steers(header: bytes) -> bool:
    return header.decode("latin-1").lower().replace("_", "-") in STEERING


def _request_id(given: str | None) -> str:
    """The client's own id where it is a UUID, so that nothing else gets into logs; else a new one."""
    if given and re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", given):
        return given.lower()
    return str(uuid.uuid4())


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body that was read, then what comes after it: the client's leaving."""
    first = True

    async def replay() -> Message:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay


async def _never() -> Message:
    raise RuntimeError("an error's answer reads no body")
