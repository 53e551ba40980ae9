"""HEAD on every route that answers GET (RFC 9110, 9.3.2): health checks, link checkers and proxies send it."""

from __future__ import annotations

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Head:
    """ASGI middleware: answer HEAD with the status and headers of GET.

    What the application does is ended when its answer begins, as by a client that leaves: some answers have no end.
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
