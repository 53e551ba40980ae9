"""The job service: the HTTP API under which people submit jobs, and beside it the dispatcher that carries them out.

    python -m services.jobs --storage URL

Everything it knows is in storage. It may be killed at any moment and started again, and there may be several of it: all
of them answer, and the one whose dispatcher holds the lease dispatches.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from fastapi.responses import RedirectResponse
from prometheus_client import CONTENT_TYPE_LATEST

from genmodels.errors import GenmodelsError
from genmodels.keys import Keys
from genmodels.spec.json_schema import json_schema
from genmodels.storage import Storage, begin_writing, open_storage
from services.cluster.descriptors import raise_file_limit
from services.cluster.logs import log_to_stderr
from services.dispatch.backends.base import Backend, Capacity
from services.dispatch.backends.rayjob import KubeOptions, add_kube_arguments
from services.http.app import new_app, rebased
from services.http.auth import KeyAuth, require_keys
from services.http.connections import Connection
from services.http.middleware import LOOPBACK
from services.http.rate_limits import Slots
from services.jobs.metrics import JobMetrics
from services.jobs.model_routes import UPLOADS, add_model_routes
from services.jobs.routes import add_job_routes

PORT = 8080
BACKENDS = ("ray-jobs", "kuberay")
MAX_BODY = 64 * 1024  # bytes; of a spec, the largest thing that is sent but for datasets
MAX_REQUESTS = 384  # at the same time; more are answered 503
MAX_REQUESTS_OF_ONE = 128  # of one key; more are answered 429
GRACE_SECONDS = 5  # that requests under way have to end when the service does
STOP_SECONDS = 20.0  # for the dispatcher to give its lease back

_ABOUT = """\
Submit jobs, watch them, and keep the models they make. A job is one YAML that names models to train; each is a run of \
its own, which the cluster carries to its end.

Send the header `Authorization: Bearer gm_...`; `genmodels keys create` makes a key where the storage is. What is \
wrong is answered as {"error": {"message", "type", "param", "code"}}.
"""

logger = logging.getLogger("genmodels.jobs")


def create_app(
    storage: Storage,
    *,
    keys: Keys | None,
    hosts: Collection[str] | None,
    closing: Callable[[], bool] = lambda: False,
    stalled: Callable[[], str | None] = lambda: None,
    endpoint: str | None = None,
) -> FastAPI:
    """The HTTP application. It reads and writes storage, and knows nothing of the cluster.

    Args:
        keys: who may ask; None: anyone.
        hosts: names that a Host header may have; None for any, where there are keys.
        closing: whether the service is about to end, so that those who follow logs are let go.
        stalled: says why the dispatcher of this process does not get on; None: it does.
        endpoint: URL of the gateway, which clients are told.
    """

    async def health() -> str | None:
        return stalled()

    app = new_app(
        "genmodels jobs",
        _ABOUT,
        hosts=hosts,
        schemas=_spec_schemas,
        max_body=MAX_BODY,
        streamed=UPLOADS,
        max_requests=MAX_REQUESTS,
        health=health,
    )
    guard = KeyAuth(keys, slots=Slots("requests", None, MAX_REQUESTS_OF_ONE))
    views = add_job_routes(app, guard, storage, closing, endpoint)
    add_model_routes(app, guard, storage)
    metrics = JobMetrics(views)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    def read_service_metrics() -> Response:
        """Read the metrics for Prometheus."""
        return Response(metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    @app.get("/", include_in_schema=False)
    def index() -> Response:
        return RedirectResponse("/docs")

    return app


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; then the lease is given back, and runs go on without us."""
    options = _parser().parse_args(arguments)
    log_to_stderr()
    try:
        return _serve(options)
    except GenmodelsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def check_access(storage: Storage, host: str, no_auth: bool) -> Keys | None:
    """The keys to ask for, None without.

    Raises:
        GenmodelsError: nobody could use it, or anybody.
    """
    if no_auth:
        if host not in ("127.0.0.1", "localhost", "::1"):
            raise GenmodelsError(f"--no-auth is for this machine alone: --host must be 127.0.0.1, not {host}")
        return None
    return require_keys(storage)


def _serve(options: argparse.Namespace) -> int:
    from genmodels.storage.lease import Lease
    from services.dispatch.dispatcher import Dispatcher

    raise_file_limit()
    storage = open_storage(options.storage)
    keys = check_access(storage, options.host, options.no_auth)
    begin_writing(storage)
    dispatcher = Dispatcher(storage, _backend(options, storage), lease=Lease(storage))
    app = create_app(
        storage,
        keys=keys,
        hosts=None if keys else LOOPBACK,
        closing=lambda: server.should_exit,
        stalled=dispatcher.rounds.stalled,
        endpoint=options.endpoint or None,
    )
    app.openapi()  # imports the families, so that nobody has to wait for them
    server = uvicorn.Server(_uvicorn(app, options.host, options.port))
    stop, broken = threading.Event(), threading.Event()

    def dispatch() -> None:
        try:
            dispatcher.run(stop)
        except BaseException as error:  # a service whose queue stands still must not look well
            logger.error("the dispatcher broke: %s: %s", type(error).__name__, error)
            broken.set()
            server.should_exit = True

    thread = threading.Thread(target=dispatch, name="dispatcher", daemon=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn takes them, and raises them once more when it has ended
    thread.start()
    try:
        server.run()
    finally:
        stop.set()
        thread.join(STOP_SECONDS)
    return 1 if broken.is_set() or not server.started else 0


def _backend(options: argparse.Namespace, storage: Storage) -> Backend:
    from services.dispatch.backends.kuberay import KubeRayBackend
    from services.dispatch.backends.ray_jobs import RayJobsBackend

    match options.backend:
        case "ray-jobs":
            return RayJobsBackend(options.ray_address, options.max_cpus, options.max_gpus)
        case "kuberay":
            return KubeRayBackend(storage, KubeOptions.of(options), Capacity(options.max_cpus, options.max_gpus))
    raise GenmodelsError(f"GENMODELS_BACKEND must be {' or '.join(BACKENDS)}, not {options.backend!r}")


def _uvicorn(app: FastAPI, host: str, port: int) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        access_log=False,
        log_level="warning",
        server_header=False,
        http=Connection,
        timeout_graceful_shutdown=GRACE_SECONDS,
        lifespan="off",
        ws="none",
    )


def _spec_schemas() -> dict[str, Any]:
    """The job spec's JSON Schema, in OpenAPI's way."""
    schema = rebased(json_schema())
    schema.pop("$schema", None)
    return {**schema.pop("$defs", {}), "JobSpec": schema}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("genmodels-jobs", description="The job service: HTTP API and dispatcher.")
    parser.add_argument("--storage", required=True, help="file:///folder or s3://bucket/prefix")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument(
        "--endpoint",
        default=os.environ.get("GENMODELS_GATEWAY"),
        help="URL of the gateway, for clients that want to know (GENMODELS_GATEWAY)",
    )
    parser.add_argument("--no-auth", action="store_true", help="ask for no key; for this machine alone")
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default=os.environ.get("GENMODELS_BACKEND") or BACKENDS[0],
        help="drivers are Ray Jobs of one cluster (ray-jobs), or RayJobs on Kubernetes (GENMODELS_BACKEND)",
    )
    parser.add_argument("--ray-address", help="of the cluster's dashboard; default: RAY_API_SERVER_ADDRESS, or here")
    for name in ("cpus", "gpus"):
        help = f"{name.upper()[:-1]}s that the cluster may grow to; default: what it has, on Kubernetes no limit"
        parser.add_argument(f"--max-{name}", type=int, default=0, help=help)
    add_kube_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
