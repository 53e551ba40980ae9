"""Count each request once: in the gateway at the end of its answer, or in Serve's proxy if the proxy refused it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from starlette.requests import Request
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from genmodels.engine.image.requests import VERB_REQUESTS
from genmodels.metrics import REQUEST_SECONDS, REQUESTS, Labels, version_labels

COUNT = "genmodels.count"  # in the ASGI scope: a Count
CLIENT_DISCONNECTED = 499  # before the end of the answer
OTHER = "other"  # label of paths that are none of ROUTES
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
    """The labels of a request's answer."""

    version: Labels = ("", "", "")  # the version that answers or refuses the request
    error: int | None = None  # status of an error after another status was sent
    own: bool = False  # the middleware answered, not the application


class RequestMetrics:
    """ASGI middleware around an IngressMiddleware: count the requests and measure their duration.

    Args:
        own: count only answers of the IngressMiddleware itself; the application behind it counts its own answers.
    """

    def __init__(self, app: ASGIApp, *, own: bool = False) -> None:
        self._app, self._own = app, own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, count = time.monotonic(), Count()
        status, whole = CLIENT_DISCONNECTED, False

        async def send_and_note(message: Message) -> None:
            nonlocal status, whole
            await send(message)
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                whole = not message.get("more_body", False)

        try:
            await self._app({**scope, COUNT: count}, receive, send_and_note)
        finally:
            if count.own or not self._own:
                code = count.error or (status if whole else CLIENT_DISCONNECTED)
                labels = (*count.version, route_of(scope["path"]))
                REQUESTS.labels(*labels, str(code)).inc()
                REQUEST_SECONDS.labels(*labels).observe(time.monotonic() - started)


def tag_version(request: Request, name: str, family: str) -> None:
    """Set the version that answers or refuses a request, for the metrics."""
    count_of(request).version = version_labels(name, family)


def count_of(request: Request) -> Count:
    count: Count = request.scope[COUNT]
    return count


def route_of(path: str) -> str:
    """Return the route of a path, or OTHER. The path itself is no label: clients choose it."""
    return next((route for pattern, route in _PATTERNS if pattern.match(path)), OTHER)
