"""Rules of HTTP for every route (RFC 9110): HEAD for every GET route, and no encoded bodies."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.http.responses import error_response


class Head:
    """ASGI middleware: answer HEAD with the status and headers of GET; health checks and proxies send HEAD.

    The application is cancelled when its answer begins, as if the client had disconnected: some answers have no end.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(start: Message) -> None:
            await send(start)
            await send({"type": "http.response.body", "body": b""})
            raise ClientDisconnect

        await self._app({**scope, "method": "GET"}, receive, send_head)


class PlainBodies:
    """ASGI middleware: refuse a body with a content coding, because bodies are not decoded."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        codings = Headers(scope=scope).getlist("content-encoding") if scope["type"] == "http" else []
        coding = ", ".join(codings).lower()
        if coding in ("", "identity") or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        message = f"content-encoding: got {coding[:100]!r}, but bodies are not decoded; send it uncompressed"
        accepted = {"accept-encoding": "identity"}
        response = error_response(415, message, param="content-encoding", code="content_encoding", headers=accepted)
        await response(scope, receive, send)
