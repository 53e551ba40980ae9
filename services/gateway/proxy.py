"""The middlewares of Serve's HTTP proxy."""

from __future__ import annotations

from starlette.middleware import Middleware

from services.http import connections
from services.http.bodies import BodyMemory
from services.http.middleware import BODIES, BODIES_OF_ONE, PROXY_REQUESTS, IngressMiddleware
from services.http.request_metrics import RequestMetrics


def proxy_middlewares() -> list[Middleware]:
    """Return the middlewares, the outermost last. Serve's HTTP proxy calls this before it starts its server."""
    connections.use_in_this_process()
    ingress = Middleware(IngressMiddleware, memory=BodyMemory(BODIES, BODIES_OF_ONE), max_requests=PROXY_REQUESTS)
    return [ingress, Middleware(RequestMetrics, own=True)]
