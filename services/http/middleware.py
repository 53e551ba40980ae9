"""The middleware before every route: limits on bodies, internal headers, request ids, one format of errors.

`IngressMiddleware` is an ASGI middleware around both applications. For the gateway, a second one runs in Serve's HTTP
proxy (SERVE_ENVIRONMENT). There it holds back a large body until the gateway has checked the key, limits all bodies
and requests together, removes headers with which a client could disable Serve's timeout or its detection of lost
connections, and converts Serve's own errors to our format.
"""

from __future__ import annotations

import json
import logging
import re
import traceback
import uuid
from collections.abc import Collection
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from genmodels.errors import RequestError
from services.http.bodies import EXTENSION, WANTED, Body, BodyLimit, BodyMemory, HeldBody
from services.http.request_metrics import CLIENT_DISCONNECTED, COUNT, Count
from services.http.responses import Json, envelope, error_response

LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
MAX_BODY = 8 * 2**20  # bytes
BODY_SECONDS = 30.0  # for the whole body to arrive
BODIES, BODIES_OF_ONE = 128 * 2**20, 64 * 2**20  # bytes of large bodies in Serve's proxy, of all keys and of one
PROXY_REQUESTS = 480  # at once; fewer than the gateway accepts, so that health checks are always accepted
HEALTH = "/healthz"
REQUEST_ID = "x-request-id"
ABORT = "genmodels.abort"  # in the ASGI scope: a function that closes the connection; ASGI itself has none
ANSWER_HEADERS = "genmodels.answer_headers"  # in the ASGI scope: headers to add to the answer, also to an error
INTERNAL_HEADERS = frozenset(  # between Serve's own parts and its proxy; - and _ count as equal
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


@dataclass(frozen=True)
class StreamedRoute:
    """Routes with a body limit of their own: these bodies are read as a stream."""

    method: str
    prefix: str  # of the path
    limit: BodyLimit

    def matches(self, scope: Scope) -> bool:
        return scope["method"] == self.method and scope["path"].startswith(self.prefix)


class IngressMiddleware:
    """ASGI middleware: check each request, limit its body, and convert errors to one format.

    Args:
        hosts: accepted names in the Host header; None: any. Without keys, this prevents two attacks by a web page in
            a visitor's browser: its own host name that resolves to 127.0.0.1 (DNS rebinding), and a form that it
            sends here.
        max_body: bytes.
        body_seconds: time for a whole body to arrive.
        streamed: routes with other limits.
        max_requests: at the same time, without health checks; None: any number.
        memory: limit for the bodies of an application in another process, which reads them through this middleware.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Collection[str] | None = None,
        max_body: int = MAX_BODY,
        body_seconds: float = BODY_SECONDS,
        streamed: StreamedRoute | None = None,
        max_requests: int | None = None,
        memory: BodyMemory | None = None,
    ) -> None:
        self._app, self._hosts, self._limit = app, hosts, BodyLimit(max_body, body_seconds)
        self._streamed, self._max_requests, self._memory = streamed, max_requests, memory
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers, abort = Headers(scope=scope), scope.pop(ABORT, None)
        answer = _Answer(send, _request_id(headers.get(REQUEST_ID)), scope.get(COUNT) or Count())
        try:
            self._check(scope, headers)
            body = answer.body = self._body(scope, receive, send)
        except RequestError as error:
            answer.count.own = True
            await answer.send_error(error)
            return
        self._running += 1
        try:
            await self._app(self._inner(scope, answer), body.receive, answer.send)
        except ClientDisconnect:
            if body.error is None:
                return
        except Exception as error:
            if answer.started and isinstance(error.__cause__, RequestError):  # too late for an error response
                logger.warning("request %s ends: %s", answer.request_id, error.__cause__.message)
                answer.count.error = error.__cause__.status
            else:
                logger.error("request %s failed: %s", answer.request_id, _where(error))
                answer.count.error = 500
        finally:
            self._running -= 1
            body.release()
        if not answer.is_cut_off:
            await answer.finish()
        elif abort:  # so that the client sees that the answer is incomplete
            abort()
            while (await receive())["type"] != "http.disconnect":
                pass

    def _check(self, scope: Scope, headers: Headers) -> None:
        name = re.sub(r":\d*$", "", headers.get("host", "")).lower()
        if self._hosts is not None and name not in self._hosts:
            message = (
                f"Host header {name[:100]!r} is not accepted: this server runs without keys, so it accepts only "
                f"{', '.join(sorted(self._hosts))}; this protects it from web pages (DNS rebinding)"
            )
            raise RequestError(message, status=403, code="host_not_allowed")
        origin = headers.get("origin")
        if self._hosts is not None and scope["method"] not in _SAFE and origin and not _is_own(origin, headers["host"]):
            message = (
                f"Origin {origin[:100]!r} is another site: without keys, programs and this server's own pages may send "
                "requests that change something"
            )
            raise RequestError(message, status=403, code="origin_not_allowed")
        if self._max_requests is not None and self._running >= self._max_requests and scope["path"] != HEALTH:
            message = "too many requests at once; try again in a moment"
            raise RequestError(message, status=503, code="too_many_requests", retry_after=1)

    def _body(self, scope: Scope, receive: Receive, send: Send) -> Body:
        limit = self._streamed.limit if self._streamed and self._streamed.matches(scope) else self._limit
        if self._memory is None:
            return Body(scope, receive, send, limit)
        return HeldBody(scope, receive, send, limit, self._memory)

    def _inner(self, scope: Scope, answer: _Answer) -> Scope:
        """Return the scope that the application gets."""
        kept = [(name, value) for name, value in scope["headers"] if not _is_internal(name)]
        inner = {**scope, "headers": [*kept, (REQUEST_ID.encode(), answer.request_id.encode())]}
        if self._memory is not None:
            inner["extensions"] = {**(scope.get("extensions") or {}), EXTENSION: {}}
        inner[ANSWER_HEADERS] = answer.headers
        return inner


class _Answer:
    """Send an answer with its request id; convert plain errors of Serve, and end interrupted streams with an error."""

    body: Body | None = None

    def __init__(self, send: Send, request_id: str, count: Count) -> None:
        self._send, self.request_id, self.count = send, request_id, count
        self.headers: dict[str, str] = {}  # added by the application, also to an error
        self.started = self._finished = self._replaced = False
        self._is_event_stream = False

    @property
    def is_cut_off(self) -> bool:
        """Return True if an answer has begun that neither the application nor the middleware has ended."""
        return self.started and not (self._finished or self._replaced or self._is_event_stream)

    async def send(self, message: Message) -> None:
        if message["type"] == WANTED:
            if isinstance(self.body, HeldBody):
                self.body.want()
            return
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            content_type = headers.get("content-type", "")
            self._is_event_stream = content_type.startswith("text/event-stream")
            if self.body and self.body.error:  # the application saw a disconnect
                self._replaced = True
                await self.send_error(self.body.error)
                return
            self.started = True
            if message["status"] >= 400 and content_type.startswith("text/plain"):
                self._replaced = True
                # A request that Serve ends as too slow is counted by the application, which sees a disconnect.
                self.count.own = message["status"] != 408
                await self._fail(message["status"], headers.get("retry-after"))
                return
            headers[REQUEST_ID] = self.request_id
            headers.update(self.headers)
        elif message["type"] == "http.response.body":
            self._finished = not message.get("more_body", False)
        if not self._replaced:
            await self._send(message)

    async def send_error(self, error: RequestError) -> None:
        """Answer instead of the application. If the application has begun, it counts the request as disconnected."""
        self.started = True
        wait = {"retry-after": str(error.retry_after)} if error.retry_after else None
        await self._respond(error_response(error.status, error.message, code=error.code, headers=wait))

    async def finish(self) -> None:
        """End the answer after the application has returned, or has failed."""
        if not self.started and self.body and self.body.error:
            await self.send_error(self.body.error)
        elif not self.started:
            await self._fail(500, None)
        elif self._is_event_stream and not self._finished:
            self.count.error = self.count.error or CLIENT_DISCONNECTED  # unless an error is set
            event = f"data: {json.dumps(envelope(500, self._message(500)))}\n\n"
            await self._send({"type": "http.response.body", "body": event.encode(), "more_body": False})

    async def _fail(self, status: int, retry_after: str | None) -> None:
        wait = {"retry-after": retry_after} if retry_after else None
        await self._respond(error_response(status, self._message(status), headers=wait))

    async def _respond(self, response: Json) -> None:
        response.headers[REQUEST_ID] = self.request_id
        await response({"type": "http"}, _never, self._send)

    def _message(self, status: int) -> str:
        messages = {
            404: "no such route; GET /docs lists the routes",
            408: "the request took too long and was ended",
            429: "too many requests are waiting; try again in a moment",
            503: "not ready or too busy; try again in a moment",
        }
        return messages.get(status, f"internal error; find it in the log by request id {self.request_id}")


def _is_own(origin: str, host: str) -> bool:
    return origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}")


def _where(error: BaseException) -> str:
    """Return the type and place of an error. Its message stays out of the log, because it might quote a request."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return " < ".join([type(error).__name__, *(f"{frame.filename}:{frame.lineno}" for frame in reversed(frames))])


def _is_internal(header: bytes) -> bool:
    return header.decode("latin-1").lower().replace("_", "-") in INTERNAL_HEADERS


def _request_id(given: str | None) -> str:
    """Return the client's id if it is a UUID, else a new one: no other text of clients gets into logs."""
    if given and re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", given):
        return given.lower()
    return str(uuid.uuid4())


async def _never() -> Message:
    raise RuntimeError("the answer to an error reads no body")
