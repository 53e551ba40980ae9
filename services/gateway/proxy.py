"""TODO"""

from __future__ import annotations

from starlette.middleware import Middleware

from services.http import connections
from services.http.bodies import BodyMemory
from services.http.middleware import BODIES, BODIES_OF_ONE, PROXY_REQUESTS, IngressMiddleware
from services.http.request_metrics import RequestMetrics


def proxy_middlewares() -> list[Middleware]:
    """Called by Serve's HTTP proxy before it starts its server; the last is the outermost."""
    connections.use_in_this_process()
    edge = Middleware(IngressMiddleware, memory=BodyMemory(BODIES, BODIES_OF_ONE), max_requests=PROXY_REQUESTS)
    return [edge, Middleware(RequestMetrics, own=True)]
