"""What stands before every route: limits on bodies, headers that are not a client's to send, ids, one form of errors.

`Edge` is an ASGI middleware and runs twice: around the gateway's application, and in Serve's HTTP proxy
(PROXY_ENVIRONMENT), where it stops a large body before it is buffered, takes away headers by which a client could
switch off Serve's timeout or its watch for a lost connection, and puts Serve's own errors into our form.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import uuid
from collections.abc import Collection, Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# To be in the environment before Ray starts, wherever a Serve proxy may run.
PROXY_ENVIRONMENT = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "services.edge.proxy_middlewares"}

LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
MAX_BODY = 8 * 2**20  # bytes
BODY_SECONDS = 30.0  # for the whole body to arrive
REQUEST_ID = "x-request-id"
STEERING = frozenset(  # how Serve's own parts talk to its proxy; each with - and _ alike
    {
        "x-request-timeout-seconds",
        "x-request-disconnect-disabled",
        "serve-multiplexed-model-id",
        "x-session-id",
        REQUEST_ID,
    }
)

logger = logging.getLogger("genmodels.gateway")


def proxy_middlewares() -> list[Middleware]:
    """Called by Serve's HTTP proxy when it starts."""
    return [Middleware(Edge)]


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


class Edge:
    """ASGI middleware.

    Args:
        hosts: the names in a Host header that are answered; None for any. Without keys, a page of any web site could
            otherwise have its own name resolve to 127.0.0.1 and use a visitor's browser to ask us (DNS rebinding).
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Collection[str] | None = None,
        max_body: int = MAX_BODY,
        body_seconds: float = BODY_SECONDS,
    ) -> None:
        self._app, self._hosts, self._max_body, self._body_seconds = app, hosts, max_body, body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers.get(REQUEST_ID))
        answer = _Answer(send, request_id)
        try:
            self._check(headers)
            body = await self._read(receive)
        except _Refused as refused:
            await refused.response(scope, receive, answer.send)
            return
        except _Gone:
            return
        kept = [(name, value) for name, value in scope["headers"] if not _steers(name)]
        scope = {**scope, "headers": [*kept, (REQUEST_ID.encode(), request_id.encode())]}
        try:
            await self._app(scope, _replay(body, receive), answer.send)
        except Exception:
            logger.exception("request %s failed", request_id)
        await answer.finish()

    def _check(self, headers: Headers) -> None:
        name = re.sub(r":\d*$", "", headers.get("host", "")).lower()
        if self._hosts is not None and name not in self._hosts:
            message = (
                f"Host header {name[:100]!r} is not answered: this server runs without keys, so it only answers to "
                f"{', '.join(sorted(self._hosts))}, lest a web page reaches it under a name of its own (DNS rebinding)"
            )
            raise _Refused(refuse(403, message, code="host_not_allowed"))
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            raise _Refused(refuse(400, "the Content-Length header is not a number"))
        if int(length[:20]) > self._max_body:
            raise _Refused(self._too_large())

    async def _read(self, receive: Receive) -> bytes:
        parts, size, more = [], 0, True
        try:
            async with asyncio.timeout(self._body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._max_body:
                        raise _Refused(self._too_large())
                    more = message.get("more_body", False)
        except TimeoutError:
            late = f"the request's body did not arrive within {self._body_seconds:g} s"
            raise _Refused(refuse(408, late)) from None
        return b"".join(parts)

    def _too_large(self) -> Json:
        message = f"the request's body is larger than {self._max_body:,} bytes, the most that is read"
        return refuse(413, message, code="body_too_large")


class _Refused(Exception):
    def __init__(self, response: Json) -> None:
        super().__init__()
        self.response = response


class _Gone(Exception):
    """The client has left."""


class _Answer:
    """Passes an answer on with its id; puts plain errors of Serve's into our form, and ends broken streams as such."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self._request_id = send, request_id
        self._started = self._finished = self._replaced = False
        self._is_event_stream = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            headers = MutableHeaders(scope=message)
            content_type = headers.get("content-type", "")
            self._is_event_stream = content_type.startswith("text/event-stream")
            if message["status"] >= 400 and content_type.startswith("text/plain"):
                self._replaced = True
                await self._refuse(message["status"], headers.get("retry-after"))
                return
            headers[REQUEST_ID] = self._request_id
        elif message["type"] == "http.response.body":
            self._finished = not message.get("more_body", False)
        if not self._replaced:
            await self._send(message)

    async def finish(self) -> None:
        """Called when the application has returned, perhaps because it broke."""
        if not self._started:
            await self._refuse(500, None)
        elif self._is_event_stream and not self._finished:
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
