"""Requests, each counted once: by the gateway at the end of its answer, or by Serve's proxy where that refused it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from starlette.requests import Request
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from genmodels.engine.image.requests import VERB_REQUESTS
from genmodels.metrics import REQUEST_SECONDS, REQUESTS, Labels, version_labels

COUNT = "genmodels.count"  # in the ASGI scope: a Count
LEFT = 499  # the client did not wait for the end of the answer
OTHER = "other"  # what is none of these:
ROUTES = (
    "/",
    "/docs",
    "/healthz",
    "/openapi.json",
    "/playground/{name}",
    "/v1/completions",
    "/v1/images/generations",
    "/v1/models",
    "/v1/models/{model}",
    *(f"/v1/models/{{model}}/{request.verb}" for request in VERB_REQUESTS),
    "/v1/models/{model}/history",
    "/v1/models/{model}/samples/{step}/{name}",
    "/v1/models/{model}/vocabulary",
)

_PATTERNS = [(compile_path(route)[0], route) for route in ROUTES]


@dataclass
class Count:
    """What is known of a request's answer."""

    version: Labels = ("", "", "")  # that answers, or refuses
    error: int | None = None  # status of an error that came after another one had been sent
    own: bool = False  # not the application's answer, but that of the Edge before it


class RequestMetrics:
    """ASGI middleware around an Edge.

    Args:
        own: only count what the Edge itself answers, not the application behind it, which counts the rest.
    """

    def __init__(self, app: ASGIApp, *, own: bool = False) -> None:
        self._app, self._own = app, own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, count = time.monotonic(), Count()
        status, whole = LEFT, False

        async def noting(message: Message) -> None:
            nonlocal status, whole
            await send(message)
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                whole = not message.get("more_body", False)

        try:
            await self._app({**scope, COUNT: count}, receive, noting)
        finally:
            if count.own or not self._own:
                code = count.error or (status if whole else LEFT)
                labels = (*count.version, route_of(scope["path"]))
                REQUESTS.labels(*labels, str(code)).inc()
                REQUEST_SECONDS.labels(*labels).observe(time.monotonic() - began)


def tag_version(request: Request, name: str, family: str) -> None:
    """Tell which version answers a request, or refuses it."""
    count_of(request).version = version_labels(name, family)


def count_of(request: Request) -> Count:
    count: Count = request.scope[COUNT]
    return count


def route_of(path: str) -> str:
    """The route of a path, from the list above: a path itself is the client's text."""
    return next((route for pattern, route in _PATTERNS if pattern.match(path)), OTHER)
